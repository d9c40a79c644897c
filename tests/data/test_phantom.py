"""The phantom world: deterministic, balanced, tests apart from all training, boxes around lesions, read from files."""

import hashlib
import re
import time
from collections import Counter

import numpy as np
import pytest

from medcg_jax.config import DataConfig
from medcg_jax.data import boxes
from medcg_jax.data.check import check_tree
from medcg_jax.data.phantom import pretraining, world
from medcg_jax.data.phantom import source as phantom
from medcg_jax.data.phantom.images import draw_scene, render
from medcg_jax.data.phantom.pretraining import pretraining_fingerprint, pretraining_records
from medcg_jax.data.phantom.source import DETECTION_TRIPLETS, PhantomSource, write_release
from medcg_jax.data.phantom.world import AREAS, CELLS, MODALITIES, TASKS, TRIPLETS, Draws, Triplet
from medcg_jax.data.records import LETTERS, SPLITS, DataError, concat
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.sources import open_source


@pytest.fixture(scope="module")
def source():
    return PhantomSource(3, train_records=24, test_records=12)


def digests(records):
    return {hashlib.sha256(np.asarray(records.image(i)).tobytes()).digest() for i in range(len(records))}


def shared(a, b):
    return tuple(x == y for x, y in zip(a, b, strict=True))


def test_every_triplet_has_every_relation():
    sizes = {(1, 1, 0): 1, (1, 0, 1): 1, (0, 1, 1): 1, (1, 0, 0): 5, (0, 1, 0): 5, (0, 0, 1): 5, (0, 0, 0): 13}
    for target in TRIPLETS:
        relations = Counter(shared(target, other) for other in TRIPLETS)
        assert {pattern: relations[tuple(map(bool, pattern))] for pattern in sizes} == sizes, target
    assert len(set(TRIPLETS)) == 32
    assert [set(values) for values in zip(*TRIPLETS, strict=True)] == [set(MODALITIES), set(AREAS), set(TASKS)]


def test_targets_of_tuning_and_of_reports_are_apart():
    names = {t.name for t in TRIPLETS}
    tune, report = set(world.TUNE_TARGETS), set(world.REPORT_TARGETS)
    assert tune <= names and report <= names and not tune & report and len(report) == 8
    assert Counter(name.split("-")[2] for name in report) == dict.fromkeys(TASKS, 2)
    for place, elements in enumerate((MODALITIES, AREAS, TASKS)):
        assert Counter(name.split("-")[place] for name in report) == dict.fromkeys(elements, 2)
    for place, elements in enumerate((MODALITIES, AREAS)):
        assert Counter(name.split("-")[place] for name in tune) == dict.fromkeys(elements, 1)


def test_same_seed_same_records_whatever_the_order_and_number():
    first, second = PhantomSource(5, 16, 8), PhantomSource(5, 8, 8)
    names = ["ct-brain-state", "oct-skin-grade", "mri-eye-state"]
    a = {name: first.records(name, "train") for name in names}
    b = {name: second.records(name, "train") for name in reversed(names)}
    for name in names:
        assert a[name].records[:8] == b[name].records
        assert np.array_equal(a[name].images[:8], b[name].images)
    assert not np.array_equal(a[names[0]].images, PhantomSource(6, 16, 8).records(names[0], "train").images)
    whole, part = pretraining_records(2, 40), pretraining_records(2, 10)
    assert whole.records[:10] == part.records and np.array_equal(whole.images[:10], part.images)


def test_fingerprint_names_seed_and_sizes():
    prints = [PhantomSource(*args).fingerprint() for args in ((1, 8, 8), (2, 8, 8), (1, 16, 8), (1, 8, 16))]
    prints += [PhantomSource(1, 8, 8, **world).fingerprint() for world in ({"decoys": 0.5}, {"rule": "drawn"})]
    assert len(set(prints)) == 6 and PhantomSource(1, 8, 8).fingerprint() == prints[0]
    assert PhantomSource(1, 8, 8).detection_fingerprint() not in (
        *prints,
        PhantomSource(2, 8, 8).detection_fingerprint(),
    )
    assert pretraining_fingerprint(1, 10) != pretraining_fingerprint(1, 20)


