"""The command line as its user meets it: verbs end to end on a tiny run, and one clear line for what cannot be done."""

import json
import time
from pathlib import Path

import pytest

from medcg_jax.cli import main, parse

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = [
    f"--config={CONFIGS / 'phantom.py'}:tiny",
    "--config.data.subsets=ct-brain-state,mri-brain-grade",
    "--config.train.steps=4",
    "--config.train.batch_size=8",
    "--config.train.checkpoint_every_steps=2",
    "--config.eval.batch_size=8",
]


def test_train_saves_goes_on_and_is_tested(tmp_path, capfd):
    workdir = f"--workdir={tmp_path / 'run'}"
    found = tmp_path / "found.json"
    assert main(["train", *TINY, "--config.train.epochs=1", workdir, f"--json={found}"]) == 0
    out = capfd.readouterr().out
    assert "model.checkpoint is empty: llava15_tiny starts from random weights" in out and "XLA flags" not in out
    assert f"`medcg eval` with the same config and --workdir={tmp_path / 'run'} scores them" in out
    first = json.loads(found.read_text())
    assert first["steps"] == 4 and first["records"] == 32
    params = {p.name: p.read_bytes() for p in (tmp_path / "run" / "params").glob("m*.json")}
    assert main(["train", *TINY, "--config.train.epochs=1", "--config.train.log_every_steps=1", workdir]) == 0
    assert "going on from step 4 of 4" in capfd.readouterr().out
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "params").glob("m*.json")} == params

    assert main(["eval", *TINY, workdir, f"--json={found}"]) == 0
    subsets = json.loads(found.read_text())["subsets"]
    assert sorted(subsets) == ["ct-brain-state", "mri-brain-grade"]
    told = []
    for name, scores in subsets.items():
        lines = (tmp_path / "run" / "predictions" / f"{name}.jsonl").read_text().splitlines()
        right = sum(json.loads(line)["predicted"] == json.loads(line)["answer"] for line in lines)
        assert (len(lines), right) == (scores["n"], scores["correct"]) == (8, right)
        assert scores["ci_low"] <= scores["accuracy"] <= scores["ci_high"]
        chance, majority = f"{scores['chance']:.3f}", f"{scores['majority']:.3f}"
        labels = [json.loads(line)["options"]["ABCDEFGHIJ".index(json.loads(line)["answer"])] for line in lines]
        assert majority == f"{max(map(labels.count, labels)) / 8:.3f}" and 0.1 <= scores["chance"] <= 0.5
        told.append(f"{right} of 8 right, {scores['accuracy']:.3f} [")
        told.append(f"chance {chance}, the most frequent label {majority}; probability of the letters")
    out = capfd.readouterr().out
    assert all(text in out for text in told)
    assert out.splitlines()[-1] == f"every answer: {tmp_path / 'run' / 'predictions'}" and "trained with" not in out

    # Other data are told; another prompt is another run's.
    assert main(["eval", *TINY, workdir, "--config.data.seed=5", "--config.data.subsets=ct-brain-state"]) == 0
    out = capfd.readouterr().out
    assert "trained with data.seed=0, tested with 5" in out and "trained with data.subsets=" in out
    assert main(["eval", *TINY, workdir, "--config.data.system_prompt=vicuna"]) == 2
    assert "was trained with data.system_prompt='', not 'vicuna'" in capfd.readouterr().err


def test_another_run_s_checkpoints_are_not_gone_on_from(tmp_path, capfd):
    workdir = f"--workdir={tmp_path}"
    assert main(["train", *TINY, "--config.train.steps=2", workdir]) == 0
    assert main(["train", *TINY, "--config.train.steps=2", "--config.train.learning_rate=0.5", workdir]) == 2
    error = capfd.readouterr().err
    assert "another run's" in error and f"--config.model.checkpoint={tmp_path / 'params'}" in error


