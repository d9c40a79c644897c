"""Planted copies and near copies of test images: found, refused, left out or listed, as the configuration says."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_grids import make_grid, quick, run_of

from medcg_jax.config import ConfigError, DataConfig, RunConfig, StudyConfig, replace
from medcg_jax.config_checks import check
from medcg_jax.data import leaks as data_leaks
from medcg_jax.data.duplicates import NEAR_BITS, hash_rows
from medcg_jax.data.leaks import Leak, find_leaks, hashed
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.records import DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design import leaks
from medcg_jax.study.design.schedule import Plan, jobs_of
from medcg_jax.study.design.suite import Cell, Row
from medcg_jax.study.report.page import write_report
from medcg_jax.study.run.grid import reproduce
from medcg_jax.study.run.jobs import SeedData, Trainer
from medcg_jax.study.stats import contamination
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.setup import open_setup

TARGET, OTHER, THIRD = "ct-liver-grade", "ct-liver-state", "ct-skin-grade"


def cell(target=TARGET, arm="trained", related=(OTHER,), count=4) -> Cell:
    return Cell(f"pairs.{target}.{arm}.s0", "pairs", Row("fixed_area", target), arm, 0, related,
                (count,) * len(related), (target,))  # fmt: skip


@pytest.fixture
def tree(clean_tree, tmp_path):
    """Training records 777 and 778 of `OTHER` have test images of `TARGET` as BMP and JPEG, 779 one of `THIRD`'s."""
    root = shutil.copytree(clean_tree, tmp_path / "tree")
    path = root / "Aggregated_Subsets" / f"Subset--{OTHER}-train.json"
    raws = json.loads(path.read_text())
    for number, (name, place, form, how) in enumerate(
        [(TARGET, 2, "bmp", {}), (TARGET, 1, "jpeg", {"quality": 60}), (THIRD, 0, "png", {})], 777
    ):
        test = json.loads((root / "Aggregated_Subsets" / f"Subset--{name}-test.json").read_text())[place]
        image = f"med-mat/copy {number}.{form}"
        if form == "png":
            shutil.copy(root / test["image"], root / image)
        else:
            Image.open(root / test["image"]).save(root / image, form, **how)
        raws.append(raws[0] | {"id": number, "image": image})
    path.write_text(json.dumps(raws))
    return root


def look(tree: Path, one: Cell, **study) -> list[tuple]:
    source = ReleaseSource(tree, DataConfig())
    found = leaks.LeakGuard(source, StudyConfig(**study), related=lambda number: {}).findings(one)
    return [(f.leak.kind, f.leak.training, f.leak.test, f.action) for f in found if f.leak.kind != "lineage"]


SAME = ("same pixels", f"{OTHER}/train/777", f"{TARGET}/test/3")
NEAR = ("near", f"{OTHER}/train/778", f"{TARGET}/test/2")


def test_a_copy_saved_anew_is_found_and_refused(tree):
    assert look(tree, cell()) == [(*SAME, "refused"), (*NEAR, "reported")]
    found = leaks.LeakGuard(ReleaseSource(tree, DataConfig())).findings(cell())
    with pytest.raises(DataError, match=f"{OTHER}/train/777 has the pixels of test record {TARGET}/test/3; "):
        leaks.refuse(found)
    assert 0 < found[1].leak.distance_bits <= NEAR_BITS == StudyConfig().near_duplicate_bits


@pytest.mark.parametrize("action", ["refuse", "drop", "report"])
def test_every_action_of_either_kind(tree, action):
    done = data_leaks.ACTIONS[action]
    found = look(tree, cell(), leaks=action, near_duplicates="off")
    assert found == []  # no image was decoded
    assert look(tree, cell(THIRD), leaks=action, near_duplicates="off") == [
        ("same bytes", f"{OTHER}/train/779", f"{THIRD}/test/1", done)
    ]
    assert look(tree, cell(), leaks=action, near_duplicates=action) == [(*SAME, done), (*NEAR, done)]
    assert look(tree, cell(), leaks=action, near_duplicate_bits=0) == [(*SAME, done)]
    # Another target's cell has none of these.
    assert look(tree, cell(THIRD), leaks=action) == [("same bytes", f"{OTHER}/train/779", f"{THIRD}/test/1", done)]