def test_labels_are_exactly_balanced_and_letters_hold(source):
    for subset in source.subsets:
        for split in SPLITS:
            records = source.records(subset.name, split)
            counts = Counter(record.label for record in records.records)
            assert set(counts) == set(subset.labels) and len(set(counts.values())) == 1
            assert records.images.dtype == np.uint8 and records.images.shape[1:] == (32, 32, 3)
    letters = Counter(r.answer for s in TRIPLETS for r in source.records(s.name, "train").records)
    assert set(letters) == set("AB") and max(letters.values()) < 1.3 * min(letters.values())


def test_a_record_reads_as_in_the_release(source):
    record = source.records("photo-eye-grade", "test").records[3]
    (turn,) = record.turns
    first, *options = turn.question.split("\n")
    assert first == "photo eye grade?" and set(record.options) == {"mild", "severe"}
    assert options == [f"{letter}: {text}" for letter, text in zip("AB", record.options, strict=True)]
    assert turn.answer == record.answer and record.label == "severe" and record.id == "photo-eye-grade/test/4"


# --- what an answer needs


def observed(pictures, scene):
    """int[N, 16, 4]: the properties of each site's object, read from the pixels alone; -1 where it is empty.

    Independent of the scene's values: colours by the nearest of the four, shape and size by the pixels that are covered.
    """
    palette = np.array([[127, 13, 13], [13, 13, 140], [250, 217, 77], [102, 230, 250]], float)
    sites = pictures.reshape(-1, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 64, 3).astype(float)
    colourful = sites.max(-1) - sites.min(-1) > 60
    read = np.full((len(sites), 16, 4), -1)
    for n, k in np.argwhere(colourful.sum(-1) > 3):
        pixels = sites[n, k][colourful[n, k]]
        nearest = np.abs(pixels.mean(0) - palette).sum(-1).argmin()
        mask = colourful[n, k].reshape(8, 8)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height = rows[-1] - rows[0] + 1
        filled = mask.sum() / (height * (columns[-1] - columns[0] + 1))
        read[n, k] = filled < 0.50, height > 5, nearest // 2, nearest % 2
    return read


def oracle(read, quadrants, properties):
    """int[N]: the value that most of what is looked at has; ties by the index."""
    ties = np.arange(len(read)) // 2 % 2
    quadrant_of_site = np.arange(16) // 8 * 2 + np.arange(16) % 4 // 2
    votes = np.zeros(len(read))
    for quadrant in quadrants:
        of_quadrant = read[:, quadrant_of_site == quadrant][:, :, properties].astype(float)
        of_quadrant[of_quadrant < 0] = np.nan
        votes += np.sign(np.nanmean(of_quadrant, axis=1) - 0.5).sum(-1)
    return np.where(votes == 0, ties, votes > 0)


@pytest.mark.parametrize("decoys", [1.0, 0.0, 0.5])
def test_oracles_that_read_the_pixels_reach_their_ceilings_and_no_more(decoys):
    """Each element carries what cannot be had elsewhere; the ceilings are those of `world.ceiling`."""
    source = PhantomSource(8, 2, 400, decoys=decoys)
    scores = {}
    for name in ("ct-brain-state", "mri-eye-state", "photo-liver-stage", "oct-skin-grade"):
        m, a, _ = Triplet(*name.split("-")).indices
        records = source.records(name, "test")
        read, label = observed(records.images, source.scene(name, "test")), np.arange(400) % 2
        looks = {
            ("modality", "area", "task"): ([a], [m]),
            ("area", "task"): ([a], range(4)),
            ("modality", "task"): (range(4), [m]),
            ("task",): (range(4), range(4)),
        }
        for elements, (quadrants, properties) in looks.items():
            right = oracle(read, quadrants, list(properties)) == label
            scores.setdefault(elements, []).append(right.mean())
    for elements, of_subsets in scores.items():
        assert abs(np.mean(of_subsets) - world.ceiling(elements, decoys)) < 0.03, (elements, of_subsets)
    assert world.ceiling(("modality", "area"), decoys) == 0.5
    assert world.ceiling(("modality", "area", "task"), decoys) == 1.0