RELEASED = f"--config={CONFIGS / 'llava15_7b.py'}"
MINI = f"--config={CONFIGS / 'medmat_mini.py'}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "VERB"),
        (["data", "ledger", f"{CONFIGS / 'phantom.py'}"], "no such folder"),
        (["trane"], "invalid choice: 'trane'"),
        (["train"], "--config"),
        (["train", RELEASED, "--confg.a=1"], "--confg.a=1 is not known to `medcg train`"),
        (["train", RELEASED, "--config.train.steps"], "has no value"),
        (["train", RELEASED, "--config.train.stesp=1"], "did you mean config.train.steps?"),
        (["train", RELEASED], "there are no weights; fetch llava-hf/llava-1.5-7b-hf"),
        (["train", *TINY, "--config.mesh.fsdp=3"], "needs a multiple of 3 devices; there are 8"),
        (["train", *TINY, "--config.train.batch_size=12"], "cannot be split over data x fsdp = 8"),
        (["train", *TINY, "--config.data.subsets=ct-brain-stat"], "did you mean ct-brain-state"),
        (["reproduce", *TINY, "--config.study.targets=ct-brain"], "subset 'ct-brain' does not exist"),
        (["reproduce", MINI], "data.root"),
        (["eval", *TINY, "--workdir=/nonexistent/dir"], "params is missing and model.checkpoint is empty"),
        (["report", "/nonexistent/dir"], "/nonexistent/dir"),
        (["data", "check", "/nonexistent/dir"], "/nonexistent/dir"),
        (["convert", "/nonexistent/dir", "/nonexistent/out"], "/nonexistent/dir"),
        (["parity", "/nonexistent/dir"], "/nonexistent/dir"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(argv, message, capfd):
    began = time.monotonic()
    assert main(argv) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("medcg: ")
    assert time.monotonic() - began < 60


def test_the_phantom_world_is_written_once_and_found_sound(tmp_path, capfd):
    out = tmp_path / "world"
    assert main(["data", "phantom", str(out), "--train=4", "--test=4"]) == 0
    assert main(["data", "check", str(out)]) == 0
    assert main(["data", "phantom", str(out), "--train=4", "--test=4"]) == 2
    assert "exists" in capfd.readouterr().err


def test_dry_lists_every_cell_and_leaves_nothing(tmp_path, capfd):
    found = tmp_path / "dry.json"
    assert main(["reproduce", *TINY, "--dry", f"--workdir={tmp_path / 'w'}", f"--json={found}"]) == 0
    listed = json.loads(found.read_text())
    assert len(listed["cells"]) == capfd.readouterr().out.count(" steps") - 2 and listed["trainings"] > 0
    assert not (tmp_path / "w").exists()


@pytest.mark.long
def test_boxes_then_masks_are_trained_and_scored(tmp_path, capfd):
    few = [
        "--config.data.subsets=ct-brain-det,mri-brain-det", "--config.data.train_records_per_subset=8",
        "--config.data.test_records_per_subset=4", "--config.train.steps=2", "--config.train.batch_size=8",
        "--config.eval.batch_size=8", "--config.eval.max_box_tokens=6", "--config.model.scan_unroll=1",
    ]  # fmt: skip
    boxes, masks = tmp_path / "boxes", tmp_path / "masks"
    config, found = f"--config={CONFIGS / 'next_chat_masks.py'}", tmp_path / "found.json"
    assert main(["train", f"{config}:boxes", *few, f"--workdir={boxes}"]) == 0
    start = f"--config.model.checkpoint={boxes / 'params'}"
    assert main(["train", f"{config}:masks", *few, start, f"--workdir={masks}"]) == 0
    assert main(["eval", f"{config}:masks", *few, f"--workdir={masks}", f"--json={found}"]) == 0
    scores = json.loads(found.read_text())["subsets"]
    assert sorted(scores) == ["ct-brain-det", "mri-brain-det"] and scores["ct-brain-det"]["questions"] == 4
    assert scores["ct-brain-det"]["n"] == 7 and 0 <= scores["ct-brain-det"]["dice"] <= 1
    answers = (masks / "boxes" / "ct-brain-det.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answers] == [f"ct-brain-det/test/{i}" for i in range(1, 5)]
    assert not (masks / "predictions").exists() and "of 7 boxes found" in capfd.readouterr().out
    # Without masks in the data there is nothing to learn from, and nothing is left behind.
    assert main(["data", "phantom", str(tmp_path / "tree"), "--train=8", "--test=4"]) == 0
    tree = ["--config.data.source=release", f"--config.data.root={tmp_path / 'tree'}"]
    assert main(["train", f"{config}:masks", *few, *tree, start, f"--workdir={tmp_path / 'none'}"]) == 2
    assert "record ct-brain-det/train/1: it has boxes and no masks" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["train", f"{config}:masks", *few, start, "--config.model.trainable=mask_prompt,decoder"]) == 2
    assert "are trained by themselves" in capfd.readouterr().err


FLAGS = ("--config.study.cells_at_once=0", "--config.eval.batch_size=8")
AS_FIT = ("reproduce", "--config=configs/phantom.py:tiny", *FLAGS)


def test_as_many_cells_as_fit(monkeypatch, capsys, tmp_path):
    from medcg_jax.plan import programs
    from medcg_jax.study.run import grid

    seen = []
    monkeypatch.setattr(grid, "reproduce", lambda run, workdir: seen.append(run.study.cells_at_once) or {})
    args = [*AS_FIT, f"--workdir={tmp_path}/w"]
    for fitting, status in ((6, 0), (0, 3)):
        found = programs.FittingCells(fitting, {2: 1e9, 6: 3e9}, 4e9)
        monkeypatch.setattr(programs, "fitting_run", lambda run, where, num_groups, found=found: found)
        assert main(args) == status
    assert seen == [6] and "6 cells fit local in 1 groups" in capsys.readouterr().out
    assert main([*args, "--config.study.models=('llava15_tiny', 'qwen2_vl_tiny')"]) == 2
    assert "several models" in capsys.readouterr().err


def test_without_a_known_memory_nothing_is_guessed(capsys, tmp_path):
    args = [*AS_FIT, f"--workdir={tmp_path}/w"]
    assert main(args) == 2
    assert "memory of cpu is not known" in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config=configs/phantom.py:tiny", "--workdir=~nosuch/x"],
        ["train", "--config=~nosuch/x.py"],
        ["train", "--config=configs/phantom.py:tiny", "--json", "~nosuch/x.json"],
        ["train", "--config=configs/phantom.py:tiny", "--config.model.checkpoint=~nosuch/x"],
        ["convert", "~nosuch/a", "b"],
        ["convert", "a", "b", "--clip=~nosuch/c"],
        ["report", "a", "~nosuch/b"],
        ["report", "a", "b", "--out=~nosuch/b"],
        ["data", "check", "~nosuch/tree"],
    ],
)
def test_a_home_folder_that_is_not_there_is_refused(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert main(argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no home folder is known for ~nosuch" in line
    assert not Path("~nosuch").exists()


def test_paths_start_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse(["report", "~/a", "~/b", "c", "--out=~/d", "--json=~/e"])
    assert (args.dir, args.other, args.out) == (f"{tmp_path}/a", [f"{tmp_path}/b", "c"], f"{tmp_path}/d")
    assert args.json == f"{tmp_path}/e"


def test_without_a_home_folder_no_programs_are_kept(monkeypatch, capsys):
    from medcg_jax.train import log

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    kept = []
    monkeypatch.setattr(log.Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(log, "enable_cache", kept.append)
    monkeypatch.setattr(
        log, "jax", type("Jax", (), {"config": type("Config", (), {"jax_compilation_cache_dir": None})})
    )
    log.keep_programs()
    [line] = capsys.readouterr().err.splitlines()
    assert "no home folder" in line and not kept
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    log.keep_programs()
    assert kept == [Path("/caches/medcg_jax/xla")]