def test_a_near_image_is_refused_with_its_distance(tree):
    guard = leaks.LeakGuard(ReleaseSource(tree, DataConfig()), StudyConfig(leaks="drop", near_duplicates="refuse"))
    with pytest.raises(DataError, match=f"778 has an image nearly that of test record {TARGET}/test/2 .[0-9]+ of 256"):
        leaks.refuse(guard.findings(cell()))


def test_nothing_is_decoded_where_near_images_are_not_looked_for(tree, monkeypatch):
    monkeypatch.setattr(data_leaks, "image_hashes", lambda *of: pytest.fail("decoded"))
    look(tree, cell(), near_duplicates="off")
    phantoms = PhantomSource(5, 4, 4)
    assert leaks.LeakGuard(phantoms, StudyConfig(near_duplicates="refuse"), drawn=True).findings(cell()) == []


def test_each_image_is_decoded_once(tree, monkeypatch):
    decoded, original = [], data_leaks.image_hashes
    monkeypatch.setattr(
        data_leaks, "image_hashes", lambda image, digest: decoded.append(digest) or original(image, digest)
    )
    guard = leaks.LeakGuard(ReleaseSource(tree, DataConfig()))
    for one in (cell(), cell(THIRD), cell(), cell(related=(OTHER, "ct-brain-state"))):
        guard.findings(one)
    assert len(decoded) == len(set(decoded)) == 4 + 3 + 4 + 4 + 4 - 1  # 779 has the bytes of a test image


def test_phantoms_are_not_near_each_other():
    """Why a grid of phantoms does not look for near ones."""
    source, decoded = PhantomSource(1, 12, 12), {}
    for subset in source.subsets[::4]:
        parts = [hashed(source.records(subset.name, split), decoded) for split in ("train", "test")]
        assert find_leaks(*parts, NEAR_BITS) == []


def test_related_datasets_are_listed(clean_tree, tmp_path):
    root = shutil.copytree(clean_tree, tmp_path / "tree")
    for name, split, number in ((OTHER, "train", "53"), (TARGET, "test", "60"), (THIRD, "test", "53")):
        path = root / "Aggregated_Subsets" / f"Subset--{name}-{split}.json"
        path.write_text(json.dumps([raw | {"data-no": number} for raw in json.loads(path.read_text())]))
    related = {"53": {"60": "60 holds images of 53"}}
    guard = leaks.LeakGuard(ReleaseSource(root, DataConfig()), related=lambda number: related.get(number, {}))
    assert [(f.leak, f.action) for f in guard.findings(cell())] == [
        (Leak(f"{OTHER} data-no 53", f"{TARGET} data-no 60", "lineage"), "reported")
    ]
    assert [f.leak.test for f in guard.findings(cell(THIRD))] == [f"{THIRD} data-no 53"]
    assert guard.findings(cell("ct-brain-state")) == []


# --- in a grid


def in_grid(tree: Path, workdir: Path, cells, monkeypatch, **study):
    """({job: status}, {job: ids that it is trained on}) of the cells, as a grid starts them; nothing is trained."""
    run = replace(
        RunConfig(), data__source="release", data__root=str(tree), data__system_prompt="", train__batch_size=8,
        **{f"study__{name}": value for name, value in study.items()},
    )  # fmt: skip
    jobs = jobs_of(cells, run)
    waiting, trained, ended, original = list(jobs), {}, {}, SeedData.training

    def training(self, parts, without=frozenset(), **options):
        encoded = original(self, parts, without, **options)
        job = next(job for job in jobs if job.id not in ended)
        trained[job.id] = [record.id for record in encoded.records.records]
        raise DataError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(SeedData, "training", training)
        Trainer(run, workdir, Goodput()).run(
            None, 0, lambda: waiting.pop(0) if waiting else None,
            lambda job, outcome: ended.update({job.id: outcome["status"]}),
        )  # fmt: skip
    contamination.join(workdir, Plan(tuple(cells), tuple(jobs)))
    return ended, trained


def ids(*numbers) -> list[str]:
    return [f"{OTHER}/train/{number}" for number in numbers]