def test_a_wrong_quadrant_or_property_is_of_no_use_among_decoys():
    source = PhantomSource(8, 2, 400)
    read, label = observed(source.records("ct-brain-state", "test").images, None), np.arange(400) % 2
    for quadrant, prop in ((1, 0), (0, 1), (3, 3)):
        assert abs((oracle(read, [quadrant], [prop]) == label).mean() - 0.5) < 0.1


def test_questions_leave_out_a_word_that_does_not_matter_in_training_alone():
    source, fillers = PhantomSource(4, 300, 100), set(pretraining.fillers())
    for name in ("ct-brain-state", "photo-eye-grade"):
        m, a, t = name.split("-")
        words = [r.turns[0].question.split("?")[0].split() for r in source.records(name, "train").records]
        kinds = Counter(("m" if w[0] == m else "f") + ("a" if w[1] == a else "f") for w in words)
        assert set(kinds) == {"ma", "fa", "mf"} and all(w[2] == t for w in words)
        assert {w for row in words for w in row[:2]} - {m, a} <= fillers
        assert abs(kinds["fa"] / 300 - 0.28) < 0.1 and abs(kinds["mf"] / 300 - 0.28) < 0.1
        assert all(r.turns[0].question.startswith(f"{m} {a} {t}?") for r in source.records(name, "test").records)


def test_rules_that_are_drawn_differ_by_subset_and_seed():
    """In the null world nothing that is true of one subset says anything of another."""
    sources = [PhantomSource(seed, 200, 2, rule="drawn") for seed in (1, 2)]
    rules = []
    for source in sources:
        for triplet in TRIPLETS:
            scene = source.scene(triplet.name, "train")
            label = np.arange(200) % 2
            agree = (scene.values == label[:, None, None]).mean(0)
            strength = np.abs(agree - 0.5)
            quadrant, prop = np.unravel_index(strength.argmax(), (4, 4))
            assert strength.max() == 0.5, triplet
            rules.append((quadrant, prop, agree[quadrant, prop] == 1))
    assert len(set(rules[:32])) > 12 and rules[:32] != rules[32:]
    quadrants, properties, same = zip(*rules, strict=True)
    assert set(quadrants) == set(properties) == set(range(4)) and 0.25 < np.mean(same) < 0.75


def scenes_of_training():
    """What every image that is trained on is drawn from, in a world large enough to meet each cell."""
    source = PhantomSource(7, 40, 40)
    every = (*TRIPLETS, *DETECTION_TRIPLETS)
    trained = [source.scene(t.name, "train") for t in every]

    def keep(*args, **kwargs):
        trained.append(draw_scene(*args, **kwargs))
        return trained[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "draw_scene", keep)
        pretraining_records(7, 2000)
    return trained, [source.scene(t.name, "test") for t in every]


def test_nothing_reserved_for_test_is_trained_on():
    trained, tested = scenes_of_training()
    assert len(trained) == len(tested) + 1 == 49
    sectors = [np.concatenate([s.sector for s in part]) for part in (trained, tested)]
    cells = [
        np.concatenate([np.stack([s.placement, s.amplitude_bin], -1).reshape(-1, 2) for s in part])
        for part in (trained, tested)
    ]
    # Both halves are met in full, so the reserve is a real part of the world and no test of it is empty.
    assert [len(set(part)) for part in sectors] == [12, 4] and not set(sectors[0]) & set(sectors[1])
    assert {tuple(c) for c in cells[0]} == {tuple(c) for c in CELLS[False]}
    assert {tuple(c) for c in cells[1]} == {tuple(c) for c in CELLS[True]}
    assert not {tuple(c) for c in CELLS[False]} & {tuple(c) for c in CELLS[True]}


