"""The phantom world: deterministic, balanced, tests apart from all training, boxes around lesions, read from files."""

import hashlib
import time
from collections import Counter

import numpy as np
import pytest

from medcg_jax.config import DataConfig
from medcg_jax.data import boxes
from medcg_jax.data.check import check_tree
from medcg_jax.data.phantom import pretraining, world
from medcg_jax.data.phantom import source as phantom
from medcg_jax.data.phantom.images import LANDMARKS, MAX_LESIONS, _objects, draw_scene, lesion_masks, render
from medcg_jax.data.phantom.pretraining import pretraining_fingerprint, pretraining_records, reading_words
from medcg_jax.data.phantom.source import DETECTION_TRIPLETS, PhantomSource, write_release
from medcg_jax.data.phantom.world import AREAS, CELLS, MODALITIES, TASKS, TRIPLETS, Draws
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
    wanted = [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    for target in TRIPLETS:
        found = Counter(shared(target, other) for other in TRIPLETS)
        assert all(found[tuple(map(bool, pattern))] for pattern in wanted), target
    assert len(set(TRIPLETS)) == 32
    assert [set(values) for values in zip(*TRIPLETS, strict=True)] == [set(MODALITIES), set(AREAS), set(TASKS)]


def test_targets_of_tuning_and_of_reports_are_apart():
    names = {t.name for t in TRIPLETS}
    tune, report = set(world.TUNE_TARGETS), set(world.REPORT_TARGETS)
    assert tune <= names and report <= names and not tune & report and len(report) == 8
    assert Counter(name.split("-")[2] for name in report) == dict.fromkeys(TASKS, 2)
    assert {name.split("-")[0] for name in report} == set(MODALITIES)


def test_same_seed_same_records_whatever_the_order_and_number():
    first, second = PhantomSource(5, 16, 8), PhantomSource(5, 8, 8)
    names = ["ct-brain-state", "oct-skin-grade", "microscopy-lung-cancer"]
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
    assert len(set(prints)) == 4 and PhantomSource(1, 8, 8).fingerprint() == prints[0]
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
    letters = Counter(r.answer for s in TRIPLETS for r in source.records(s.name, "train").records if s.task == "grade")
    assert set(letters) == set("ABCD") and max(letters.values()) < 2 * min(letters.values())


def test_a_record_reads_as_in_the_release(source):
    record = source.records("photo-eye-grade", "test").records[2]
    (turn,) = record.turns
    first, *options = turn.question.split("\n")
    assert "photo" in first and "eye" in first and "grade" in first
    assert options == [f"{letter}: {text}" for letter, text in zip("ABCD", record.options, strict=True)]
    assert turn.answer == record.answer and record.label == "moderate" and record.id == "photo-eye-grade/test/3"


def test_the_label_is_in_the_scene(source):
    for task, lookup in {
        "state": lambda s: np.where(s.count > 0, 1, 0),
        "cancer": lambda s: s.shape,
        "stage": lambda s: s.size,
        "grade": lambda s: s.count,
    }.items():
        for triplet in (t for t in TRIPLETS if t.task == task):
            scene = source.scene(triplet.name, "test")
            labels = [TASKS[task][k] for k in lookup(scene)]
            assert labels == [record.label for record in source.records(triplet.name, "test").records]
            assert (scene.count > 0).all() or task in ("state", "grade")


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
    area = np.arange(4)
    scene = draw_scene(
        draws(), modality=np.zeros(4, int), area=area, count=np.ones(4, int), shape=area % 2, size=area % 2, test=False
    )
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


def test_lesions_keep_off_landmarks_and_each_other(source):
    for triplet in TRIPLETS:
        scene = source.scene(triplet.name, "train")
        own = LANDMARKS[triplet.area][2]
        assert not np.isin(scene.site[:, :MAX_LESIONS], own).any() and np.isin(scene.site[:, MAX_LESIONS], own).all()
        assert all(len(set(row)) == MAX_LESIONS + 1 for row in scene.site.tolist())


def said(turns):
    return set(
        " ".join(turn.question + " " + turn.answer for turn in turns)
        .lower()
        .replace(":", " ")
        .replace("?", " ")
        .replace(".", " ")
        .split()
    )


TASK_WORDS = {*TASKS, *(label for labels in TASKS.values() for label in labels)}


def test_pretraining_never_says_a_task_or_a_label():
    records = pretraining_records(4, 2000).records
    assert not set().union(*(said(record.turns) for record in records)) & TASK_WORDS
    assert not {word.lower() for word in reading_words()} & TASK_WORDS and len(set(reading_words())) == len(
        reading_words()
    )


def test_pretraining_asks_what_the_image_shows():
    made = pretraining_records(4, 2000)
    options = Counter(len(turn.question.split("\n")) - 1 for record in made.records for turn in record.turns)
    assert set(options) == {0, 2, 3, 4}
    for record in made.records:
        choices = [turn for turn in record.turns if "\n" in turn.question]
        assert len(choices) == (2 if record.image else 4) or "none" in said(record.turns) or "no" in said(record.turns)
        for turn in choices:
            first, *listed = turn.question.split("\n")
            right = listed[LETTERS.index(turn.answer)].split(": ")[1]
            if not record.image:
                assert first == f"Pick {right}."
            elif record.turns[0].question == world.DESCRIBE and first not in ("Any object?",):
                assert right in record.turns[0].answer.split() or first == "Which area?"
    captions = {t.answer for r in made.records for t in r.turns if t.question == world.DESCRIBE}
    assert {f"{m} {AREAS[0]}" for m in MODALITIES} & captions and "none" in captions
    assert 0.28 < np.mean([not record.image for record in made.records]) < 0.38


def test_written_tree_reads_back_the_same(source, tmp_path):
    out = tmp_path / "tree"
    assert write_release(source, out) == {"subsets": 48, "records": 48 * 36}
    assert [path.name for path in tmp_path.iterdir()] == ["tree"] and check_tree(out).ok
    read = ReleaseSource(out, DataConfig(source="release", root=str(out)))
    assert {(s.name, s.modality, s.area, s.task) for s in read.subsets} == {(t.name, *t) for t in TRIPLETS}
    assert [s.name for s in read.detection_subsets] == sorted(s.name for s in source.detection_subsets)
    for name in ("ct-brain-state", "ultrasound-bone-cancer", "oct-skin-grade", "ct-liver-det"):
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


def test_open_source_takes_seed_and_sizes_from_the_configuration():
    found = open_source(DataConfig(seed=9, train_records_per_subset=8, test_records_per_subset=4))
    assert found.fingerprint() == PhantomSource(9, 8, 4).fingerprint()
    assert {(s.num_train, s.num_test) for s in found.subsets} == {(8, 4)}


def test_a_thousand_images_are_quick():
    began = time.process_time()
    PhantomSource(0, 1000).records("mri-liver-stage", "train")
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
    source = PhantomSource(1, 30, 6)
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