def test_what_leaks_is_left_out_of_the_training_and_of_no_other(tree, tmp_path, monkeypatch):
    related = (OTHER, "ct-brain-state")
    cells = [cell(count=7), cell("mri-liver-grade", related=related, count=7)]
    study = {"leaks": "drop", "near_duplicates": "drop"}
    ended, trained = in_grid(tree, tmp_path / "w", cells, monkeypatch, **study)
    assert set(ended.values()) == {"failed: enough"}
    assert trained[cells[0].id] == ids(1, 2, 3, 4, 779)
    brain = [f"ct-brain-state/train/{number}" for number in (1, 2, 3, 4)]
    assert trained[cells[1].id] == [*brain, *ids(1, 2, 3, 4, 777, 778, 779)]
    text = (tmp_path / "w" / "contamination.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [(r["cell"], r["kind"], r["training"], r["test"], r["action"]) for r in rows if r["kind"] != "lineage"] == [
        (cells[0].id, *SAME, "dropped"), (cells[0].id, *NEAR, "dropped")
    ]  # fmt: skip
    # Again, and in another order of jobs: the same bytes.
    in_grid(tree, tmp_path / "again", cells, monkeypatch, **study)
    assert (tmp_path / "again" / "contamination.csv").read_text() == text


def test_cells_of_one_training_lose_what_leaks_into_any_of_their_targets(tree, tmp_path, monkeypatch):
    cells = [cell(count=7), cell(THIRD, count=7)]
    ended, trained = in_grid(tree, tmp_path / "w", cells, monkeypatch, leaks="drop", near_duplicates="report")
    assert trained == {cells[0].id: ids(1, 2, 3, 4, 778)} and list(ended) == [cells[0].id]
    rows = contamination.read(tmp_path / "w")
    assert [(r["cell"], r["training"], r["action"]) for r in rows if r["kind"] != "lineage"] == [
        (cells[0].id, *ids(777), "dropped"), (cells[0].id, *ids(778), "reported"), (cells[1].id, *ids(779), "dropped")
    ]  # fmt: skip


def test_a_training_without_a_record_left_fails(tree, tmp_path):
    run = replace(RunConfig(), data__source="release", data__root=str(tree), data__system_prompt="")
    data = SeedData(open_setup(run))
    every = data.taken([(OTHER, 3)])[OTHER]
    assert len(every) == 3 and len(data.training([(OTHER, 3)])) == 3
    assert len(data.training([(OTHER, 3)], frozenset(sorted(every)[:1]))) == 2
    assert len(data.training([(OTHER, 3)])) == 3
    assert len(data.training([(OTHER, 3), (THIRD, 2)], every)) == 2
    with pytest.raises(DataError, match=f"no training record of {OTHER} is left"):
        data.training([(OTHER, 3)], every)


def test_what_a_cell_does_not_take_is_not_listed_but_still_refused(tree):
    found = leaks.LeakGuard(ReleaseSource(tree, DataConfig()), StudyConfig(near_duplicates="drop")).findings(cell())
    taken = {OTHER: frozenset(ids(1, 2))}
    assert [one.action for one in leaks.relevant(found, taken) if one.leak.kind != "lineage"] == ["refused"]
    taken = {OTHER: frozenset(ids(1, 778))}
    assert leaks.dropped(leaks.relevant(found, taken)) == set(ids(778))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("leaks", "off", "study.leaks='off': expected one of refuse, drop, report"),
        ("near_duplicates", "yes", "study.near_duplicates='yes': expected one of off, refuse, drop, report"),
        ("near_duplicate_bits", 41, "study.near_duplicate_bits=41: expected 0 to 40"),
        ("near_duplicate_bits", -1, "study.near_duplicate_bits=-1: expected 0 to 40"),
    ],
)
def test_other_values_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(RunConfig(), **{f"study__{field}": value}))


# --- on the page


