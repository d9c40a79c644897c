"""Planted leaks are refused with the cell and the record; data without a leak passes, and is hashed once."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from medcg_jax.config import TABLES, ConfigError, DataConfig, RunConfig, replace
from medcg_jax.data.leaks import Leak, find_leaks, hashed
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.records import DataError, Record, RecordSet, Turn, concat
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design import suite
from medcg_jax.study.design.leaks import LeakGuard, check_cell, refuse
from medcg_jax.study.design.suite import Cell, Row
from medcg_jax.train.goodput import Goodput

TARGET, OTHER = "ct-liver-grade", "ct-liver-state"


def records(split: str, images, subset: str = "04") -> RecordSet:
    turn = (Turn("Which?", "A"),)
    return RecordSet(
        [Record(f"{subset}/{split}/{i}", subset, turn, ("a", "b"), "A", f"{i}.png") for i in range(len(images))], images
    )


def drawn(seed: int, number: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def source():
    return PhantomSource(3, 6, 6)


@pytest.fixture
def tree(clean_tree, tmp_path):
    return shutil.copytree(clean_tree, tmp_path / "tree")


def cell(arm="trained", related=(OTHER,), target=(TARGET,), row=Row("fixed_area", "x"), table="pairs") -> Cell:
    return Cell("pairs.x.s0", table, row, arm, 0, related, (4,) * len(related), target)


def leaks_of(training: RecordSet, test: RecordSet) -> list[Leak]:
    return find_leaks(hashed(training), hashed(test))


def test_sets_without_a_leak():
    assert leaks_of(records("train", drawn(0)), records("test", drawn(2))) == []


def test_every_leak_is_found_with_both_records():
    train, test = drawn(0), drawn(1)
    test[3] = train[2]
    test[1] = train[4]
    own, tests = records("train", train), records("test", test)
    wanted = [Leak("04/train/2", "04/test/3", "same bytes"), Leak("04/train/4", "04/test/1", "same bytes")]
    assert leaks_of(own, tests) == wanted
    # Also through sets that were chosen and joined, which hold references.
    others = records("train", drawn(2), "05")
    odd = RecordSet(others.records, [image[:3] for image in others.images])
    assert leaks_of(concat([odd, own]).select([9, 7]), concat([odd.select([0]), tests])) == wanted[::-1]
    # The same numbers in another shape are another image, and a record without one has none.
    assert leaks_of(records("train", drawn(0)), records("test", drawn(0).reshape(5, 6, 4, 3))) == []
    blank = RecordSet([dataclasses.replace(r, image="") for r in own.records], drawn(0))
    assert leaks_of(blank, records("test", drawn(0))) == []


def test_the_same_id_is_a_leak():
    found = leaks_of(records("test", drawn(0)), records("test", drawn(1)))
    assert found[0] == Leak("04/test/0", "04/test/0", "same id") and len(found) == 5


def test_every_cell_of_the_phantom_study_passes(source):
    run = replace(RunConfig(), study__tables=(*TABLES, "detection_pairs", "detection"), study__targets=(TARGET,))
    cells = suite.expand(replace(run, model__name="next_chat_tiny"), source.subsets, source.detection_subsets)
    guard = LeakGuard(source, drawn=True)
    assert [guard.findings(one) for one in cells] == [[]] * len(cells)
    assert {one.arm for one in cells} >= {"single_task", "multi_task", "efficiency_6", "all_data", "trained"}


def test_each_subset_is_hashed_once(source, monkeypatch):
    asked = []
    original = source.records
    monkeypatch.setattr(source, "records", lambda *of: asked.append(of) or original(*of))
    guard = LeakGuard(source)
    for _ in range(3):
        guard.findings(cell(related=(OTHER, "ct-skin-grade")))
    assert sorted(asked) == [(TARGET, "test"), (OTHER, "train"), ("ct-skin-grade", "train")]


def test_a_target_in_a_hand_made_cell_is_refused(source):
    planted = cell()
    object.__setattr__(planted, "related", (OTHER, TARGET))  # past the check that a Cell makes of itself
    with pytest.raises(ConfigError, match=f"^pairs.x.s0: its training set holds subset {TARGET}, which it is"):
        LeakGuard(source).findings(planted)


def test_another_subset_of_the_targets_triplet_is_refused(source):
    twin = dataclasses.replace(next(s for s in source.subsets if s.name == TARGET), name="twin")
    by_name = {s.name: s for s in (*source.subsets, twin)}
    with pytest.raises(ConfigError, match=f"^pairs.x.s0: .* twin, which has modality, area and task of .* {TARGET}"):
        check_cell(cell(related=(OTHER, "twin")), by_name)
    out = cell("single_task", ("twin",), row=Row("out_of_distribution", "twin"), table="multi_task")
    with pytest.raises(ConfigError, match="subset twin"):
        check_cell(out, by_name)
    for arm in ("single_task", "multi_task", "efficiency_10"):
        check_cell(cell(arm, (TARGET, "twin"), row=Row("in_distribution")), by_name)


def test_published_rows_are_let_through_as_they_are_printed():
    from medcg_jax.study.design.mat import paper_subsets

    subsets = paper_subsets()
    printed = dict(
        related=("28", "29"), target=("30",), row=Row("fixed_modality", "30", (3, 11))
    )  # 28, 30: X-ray, Lung, Diseases
    check_cell(cell(**printed), subsets)
    for change in (
        {"row": Row("fixed_modality", "30")},
        {"row": Row("fixed_modality", "30", (3, 1))},
        {"arm": "baseline_plus"},
    ):
        with pytest.raises(ConfigError, match="subset 28, which has modality, area and task of subset 30"):
            check_cell(cell(**printed | change), subsets)


def test_the_papers_own_split_is_let_through_out_of_distribution_alone():
    from medcg_jax.study.design.mat import paper_subsets

    subsets = paper_subsets()
    split = dict(related=("16",), target=("34",))  # both FP, Fundus, Level
    check_cell(cell("multi_task", row=Row("out_of_distribution"), **split), subsets)
    with pytest.raises(ConfigError, match="subset 16"):
        check_cell(cell("trained", **split), subsets)


@pytest.mark.parametrize("arm", ["trained", "multi_task", "efficiency_3"])
def test_a_test_image_copied_into_training_is_refused(tree, arm):
    sees = arm in ("single_task", "multi_task", "efficiency_3")
    own = TARGET if sees else OTHER
    planted = cell(arm, (own,), row=Row("in_distribution") if sees else Row("fixed_area", "x"))
    refuse(LeakGuard(ReleaseSource(tree, DataConfig())).findings(planted))

    path = tree / "Aggregated_Subsets" / f"Subset--{own}-train.json"
    raws = json.loads(path.read_text())
    test = json.loads((tree / "Aggregated_Subsets" / f"Subset--{TARGET}-test.json").read_text())[2]
    shutil.copy(tree / test["image"], tree / "med-mat" / "other name.png")
    raws.append(raws[0] | {"id": 777, "image": "med-mat/other name.png"})
    path.write_text(json.dumps(raws))
    with pytest.raises(DataError) as error:
        refuse(LeakGuard(ReleaseSource(tree, DataConfig())).findings(planted))
    message = str(error.value)
    assert message.startswith("pairs.x.s0: training record ") and "\n" not in message
    assert f"{own}/train/777 has the same image as test record {TARGET}/test/{test['id']}" in message


def test_a_link_to_a_test_image_is_the_same_image(tree):
    training = tree / "med-mat" / "phantom" / OTHER
    test = sorted((tree / "med-mat" / "phantom" / TARGET).glob("test-*.png"))[0]
    replaced = sorted(training.glob("train-*.png"))[1]
    replaced.unlink()
    replaced.symlink_to(test)
    with pytest.raises(DataError, match=f"{OTHER}/train/2 has the same image as test record {TARGET}/test/1"):
        refuse(LeakGuard(ReleaseSource(tree, DataConfig())).findings(cell()))


def test_an_image_that_is_gone_is_named(tree):
    source = ReleaseSource(tree, DataConfig())
    found = source.records(OTHER, "train")
    (tree / found.records[0].image).unlink()
    with pytest.raises(DataError, match="train-00001.png'?: No such file"):
        LeakGuard(source).findings(cell())


def test_a_grid_fails_the_leaking_cell_alone_and_names_both_records(tree, tmp_path):
    """The guard as the grid calls it, before anything is compiled or trained."""
    from medcg_jax.study.design.schedule import jobs_of
    from medcg_jax.study.run.jobs import Trainer

    test = json.loads((tree / "Aggregated_Subsets" / f"Subset--{TARGET}-test.json").read_text())[2]
    path = tree / "Aggregated_Subsets" / f"Subset--{OTHER}-train.json"
    raws = json.loads(path.read_text())
    path.write_text(json.dumps([*raws, raws[0] | {"id": 777, "image": test["image"]}]))
    run = replace(
        RunConfig(), data__source="release", data__root=str(tree), data__system_prompt="", train__batch_size=8,
        eval__batch_size=8,
    )  # fmt: skip
    trainer = Trainer(run, tmp_path / "w", Goodput())
    (job,) = jobs_of([cell()], run)
    waiting, ended = [job], {}
    trainer.run(
        None, 0, lambda: waiting.pop() if waiting else None,
        lambda job, outcome: ended.update({job.id: outcome["status"]}),
    )  # fmt: skip
    assert list(ended) == ["pairs.x.s0"]
    assert f"{OTHER}/train/777 has the same image as test record {TARGET}/test/{test['id']}" in ended["pairs.x.s0"]
    assert not list((tmp_path / "w").rglob("*.jsonl"))
