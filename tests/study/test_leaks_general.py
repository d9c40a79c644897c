"""General records and patients that give tests away, in a grid and in `medcg train`: refused, left out, listed."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from record_sets import PhantomsWithFourOptions

from medcg_jax.cli import main
from medcg_jax.config import DataConfig, RunConfig, StudyConfig, replace
from medcg_jax.data.general import GeneralRecords
from medcg_jax.data.leaks import Leak
from medcg_jax.data.records import DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design.leaks import Finding, LeakGuard, dropped, refuse, relevant
from medcg_jax.study.design.suite import Cell, Row
from medcg_jax.study.run.jobs import SeedData
from medcg_jax.train.run import left_out
from medcg_jax.train.setup import open_setup

CONFIGS = Path(__file__).parents[2] / "configs"
TARGET, OTHER = PhantomsWithFourOptions.FOUR, "ct-liver-state"
SOURCE = PhantomsWithFourOptions(5, 4, 4)
CLEAN = {
    "id": 9, "caption": "", "image": "", "Question": "Which?", "Answer": "no", "data-no": "",
    "Question-choice": "Which?\nA: no\nB: yes\nC: one\nD: two", "Answer-choice": "A",
}  # fmt: skip


def cell(related=(OTHER,), target=TARGET, arm="trained") -> Cell:
    return Cell("pairs.x.s0", "pairs", Row("fixed_area", "x"), arm, 0, related, (4,) * len(related), (target,))


@pytest.fixture
def general(tmp_path, clean_tree) -> Path:
    """A file of general records: 1 is a test question, 2 has a test image saved anew, 3 one as JPEG, 9 is clean."""
    folder = tmp_path / "general"
    folder.mkdir()
    tests = json.loads((clean_tree / "Aggregated_Subsets" / f"Subset--{TARGET}-test.json").read_text())
    raws = [CLEAN | {key: tests[0][key] for key in ("Question-choice", "Answer", "Answer-choice")} | {"id": 1}]
    for number, form in ((2, "png"), (3, "jpeg")):
        options = {"compress_level": 0} if form == "png" else {"quality": 80}
        Image.open(clean_tree / tests[number]["image"]).save(folder / f"{number}.{form}", **options)
        raws.append(CLEAN | {"id": number, "image": f"{number}.{form}"})
    (folder / "general.json").write_text(json.dumps([*raws, CLEAN]))
    return folder / "general.json"


def source_of(kind: str, tree: Path):
    return SOURCE if kind == "drawn" else ReleaseSource(tree, DataConfig())


def look(guard: LeakGuard, one: Cell) -> list[Finding]:
    """What is found but for data sets: all phantoms are of one."""
    return [found for found in guard.findings(one) if found.leak.kind != "lineage"]


def guard_of(kind: str, tree: Path, general: Path, **study) -> LeakGuard:
    records = GeneralRecords(DataConfig(imagewikiqa_share=0.5, general_records=str(general))).records
    return LeakGuard(
        source_of(kind, tree), StudyConfig(**study), drawn=kind == "drawn", related=lambda number: {}, general=records
    )


@pytest.mark.parametrize("kind", ["drawn", "files"])
def test_test_questions_and_images_among_general_records_are_found(kind, clean_tree, general):
    found = look(guard_of(kind, clean_tree, general), cell())
    assert [(f.leak.kind, f.leak.training, f.leak.test, f.action) for f in found] == [
        ("same pixels", "general/train/2", f"{TARGET}/test/3", "refused"),
        ("same question", "general/train/1", f"{TARGET}/test/1", "refused"),
        ("near", "general/train/3", f"{TARGET}/test/4", "refused"),
    ]
    with pytest.raises(
        DataError, match="^pairs.x.s0: training record general/train/2 has the pixels of .* take it out"
    ):
        refuse(found)
    # Where near images are not looked for, nothing is decoded; questions are compared.
    found = look(guard_of("files", clean_tree, general, near_duplicates="off"), cell())
    assert [f.leak.kind for f in found] == ["same question"]


def test_other_cells_and_the_base_are_not_touched(clean_tree, general):
    guard = guard_of("files", clean_tree, general)
    assert look(guard, cell(target="ct-brain-stage")) == []
    assert look(guard, cell(related=(), arm="baseline")) == []


def test_clean_general_records_pass(clean_tree, general):
    general.write_text(json.dumps([CLEAN | {"id": i} for i in range(4)]))
    assert look(guard_of("files", clean_tree, general), cell()) == []


@pytest.mark.parametrize(("leaks", "action"), [("drop", "dropped"), ("report", "reported")])
def test_what_the_study_says_is_done(clean_tree, general, leaks, action):
    found = look(guard_of("files", clean_tree, general, leaks=leaks), cell())
    assert [f.action for f in found] == [action] * 3
    refuse(found)
    # Those that a training has not drawn are not listed.
    assert [f.leak.training for f in relevant(found, {"": frozenset(["general/train/1"])})] == ["general/train/1"]
    wanted = {f"general/train/{i}" for i in (1, 2, 3)}
    assert dropped(found) == (wanted if leaks == "drop" else set())


def test_a_training_goes_without_them(clean_tree, general):
    run = replace(
        RunConfig(), data__source="release", data__root=str(clean_tree), data__system_prompt="",
        data__imagewikiqa_share=0.99, data__general_records=str(general), data__max_text_tokens=96,
    )  # fmt: skip
    data = SeedData(open_setup(run))
    parts = [(OTHER, 4)]
    drawn = [record.id for record in data.general(parts).records]
    assert sorted(drawn) == [f"general/train/{i}" for i in (1, 2, 3, 9)]
    encoded = data.training(parts, frozenset(drawn[:3]))
    assert [record.id for record in encoded.records.records[4:]] == drawn[3:] and len(encoded) == 5
    assert len(data.training(parts, frozenset(drawn))) == 4


# --- patients


def with_patients(tree: Path, folder: Path, training: str, test: str, *, name=OTHER) -> Path:
    """The tree, where the first training record of a subset and the first test record of the target say a patient."""
    root = shutil.copytree(tree, folder / "tree")
    for subset, split, group in ((name, "train", training), (TARGET, "test", test)):
        path = root / "Aggregated_Subsets" / f"Subset--{subset}-{split}.json"
        raws = json.loads(path.read_text())
        raws[0] |= {"group": group, "data-no": "301"}
        path.write_text(json.dumps(raws))
    return root


@pytest.mark.parametrize("name", [OTHER, TARGET])
def test_a_patient_in_training_and_test_is_refused(clean_tree, tmp_path, name):
    root = with_patients(clean_tree, tmp_path, "p7", "p7", name=name)
    arm, row = ("efficiency_4", Row("target_only", "x")) if name == TARGET else ("trained", Row("fixed_area", "x"))
    planted = Cell("c", "efficiency", row, arm, 0, (name,), (4,), (TARGET,))
    found = look(LeakGuard(ReleaseSource(root, DataConfig()), related=lambda number: {}), planted)
    assert found[0].leak == Leak(f"{name}/train/1", f"{TARGET}/test/1", "same group")
    with pytest.raises(DataError, match="has the patient or lesion .`group`. of test record"):
        refuse(found)
    found = look(LeakGuard(ReleaseSource(root, DataConfig()), StudyConfig(leaks="drop")), planted)
    assert dropped(found) == {f"{name}/train/1"}


def test_another_patient_passes(clean_tree, tmp_path):
    root = with_patients(clean_tree, tmp_path, "p7", "p8")
    found = look(LeakGuard(ReleaseSource(root, DataConfig()), related=lambda number: {}), cell())
    assert found == []


# --- medcg train


def train_argv(tree: Path, workdir: Path, *more: str) -> list[str]:
    return [
        "train", f"--config={CONFIGS / 'phantom.py'}:tiny", "--config.data.source=release",
        f"--config.data.root={tree}", f"--config.data.subsets={OTHER},{TARGET}", "--config.train.batch_size=8",
        "--config.eval.batch_size=8", "--config.data.max_text_tokens=96", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def test_medcg_train_refuses_what_gives_its_tests_away(clean_tree, general, tmp_path, capsys):
    root = with_patients(clean_tree, tmp_path, "p7", "p7")
    mixed = ["--config.data.imagewikiqa_share=0.3", f"--config.data.general_records={general}"]
    for tree, more, message in (
        (
            root,
            [],
            f"training record {OTHER}/train/1 has the patient or lesion (`group`) of test record {TARGET}/test/1",
        ),
        (clean_tree, mixed, "training record general/train/"),
    ):
        assert main(train_argv(tree, tmp_path / "w", *more)) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "study.leaks=drop" in error and "\n" not in error
        assert not (tmp_path / "w" / "metrics").exists()


def test_what_a_run_leaves_out_and_reports_is_told(clean_tree, general, tmp_path, capsys):
    root = with_patients(clean_tree, tmp_path, "p7", "p7")
    source = ReleaseSource(root, DataConfig())
    records = GeneralRecords(DataConfig(imagewikiqa_share=0.5, general_records=str(general))).records
    run = replace(RunConfig(), data__source="release", study__leaks="drop")
    wanted = {f"{OTHER}/train/1", *(f"general/train/{i}" for i in (1, 2, 3))}
    assert left_out(run, source, (OTHER, TARGET), records) == wanted
    assert "dropped: 1 training records that give a test away, as training record" in capsys.readouterr().out
    run = replace(run, study__leaks="report")
    assert left_out(run, source, (OTHER, TARGET), records) == frozenset()
    assert capsys.readouterr().out.count("reported: 1 training records") == 4
    assert left_out(run, ReleaseSource(clean_tree, DataConfig()), (OTHER, TARGET), None) == frozenset()
    assert capsys.readouterr().out == ""