def test_the_report_has_a_table_where_something_was_found_and_none_elsewhere(tmp_path):
    with quick():
        workdir = make_grid(tmp_path / "w", run_of(study__targets=(TARGET,)))
        page = write_report(workdir)
        before = page.read_text()
        assert "Contamination" not in before and not (page.parent / "tables" / "contamination.csv").exists()
        name = next(workdir.glob("predictions/*trained*")).stem
        findings = [
            leaks.Finding(name, Leak("a/train/1", "b/test/2", "same pixels"), "dropped"),
            leaks.Finding(name, Leak("a/train/<3>", "b/test/4", "near", 6), "reported"),
            leaks.Finding(name, Leak("a/train/5", "b/test/5", "near", 2, "mirrored"), "reported"),
            leaks.Finding(name, Leak("a data-no 1", "b data-no 2", "lineage"), "reported"),
            leaks.Finding(name, Leak("a/train/6", "b/test/6", "same group"), "reported"),
            leaks.Finding(name, Leak("a/train/7", "b/test/6", "likely same group"), "reported"),
            leaks.Finding(name, Leak("general/train/8", "b/test/6", "same question"), "refused"),
        ]
        contamination.write_findings(workdir, "job", findings)
        (workdir / "contamination.csv").write_text((workdir / "contamination" / "job.csv").read_text())
        text = write_report(workdir).read_text()
        assert "a/train/&lt;3&gt; and b/test/4: near (6 bits); a/train/5 and b/test/5: near, mirrored (2 bits)" in text
        assert "1 cell of" in text
        for words in (
            "on images that are in",
            "on patients or lesions that are in",
            "as their names say, in their test",
        ):
            assert words in text
        assert "on questions of their test set" not in text  # refused, and so not trained on
        (row,) = csv.DictReader((page.parent / "tables" / "contamination.csv").read_text().splitlines())
        columns = ("exact", "near", "changed", "group", "likely_group", "question", "dropped", "refused", "lineage")
        assert row["cell"] == name and [row[key] for key in columns] == list("121111111")
        # A file without a finding says nothing on the page.
        (workdir / "contamination.csv").write_text(",".join(contamination.HEADER) + "\n")
        assert write_report(workdir).read_text() == before


def test_prints_of_files_are_those_of_pixels(tree):
    source = ReleaseSource(tree, DataConfig())
    held = source.records(TARGET, "test")
    own = hashed(held, {})
    assert all(len(image.perceptual) == 32 for image in own.images)
    assert np.array_equal(hash_rows(own.images)[0], np.arange(len(held)))


@pytest.mark.long
def test_a_grid_that_is_started_again_ends_in_the_same_bytes(tree, tmp_path):
    """From the tree to the page: what leaks is left out, listed and shown, also when a job is done twice."""
    run = replace(
        RunConfig(), data__source="release", data__root=str(tree), data__system_prompt="", data__max_text_tokens=96,
        base__epochs=0.0, train__epochs=1.0, train__batch_size=8, eval__batch_size=8, eval__generate=False,
        study__tables=("ablation",), study__targets=(TARGET,), study__arms=("wo_task", "all_related", "baseline"),
        study__leaks="drop",
    )  # fmt: skip
    workdir = tmp_path / "w"
    result = reproduce(run, workdir)
    assert result["exit_status"] == 0, result
    before = (workdir / "contamination.csv").read_bytes()
    rows = contamination.read(workdir)
    assert {(r["kind"], r["training"], r["test"], r["action"]) for r in rows if r["kind"] != "lineage"} == {
        (*SAME, "dropped"), (*NEAR, "reported")
    }  # fmt: skip
    assert "Contamination" in Path(result["page"]).read_text()
    # Every question once more beside another image, the answer by its letters alone.
    for path in workdir.glob("predictions/*.jsonl"):
        lines = [json.loads(line) for line in (workdir / "controls" / path.name).read_text().splitlines()]
        assert {(line["control"], line["generated"]) for line in lines} == {("shuffled_images", None)}
        assert [line["id"] for line in lines] == [json.loads(line)["id"] for line in path.read_text().splitlines()]
    for name in {row["cell"] for row in rows}:
        for path in (*workdir.glob(f"state/done/{name}.json"), *workdir.glob(f"contamination/{name}.csv")):
            path.unlink()
    (workdir / "contamination.csv").unlink()
    assert reproduce(run, workdir)["exit_status"] == 0
    assert (workdir / "contamination.csv").read_bytes() == before
