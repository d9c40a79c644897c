"""The linear probe: signals that are there and signals that are not, the same regression in few dimensions, every family."""

import dataclasses

import family_toys
import jax
import numpy as np
import pytest
from eval_toys import others_long
from family_toys import TINY
from flax import nnx

from medcg_jax.config import replace
from medcg_jax.data.records import LETTERS, Record, RecordSet, Subset, Turn
from medcg_jax.eval import probe as probes
from medcg_jax.eval.probe import FEATURES, SIDE, Prober, image_features, make_encoder, probe
from medcg_jax.families import build
from medcg_jax.families.common import cells_of
from medcg_jax.families.mllama.rows import GRIDS, NUM_TILES

LABELS = ("mild", "severe", "minimal")


def questions(labels, split="train", *, options=LABELS, group=None, subset="s") -> list[Record]:
    made = []
    for i, label in enumerate(labels):
        offered = options if label in options else (*options, label)
        letter = LETTERS[offered.index(label)]
        lines = "".join(f"\n{LETTERS[k]}: {text}" for k, text in enumerate(offered))
        owner = group[i] if group is not None else ""
        turn = Turn(f"Grade the finding.{lines}", letter)
        made.append(Record(f"{subset}/{split}/{i}", subset, (turn,), offered, letter, f"{split}{i}.png", group=owner))
    return made


def drawn(count: int, width: int, seed: int, signal: float = 3.0):
    """(float32[count, width], labels): a direction for each label in much noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    directions = np.random.default_rng(9).normal(size=(3, width)) / np.sqrt(width)
    x = signal * directions[labels] + random.normal(size=(count, width)) / np.sqrt(width)
    return x.astype(np.float32), [LABELS[i] for i in labels]


@pytest.mark.parametrize("width", [20, 600])
def test_a_readable_label_is_read_and_a_permuted_one_is_not(width):
    (x, labels), (of_test, asked) = drawn(150, width, 0), drawn(200, width, 1)
    found = probe("mean", x, questions(labels), of_test, questions(asked, "test"))
    assert (found.features, found.records, found.n) == ("mean", 150, 200)
    assert found.correct > 190 and found.validated > 0.95
    # Its labels in another order: chance is a third.
    moved = [labels[i] for i in np.random.default_rng(2).permutation(150)]
    found = probe("mean", x, questions(moved), of_test, questions(asked, "test"))
    assert 0.2 < found.correct / found.n < 0.47 and found.validated < 0.47


def test_more_features_than_records_change_no_regression():
    (x, labels), (of_test, _) = drawn(60, 200, 0, 0.8), drawn(50, 200, 1, 0.8)
    assert probes._rotated(x, of_test)[0].shape[1] < 60
    places = np.array([LABELS.index(label) for label in labels])
    centred, scale = x - x.mean(0), np.sqrt(np.square(x - x.mean(0)).sum(1).mean())

    def scores(train, test):
        *_, weights = probes._path(train, places, 3, (1.0, 0.1, 0.01))
        return test @ weights[:-1] + weights[-1]

    alone = scores(centred.astype(np.float64) / scale, (of_test - x.mean(0)).astype(np.float64) / scale)
    np.testing.assert_allclose(scores(*probes._rotated(x, of_test)), alone, atol=5e-3)
    # Noise is not fitted where the penalty is strong: the scores are those of the labels' shares.
    (weights,) = probes._path(centred.astype(np.float64) / scale, places, 3, (100.0,))
    shares = np.exp(weights[-1] - weights[-1].max())
    np.testing.assert_allclose(shares / shares.sum(), np.bincount(places) / 60, atol=5e-3)


def test_only_offered_options_are_answered():
    x, labels = drawn(90, 8, 0)
    asked = questions([label for label in labels if label != "minimal"], options=LABELS[:2])
    kept = np.array([label != "minimal" for label in labels])
    noise = np.random.default_rng(0).normal(size=(kept.sum(), 8)).astype(np.float32)
    read = probe("mean", x, questions(labels), noise, asked)
    assert 0.3 < read.correct / read.n < 0.7
    # A label that no training record has is never right; nor is anything where no offered one has been seen.
    new = questions(["other"] * 10, "test")
    assert probe("mean", x, questions(labels), x[:10], new).correct == 0
    unknown = questions(["other"] * 10, "test", options=("another",))
    assert probe("mean", x, questions(labels), x[:10], unknown).correct == 0


def test_a_patient_is_in_one_part_of_the_cross_validation():
    # Each patient has features and a label of their own: what is learnt of one says nothing of others.
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    x = random.normal(size=(40, 30))[patients] + 0.01 * random.normal(size=(200, 30))
    labels = [LABELS[i] for i in random.integers(0, 3, 40)[patients]]
    names = [f"p{i}" for i in patients]
    alone = probe("mean", x.astype(np.float32), questions(labels), x.astype(np.float32), questions(labels))
    grouped = questions(labels, group=names)
    together = probe("mean", x.astype(np.float32), grouped, x.astype(np.float32), grouped)
    assert alone.validated > 0.95 and together.validated < 0.6
    folds = probes._folds(grouped)
    assert len(set(zip(names, folds, strict=True))) == 40 and np.bincount(folds).tolist() == [40] * 5


# ------------------------------------------------------------------ models


class Subsets:
    """A source of one subset."""

    def __init__(self, train: RecordSet):
        self.train, self.subsets = train, (Subset("s", "ct", "liver", "stage"),)

    def records(self, subset, split):
        return self.train


def pictures(labels, split, seed) -> RecordSet:
    """Noise with a bright square whose corner says the label: the place is not to be had from a mean of pixels."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 90, (len(labels), 32, 32, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(LABELS.index(label), 2)
        image[16 * top : 16 * top + 16, 16 * left : 16 * left + 16] += 150
    return RecordSet(questions(labels, split), images)


