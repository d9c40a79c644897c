"""Features of test images that are kept for the next parameters: the same bits, and only where the same parts made them."""

import dataclasses

import family_toys
import jax
import numpy as np
import pytest
from eval_toys import others_long
from family_toys import SOURCE, SUBSETS, TINY
from flax import nnx

from medcg_jax.config import replace
from medcg_jax.data.controls import control_sets
from medcg_jax.eval import predictions, subsets
from medcg_jax.eval.features import GIB, FeatureStore, frozen_parts
from medcg_jax.families import build, registry
from medcg_jax.families.common import VisionLanguageModel
from medcg_jax.families.llava.model import Llava
from medcg_jax.mesh import batch_sharding

MESH = "data, fsdp, tensor"
CONTROLS = ("shuffled_images", "blank_images", "text_only")
# What a cell trains: cells share the projected features, or the tower's.
TRAINED = (("decoder",), ("projector", "decoder"))


def made_tester(family: str, mesh: str | None, *, trainable=("projector", "decoder"), features_gib: float = 1.0):
    """A tester of batches of 8 rows."""
    opened = family_toys.setup(family, mesh)
    options = dict(eval__batch_size=8, eval__generate=False, eval__features_gib=features_gib)
    run = replace(opened.run, **options, model__trainable=trainable)
    opened = dataclasses.replace(opened, run=run)
    return subsets.Tester(opened, build.abstract(opened.model)[0], sees=True)


def questions(family: str, controls=CONTROLS) -> list[subsets.SubsetTest]:
    """Two subsets of four questions, which fill half a batch each."""
    opened, tests = family_toys.setup(family), []
    for name in SUBSETS:
        records = SOURCE.records(name, "test")
        again = {
            control: opened.encode_eval(of_control)
            for control, of_control in control_sets(records, controls, 0).items()
        }
        tests.append(subsets.SubsetTest(opened.encode_eval(records), again, name))
    return tests


def cells(family: str, mesh: str | None, parts: tuple[str, ...]) -> list[nnx.State]:
    """Parameters of three cells that differ in these parts, and hold the same arrays of the others."""
    params, parameters = family_toys.placed(family, mesh), []
    for number in range(3):
        trees = dict(params.raw_mapping)
        for part in {*parts} & {*trees} if number else ():
            trees[part] = jax.tree.map(lambda w, number=number: w * (1 + 0.1 * number), trees[part])
        parameters.append(nnx.State(trees))
    return parameters


def counted(tester: subsets.Tester) -> list:
    """The batches of images that the tester encodes from now on."""
    store, seen = tester._features, []
    encode = store._encode
    store._encode = lambda params, images: seen.append(images) or encode(params, images)
    return seen


def files_of(tester, params, tests, folder) -> dict[str, bytes]:
    """What the answers' files hold."""
    for test, (plain, controls) in zip(tests, tester.run(params, iter(tests)), strict=True):
        predictions.write_predictions(folder / f"{test.name}.jsonl", plain)
        predictions.write_controls(folder / f"{test.name}.controls.jsonl", controls)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mesh", [None, pytest.param(MESH, marks=pytest.mark.long)])
@pytest.mark.parametrize("parts", TRAINED, ids="+".join)
@pytest.mark.parametrize("family", others_long(TINY))
def test_kept_features_change_no_byte_of_any_answer(family, parts, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "DECIMALS", 9)  # every digit of a float32
    tests, keeping, forgetting = questions(family), *(
        made_tester(family, mesh, trainable=parts, features_gib=size) for size in (1.0, 0.0)
    )  # fmt: skip
    encoded, again = counted(keeping), counted(forgetting)
    written = []
    for number, params in enumerate(cells(family, mesh, parts)):
        files = [files_of(tester, params, tests, tmp_path / f"{number}{name}") for name, tester in
                 (("kept", keeping), ("made", forgetting))]  # fmt: skip
        assert files[0] == files[1] and len(files[0]) == 4
        written.append(files[0])
    assert len({file["ct-liver-state.jsonl"] for file in written}) == 3
    # Each subset, the grey image and no image once; without keeping also for every control that is no further question.
    assert len(encoded) == 4 and len(again) == 3 * 2 * 3
    for features, _ in keeping._features._kept.values():
        assert all(x.sharding == batch_sharding(keeping._setup.mesh) for x in jax.tree.leaves(features))


def test_features_of_another_image_change_the_letters(tmp_path):
    tester, tests = made_tester("llava", None), questions("llava", ())
    [params, *_] = cells("llava", None, ())
    before = files_of(tester, params, tests, tmp_path / "before")
    assert files_of(tester, params, tests, tmp_path / "again") == before
    kept = tester._features._kept
    for key, (features, size) in list(kept.items()):
        kept[key] = {name: jax.numpy.roll(x, 1, axis=0) for name, x in features.items()}, size
    moved = files_of(tester, params, tests, tmp_path / "moved")
    assert all(moved[name] != before[name] for name in before if "controls" not in name)


