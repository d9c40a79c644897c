"""Detection phantoms: boxes hold the lesions alone, tests keep the reserve, choice phantoms stay as they are."""

import hashlib

import numpy as np
import pytest

from medcg_jax.config import DataConfig
from medcg_jax.data import boxes
from medcg_jax.data.check import check_tree
from medcg_jax.data.phantom import PhantomSource, write_release
from medcg_jax.data.phantom_boxes import DETECTION_TRIPLETS, PhantomBoxSource, lesion_masks
from medcg_jax.data.phantom_images import LESION_SHAPES, _objects, render
from medcg_jax.data.phantom_world import TRIPLETS, cell_reserved, sector_reserved
from medcg_jax.data.records import SPLITS, DataError, concat
from medcg_jax.data.release import ReleaseSource
from medcg_jax.data.sources import open_source


@pytest.fixture(scope="module")
def source():
    return PhantomBoxSource(3, train_records=24, test_records=12)


def test_there_is_one_for_every_pair_of_modality_and_area(source):
    names = [s.name for s in source.detection_subsets]
    assert len(names) == len(set(names)) == 16 and "ct-liver-det" in names
    assert {(t.modality, t.area) for t in DETECTION_TRIPLETS} == {(t.modality, t.area) for t in TRIPLETS}
    for subset in source.detection_subsets:
        assert (subset.task, subset.labels, subset.num_train, subset.num_test) == ("det", ("lesion",), 24, 12)
    assert not {s.task for s in source.detection_subsets} & {s.task for s in source.subsets}


def test_choice_subsets_are_those_without_boxes(source):
    plain = PhantomSource(3, train_records=24, test_records=12)
    assert source.subsets == plain.subsets and source.fingerprint() == plain.fingerprint()
    for name in ("ct-liver-stage", "oct-skin-grade"):
        ours, theirs = source.records(name, "test"), plain.records(name, "test")
        assert ours.records == theirs.records and np.array_equal(ours.images, theirs.images) and ours.masks is None
    opened = open_source(DataConfig(seed=3, train_records_per_subset=24, test_records_per_subset=12))
    assert opened.fingerprint() == plain.fingerprint()
    assert opened.detection_fingerprint() == source.detection_fingerprint() != plain.fingerprint()
    assert PhantomBoxSource(4, 24, 12).detection_fingerprint() != source.detection_fingerprint()


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_are_tight_around_each_lesion(source, split):
    for subset in source.detection_subsets:
        records, scene = source.records(subset.name, split), source.scene(subset.name, split)
        assert [len(r.boxes) for r in records.records] == scene.count.tolist() == [1, 2, 3] * (len(records) // 3)
        for i, record in enumerate(records.records):
            masks = records.mask(i)
            assert masks.shape == (len(record.boxes), 32, 32) and record.size_px == (32, 32)
            for box, mask in zip(record.boxes, masks, strict=True):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert box.corners == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert masks.sum(0).max() == 1
            # Reading order of the sites of eight pixels.
            sites = [(box.y1 // 8, box.x1 // 8) for box in record.boxes]
            assert sites == sorted(sites)


def without_landmark(scene):
    """The lesions alone, brightness 0 elsewhere: amplitude 0 for the landmark."""
    amplitude = scene.amplitude.copy()
    amplitude[:, -1] = 0
    return _objects(type(scene)(**{**vars(scene), "amplitude": amplitude}))


def test_masks_are_where_the_lesions_are_drawn(source):
    for name in ("ct-liver-det", "microscopy-colon-det", "photo-skin-grade", "ct-brain-state"):
        scene = source.scene(name, "test")
        drawn, masks = without_landmark(scene), lesion_masks(scene)
        assert [len(own) for own in masks] == scene.count.tolist()
        for picture, own in zip(drawn, masks, strict=True):
            covered = own.any(0)
            assert not len(own) or picture[covered].min() > 0.2
            assert picture[~covered].max() < 0.31
            assert len(own) == 0 or picture[~covered].max() < picture[covered].min() + 0.1


def test_images_brighten_or_darken_inside_the_boxes():
    """The boxes belong to the pixels: the same scene without lesions differs inside the boxes, and hardly outside."""
    source = PhantomBoxSource(1, 30, 6)
    for name in ("ct-liver-det", "xray-bone-det"):
        scene, records = source.scene(name, "train"), source.records(name, "train")
        bare = type(scene)(**{**vars(scene), "count": np.zeros_like(scene.count)})
        triplet = next(t for t in DETECTION_TRIPLETS if t.name == name)
        draws = source._draws(name, "train")
        source._scene(triplet, "train", draws)
        changed = np.abs(render(bare, draws).astype(int) - records.images).max(-1)
        for i, record in enumerate(records.records):
            inside = np.zeros((32, 32), bool)
            for box in record.boxes:
                x1, y1, x2, y2 = map(int, box.corners)
                inside[y1:y2, x1:x2] = True
            assert changed[i][records.mask(i).any(0)].mean() > 40
            assert changed[i][~inside].mean() < 5


def test_test_images_keep_the_reserve(source):
    for triplet in DETECTION_TRIPLETS:
        for split, wanted in (("train", False), ("test", True)):
            scene = source.scene(triplet.name, split)
            assert (sector_reserved(scene.sector) == wanted).all()
            assert (cell_reserved(scene.placement, scene.amplitude_bin) == wanted).all()
            assert set(scene.shape) <= set(LESION_SHAPES)


def test_images_are_new_ones_and_the_same_at_each_call(source):
    seen = set()
    for name in ("ct-liver-det", "ct-liver-stage", "ct-liver-state"):
        for split in ("train", "test"):
            own = {hashlib.sha256(image.tobytes()).digest() for image in source.records(name, split).images}
            assert len(own) == len(source.records(name, split)) and not own & seen
            seen |= own
    again = PhantomBoxSource(3, 12, 12).records("ct-liver-det", "train")
    first = source.records("ct-liver-det", "train")
    assert again.records == first.records[:12] and np.array_equal(again.images, first.images[:12])
    assert first.records[0].id == "ct-liver-det/train/1" and first.records[0].turns == ()


def test_masks_stay_with_their_records(source):
    found, choice = source.records("ct-liver-det", "train"), source.records("ct-liver-stage", "train")
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


def test_written_boxes_read_back_the_same(source, tmp_path):
    out = tmp_path / "tree"
    assert write_release(source, out)["subsets"] == 48
    assert check_tree(out).ok
    read = ReleaseSource(out, DataConfig(source="release", root=str(out)))
    assert [s.name for s in read.detection_subsets] == sorted(s.name for s in source.detection_subsets)
    for split in SPLITS:
        ours, theirs = source.records("ct-liver-det", split), read.records("ct-liver-det", split)
        assert ours.records == theirs.records
        assert all(np.array_equal(ours.image(i), theirs.image(i)) for i in range(len(ours)))


def test_wrong_names_are_refused(source):
    with pytest.raises(DataError, match="validation"):
        source.records("ct-liver-det", "validation")
    with pytest.raises(DataError, match="'ct-eye-det' is not in the phantom world"):
        source.records("ct-eye-det", "train")