def setup_of(family: str, train: RecordSet):
    found = family_toys.setup(family)
    run = replace(found.run, eval__batch_size=16)
    return dataclasses.replace(found, run=run, source=Subsets(train))


@pytest.mark.parametrize("family", others_long(TINY))
def test_every_family_is_probed(family):
    random = np.random.default_rng(0)
    labels, asked = ([LABELS[i] for i in random.integers(0, 3, count)] for count in (90, 60))
    train, test = pictures(labels, "train", 1), pictures(asked, "test", 2)
    found = setup_of(family, train)
    graphdef, params = build.abstract(found.model)[0], family_toys.placed(family, None)
    by_features = {r.features: r for r in Prober(found, graphdef, params)(found.encode_eval(test))}
    assert set(by_features) == set(FEATURES)
    assert by_features["tokens"].correct >= 57, "the corner is in the tokens of its cells"
    # Planted: labels that the images do not show.
    permuted = RecordSet(questions([labels[i] for i in random.permutation(90)]), train.images)
    found = setup_of(family, permuted)
    blind = Prober(found, graphdef, params)(found.encode_eval(test))
    assert all(result.correct < 36 for result in blind)


def test_features_are_in_the_order_of_the_records_whatever_the_batches():
    train = pictures(["mild", "severe", "minimal"] * 4, "train", 1)
    # Prompts of different lengths come in another order.
    records = [
        dataclasses.replace(r, turns=(Turn(f"{'Look. ' * (i % 3)}{r.turns[0].question}", r.answer),))
        for i, r in enumerate(train.records)
    ]
    found = setup_of("llava", RecordSet(records, train.images))
    graphdef, params = build.abstract(found.model)[0], family_toys.placed("llava", None)
    encoder = make_encoder(found.mesh, graphdef, build.shardings(found.model, found.mesh))
    encoded = found.encode_eval(found.source.train)
    whole = image_features(found.mesh, encoder, params, encoded, batch_size=12)
    parts = image_features(found.mesh, encoder, params, encoded, batch_size=5)
    for name in FEATURES:
        np.testing.assert_allclose(whole[name], parts[name], atol=1e-5)
    alone = found.encode_eval(found.source.train.select([7]))
    one = image_features(found.mesh, encoder, params, alone, batch_size=1)["mean"]
    np.testing.assert_allclose(whole["mean"][7:8], one, atol=1e-5)


def test_test_images_and_patients_are_not_trained_on():
    labels = ["mild", "severe", "minimal"] * 10
    train = pictures(labels, "train", 1)
    records = [dataclasses.replace(r, group="p1") if i in (3, 4) else r for i, r in enumerate(train.records)]
    found = setup_of("llava", RecordSet(records, train.images))
    asked = questions(labels[:6], "test")
    asked[5] = dataclasses.replace(asked[5], group="p1")
    test = RecordSet(asked, [train.image(0), *pictures(labels[:6], "test", 3).images[1:]])
    graphdef, params = build.abstract(found.model)[0], family_toys.placed("llava", None)
    prober = Prober(found, graphdef, params)
    assert {result.records for result in prober(found.encode_eval(test))} == {27}
    few = setup_of("llava", RecordSet(records, train.images).select(range(probes.MIN_RECORDS)))
    assert Prober(few, graphdef, params)(few.encode_eval(test)) == []
    texts = RecordSet([dataclasses.replace(r, image="") for r in asked], test.images)
    assert prober(found.encode_eval(texts)) == []


def test_cells_of_a_grid():
    # 4 x 4 tokens: each its own cell. 2 rows of 3: cells in proportion.
    assert np.array(cells_of(np.arange(16), 4, 4, SIDE)).tolist() == list(range(16))
    assert np.array(cells_of(np.arange(6), 2, 3, 2)).tolist() == [0, 0, 1, 2, 2, 3]


def cells_by_model(family: str, image: np.ndarray, side: int) -> list[int]:
    found = family_toys.setup(family)
    graphdef, params = build.abstract(found.model)[0], family_toys.placed(family, None)
    arrays = {key: value[None, None] for key, value in found.format.preprocess(image).items()}
    with jax.set_mesh(found.mesh):
        return np.array(nnx.merge(graphdef, params).image_tokens(arrays, side)[1])[0].tolist()


def test_cells_of_images_of_any_shape_and_of_tiles():
    found = family_toys.setup("qwen2_vl")
    image = np.zeros((8, 32, 3), np.uint8)
    rows, columns = (found.format.preprocess(image)["grids"] // found.model.vision.merge).tolist()
    cells, num = cells_by_model("qwen2_vl", image, 2), rows * columns
    assert rows < columns and num < len(cells)
    expected = [(r * 2 // rows) * 2 + c * 2 // columns for r in range(rows) for c in range(columns)]
    assert cells == expected + [-1] * (len(cells) - num)
    # Two tiles side by side: the first has the left half of the image; a class token stands before each tile.
    vision = family_toys.setup("mllama").model.vision
    inside, side = round((vision.tokens_per_tile - 1) ** 0.5), 2 * round((vision.tokens_per_tile - 1) ** 0.5)
    wide = np.zeros((vision.image_size_px, 2 * vision.image_size_px, 3), np.uint8)
    cells = np.reshape(cells_by_model("mllama", wide, side), (NUM_TILES, -1))
    assert GRIDS[1] == (1, 2) and (cells[2:] == -1).all() and (cells[:2, 0] == side**2).all()
    for tile in (0, 1):
        places = [(2 * r, tile * inside + c) for r in range(inside) for c in range(inside)]
        assert cells[tile, 1:].tolist() == [r * side + c for r, c in places]