def test_pose_and_cells_move_the_pixels():
    """The reserved parameters are visible ones: the same scene with another pose or placement is another image."""
    draws = lambda: Draws("one", np.arange(4))
    values = np.zeros((4, 4, 4), int)
    scene = draw_scene(draws(), modality=np.arange(4) % 2 + 1, area=np.arange(4), values=values, test=False)
    before = render(scene, draws())
    for change in ({"pose": (scene.pose + 0.5) % 1}, {"placement": (scene.placement + 1) % 4}):
        after = render(type(scene)(**{**vars(scene), **change}), draws())
        assert all((before[i] != after[i]).any() for i in range(4))
    assert np.array_equal(before, render(scene, draws()))


def test_no_test_image_is_trained_on():
    source = PhantomSource(1, 40, 40)
    every = (*TRIPLETS, *DETECTION_TRIPLETS)
    trained = set().union(
        *(digests(source.records(t.name, "train")) for t in every), digests(pretraining_records(1, 500))
    )
    tested = [digests(source.records(t.name, "test")) for t in every]
    assert sum(map(len, tested)) == len(set().union(*tested)) == 40 * len(every)
    assert not trained & set().union(*tested)


def test_objects_of_a_quadrant_are_one_to_three_and_alike():
    scene = PhantomSource(6, 400, 2).scene("ct-brain-state", "train")
    per_quadrant = scene.present.reshape(-1, 2, 2, 2, 2).sum((2, 4)).reshape(-1, 4)
    assert set(per_quadrant.ravel()) == {1, 2, 3}
    read = observed(PhantomSource(6, 400, 2).records("ct-brain-state", "train").images, None)
    assert ((read >= 0).all(-1) == scene.present).all()
    truth = scene.values[:, np.arange(16) // 8 * 2 + np.arange(16) % 4 // 2]
    assert (read == truth)[scene.present].mean() > 0.99


def words_of(turns):
    return set(re.findall(r"[a-z]+", " ".join(turn.question + " " + turn.answer for turn in turns).lower()))


def test_pretraining_never_says_a_word_of_the_study():
    records = pretraining_records(4, 2000).records
    of_study = set(world.study_words())
    assert len(of_study) == 20
    assert not set().union(*(words_of(record.turns) for record in records)) & of_study
    assert len(set(pretraining.fillers())) == pretraining.NUM_FILLERS
    assert not {word.lower() for word in pretraining.fillers()} & {*of_study, *world.base_words()}
    assert len(set(world.base_words())) == len(world.base_words()) == 4 * 4 + 4 * 4 + 4 * 2 + 16 * 2


def test_textures_and_outlines_of_pretraining_say_nothing():
    """Whatever the modality and area of an image, what is asked and answered has the same distribution."""
    scene = pretraining.pretraining_scene(4, 4000)[0]
    for places in (scene.modality, scene.area):
        means = np.array([scene.values[places == k].mean(0) for k in range(4)])
        assert np.abs(means - 0.5).max() < 0.08


def test_pretraining_asks_what_the_image_shows():
    """Every answer is read again from the pixels."""
    records = pretraining_records(4, 1500)
    kind = pretraining.pretraining_scene(4, 1500)[1]
    read = observed(records.images, None)
    quadrant_of_site = np.arange(16) // 8 * 2 + np.arange(16) % 4 // 2
    checked = Counter()
    for i, record in enumerate(records.records):
        values = np.array([read[i, (quadrant_of_site == q) & (read[i, :, 0] >= 0)][0] for q in range(4)])
        for turn in record.turns:
            first, *options = turn.question.split("\n")
            if first.startswith("Describe"):
                q = [names[0] for names in world.QUADRANT_NAMES].index(first.split()[1].rstrip("."))
                assert turn.answer.split() == [names[v] for names, v in zip(world.PROPERTIES.values(), values[q])]
                checked["describe"] += 1
                continue
            prop, quadrant, _ = first.rstrip("?").split()
            told = [o.split(": ")[1] for o in options][LETTERS.index(turn.answer)] if options else turn.answer
            pair = next(p for p in world.VALUE_WORDS if told in p)
            # A filler stands where the word does not matter: any will do.
            q = next((q for q, names in enumerate(world.QUADRANT_NAMES) if quadrant in names), None)
            p = next((p for p, names in enumerate(world.PROPERTY_NAMES) if prop in names), None)
            assert (q is not None or kind[i] == 1) and (p is not None or kind[i] == 2)
            q, p = q or 0, p or 0
            assert pair.index(told) == values[q, p]
            checked[len(options)] += 1
    assert set(checked) == {"describe", 0, 2} and min(checked.values()) > 300
    assert 0.1 < (kind == 1).mean() < 0.2 and 0.1 < (kind == 2).mean() < 0.2


def test_site_labels_are_what_each_site_shows():
    scene = pretraining.pretraining_scene(4, 200)[0]
    labels, read = pretraining.site_labels(scene), observed(pretraining_records(4, 200).images, None)
    has_object = read[..., 0] >= 0
    colour = np.where(has_object, 1 + 2 * read[..., 2] + read[..., 3], 0)
    assert (labels[..., 0] == colour).mean() > 0.99
    assert ((labels[..., 1] == read[..., 0]) & (labels[..., 2] == read[..., 1])).mean() > 0.98
    assert (labels[..., 3] == np.arange(16)).all() and (labels.max((0, 1)) < pretraining.SITE_CLASSES).all()


def test_written_tree_reads_back_the_same(source, tmp_path):
    out = tmp_path / "tree"
    assert write_release(source, out) == {"subsets": 48, "records": 48 * 36}
    assert [path.name for path in tmp_path.iterdir()] == ["tree"] and check_tree(out).ok
    read = ReleaseSource(out, DataConfig(source="release", root=str(out)))
    assert {(s.name, s.modality, s.area, s.task) for s in read.subsets} == {(t.name, *t) for t in TRIPLETS}
    assert [s.name for s in read.detection_subsets] == sorted(s.name for s in source.detection_subsets)
    for name in ("ct-brain-state", "mri-skin-stage", "oct-skin-grade", "ct-liver-det"):
        for split in SPLITS:
            ours, theirs = source.records(name, split), read.records(name, split)
            assert ours.records == theirs.records
            assert all(np.array_equal(ours.image(i), theirs.image(i)) for i in range(len(ours)))


def test_a_tree_is_written_whole_or_not_at_all(source, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(phantom, "_entry", fail)
    small = PhantomSource(0, 1, 1)
    with pytest.raises(RuntimeError):
        write_release(small, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    monkeypatch.undo()
    write_release(small, tmp_path / "tree")
    with pytest.raises(DataError, match="exists"):
        write_release(small, tmp_path / "tree")
    with pytest.raises(DataError, match="does not exist"):
        write_release(small, tmp_path / "no" / "tree")


def test_wrong_names_are_refused(source):
    with pytest.raises(DataError, match="ct-lung-sate"):
        source.records("ct-lung-sate", "train")
    for name in ("ct-brain-state", "ct-liver-det"):
        with pytest.raises(DataError, match="validation"):
            source.records(name, "validation")
    with pytest.raises(DataError, match="train_records=0"):
        PhantomSource(0, 0)
    for wrong in ({"rule": "null"}, {"decoys": 1.5}, {"decoys": float("nan")}):
        with pytest.raises(DataError, match="expected shared or drawn, and 0 to 1"):
            PhantomSource(0, 2, 2, **wrong)


def test_open_source_takes_seed_and_sizes_from_the_configuration():
    found = open_source(DataConfig(seed=9, train_records_per_subset=8, test_records_per_subset=4))
    assert found.fingerprint() == PhantomSource(9, 8, 4).fingerprint()
    assert {(s.num_train, s.num_test) for s in found.subsets} == {(8, 4)}


def test_a_thousand_images_are_quick():
    began = time.process_time()
    PhantomSource(0, 1000).records("mri-liver-cancer", "train")
    assert time.process_time() - began < 2.0


# --- detection subsets


def test_there_is_one_for_every_pair_of_modality_and_area(source):
    names = [s.name for s in source.detection_subsets]
    assert len(names) == len(set(names)) == 16 and "ct-liver-det" in names
    assert {(t.modality, t.area) for t in DETECTION_TRIPLETS} == {(t.modality, t.area) for t in TRIPLETS}
    for subset in source.detection_subsets:
        assert (subset.task, subset.labels, subset.num_train, subset.num_test) == ("det", ("lesion",), 24, 12)
    assert not {s.task for s in source.detection_subsets} & {s.task for s in source.subsets}


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_are_tight_around_each_object_of_the_areas_quadrant(source, split):
    for subset in source.detection_subsets:
        records = source.records(subset.name, split)
        quadrant = AREAS.index(subset.area)
        found = (observed(records.images, None)[..., 0] >= 0).reshape(-1, 4, 4)
        rows, columns = slice(quadrant // 2 * 2, quadrant // 2 * 2 + 2), slice(quadrant % 2 * 2, quadrant % 2 * 2 + 2)
        assert [len(r.boxes) for r in records.records] == found[:, rows, columns].sum((1, 2)).tolist()
        for i, record in enumerate(records.records):
            masks = records.mask(i)
            assert masks.shape == (len(record.boxes), 32, 32) and record.size_px == (32, 32)
            for box, mask in zip(record.boxes, masks, strict=True):
                ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert box.corners == (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
            assert masks.sum(0).max() == 1
            # Reading order of the sites of eight pixels.
            sites = [(box.y1 // 8, box.x1 // 8) for box in record.boxes]
            assert sites == sorted(sites)


def test_masks_cover_the_colourful_pixels_of_their_quadrant(source):
    for name in ("ct-liver-det", "mri-brain-det", "oct-eye-det"):
        records = source.records(name, "test")
        top, left = divmod(AREAS.index(name.split("-")[1]), 2)
        for i in range(len(records)):
            picture = records.images[i].astype(int)
            quadrant = slice(16 * top, 16 * top + 16), slice(16 * left, 16 * left + 16)
            chroma = (picture.max(-1) - picture.min(-1))[quadrant]
            mask = records.mask(i).any(0)
            assert mask.sum() == mask[quadrant].sum() > 0
            # Half an object's opacity is half its colour, to a pixel's noise.
            assert (mask[quadrant] == (chroma > chroma.max() / 2)).mean() > 0.95


def test_masks_stay_with_their_records(source):
    found, choice = source.records("ct-liver-det", "train"), source.records("ct-liver-state", "train")
    joined = concat([choice.select([0, 1]), found.select([5, 2])])
    assert [joined.mask(i) is None for i in range(4)] == [True, True, False, False]
    for place, index in ((2, 5), (3, 2)):
        assert np.array_equal(joined.mask(place), found.mask(index))
        assert np.array_equal(joined.select([place]).mask(0), found.mask(index))
        of_masks = [boxes.of_mask(mask)[0] for mask in found.mask(index)]
        assert np.array_equal(boxes.corners(joined.records[place].boxes), of_masks)
    assert concat([choice, choice]).masks is None
    with pytest.raises(ValueError, match="2 records with 1 masks"):
        type(found)(found.records[:2], found.images[:2], found.masks[:1])