def test_parameters_with_another_tower_get_features_of_their_own(tmp_path):
    """Whatever is said about what is trained: arrays that are not the same share nothing."""
    tests, tester = questions("llava", ()), made_tester("llava", None)
    encoded = counted(tester)
    for number, params in enumerate(cells("llava", None, ("vision",))):
        fresh = made_tester("llava", None, features_gib=0.0)
        answers = files_of(tester, params, tests, tmp_path / f"{number}")
        assert answers == files_of(fresh, params, tests, tmp_path / f"{number}fresh")
    assert len(encoded) == 3 * 2 and len(tester._features._kept) == 2
    tester.forget()
    assert not tester._features._kept and tester._features._bytes == 0


# ------------------------------------------------------------------ which parts are shared


def test_what_is_trained_says_what_is_shared():
    assert frozen_parts(("projector", "decoder")) == ("vision",) == frozen_parts(("projector",))
    assert (
        frozen_parts(("decoder",)) == frozen_parts(("lora",)) == frozen_parts(("embedding",)) == ("vision", "projector")
    )
    assert frozen_parts(("vision",)) == frozen_parts(("vision", "projector", "decoder")) == ()


@pytest.mark.parametrize("family", TINY)
def test_each_step_reads_the_part_that_it_is_named_after(family):
    opened = family_toys.setup(family)
    graphdef, params = build.abstract(opened.model)[0], family_toys.weights(family)
    images = opened.encode_eval(SOURCE.records("ct-liver-state", "test")).image_rows(np.arange(2))

    def broken_but(part: str) -> nnx.State:
        trees = {
            name: tree if name == part else jax.tree.map(lambda w: w * np.nan, tree) for name, tree in params.items()
        }
        return nnx.State(trees)

    @jax.jit
    def steps(of_tower, of_projector, images):
        features = nnx.merge(graphdef, of_tower).tower_features(images)
        return features, nnx.merge(graphdef, of_projector).project_features(features)

    whole, broken = steps(params, params, images), steps(broken_but("vision"), broken_but("projector"), images)
    for expected, seen in zip(jax.tree.leaves(whole), jax.tree.leaves(broken), strict=True):
        assert np.isfinite(seen).all()
        np.testing.assert_array_equal(seen, expected)
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(steps(broken_but("projector"), params, images)))


def test_a_family_cannot_override_the_whole_in_place_of_its_steps():
    assert all("encode_images" not in vars(family.module_type) for family in registry.families())
    with pytest.raises(TypeError, match="Own.encode_images: override tower_features and project_features"):
        type("Own", (Llava,), {"encode_images": VisionLanguageModel.encode_images})


# ------------------------------------------------------------------ memory


def store_of(
    limit_bytes: float, trainable=("decoder",), mesh: str | None = None
) -> tuple[FeatureStore, nnx.State, dict]:
    opened = family_toys.setup("llava", mesh)
    store = FeatureStore(
        opened.mesh, build.abstract(opened.model)[0], build.shardings(opened.model, opened.mesh),
        trainable=trainable, limit_bytes=limit_bytes,
    )  # fmt: skip
    images = opened.encode_eval(SOURCE.records("ct-liver-state", "test")).image_rows(np.arange(4))
    return store, family_toys.placed("llava", mesh), images


def test_the_least_recently_used_goes_first():
    store, params, images = store_of(GIB)
    store.get(params, "size", lambda: images)
    size = store._bytes
    assert size == 4 * 4 * 64 * 4  # rows x tokens x width x float32
    store, *_ = store_of(2.5 * size)
    asked = []
    for key in ("a", "b", "a", "c", "a", "b"):
        store.get(params, key, lambda key=key: asked.append(key) or images)
    assert asked == ["a", "b", "c", "b"] and [*store._kept] == ["a", "b"] and store._bytes == 2 * size
    tiny, *_ = store_of(0.5 * size)
    tiny.get(params, "a", lambda: images)
    assert not tiny._kept and tiny._bytes == 0


def test_devices_share_the_memory_of_a_batch():
    (alone, params, images), (split, placed, _) = store_of(GIB), store_of(GIB, mesh=MESH)
    alone.get(params, "a", lambda: images)
    split.get(placed, "a", lambda: images)
    assert alone._bytes == 4 * split._bytes  # data x fsdp


@pytest.mark.parametrize(("key", "trainable"), [(None, ("decoder",)), ("a", ("vision", "decoder"))])
def test_nothing_is_kept_without_a_name_or_a_frozen_tower(key, trainable):
    store, params, images = store_of(GIB, trainable)
    for _ in range(2):
        features = store.get(params, key, lambda: images)
    assert not store._kept and features.keys() == {"image_features"}
