"""Wrong paths of every verb: told in one line, before anything slow is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trees import write_tree

from medcg_jax.cli import main
from medcg_jax.config import ConfigError, ModelConfig, RunConfig, replace
from medcg_jax.data.records import DataError
from medcg_jax.data.sources import check_root, open_source
from medcg_jax.eval import trained_with
from medcg_jax.families.weights.convert import open_checkpoint
from medcg_jax.families.weights.hub import resolve
from medcg_jax.families.weights.kind import check_family, family_in
from medcg_jax.train.meta import training_config

ROOT = Path(__file__).parents[1]
PHANTOM = f"--config={ROOT}/configs/phantom.py:tiny"
TREE = "--config.data.source=release"
# Seconds of CPU from the start of a process to its refusal, on a machine that has nothing else to do.
MOST_S = 3.0
CASES = {
    "report, nothing there": (["report", "none"], "none: no such folder; expected the workdir of a grid"),
    "report, a training": (["report", "trained"], "`medcg eval --config=FILE.py --workdir=trained` scores it"),
    "report, a folder": (["report", "tree"], "tree has no config.json"),
    "report, a benchmark": (["report", "none.json"], "none.json: no such file"),
    "convert": (["convert", "/none", "out"], "/none: no such file or folder"),
    "convert, below a folder": (["convert", "tree/none", "out"], "tree/none: no such file or folder"),
    "parity": (["parity", "/none"], "/none: no such file or folder"),
    "parity, our own form": (["parity", "trained/params"], "give --against=DIR"),
    "train, no data": (["train", PHANTOM, TREE, "--config.data.root=none"], "data.root='none': no such folder"),
    "reproduce, no data": (["reproduce", PHANTOM, TREE, "--config.data.root=none"], "`medcg data ledger FOLDER`"),
    "train, prepared": (
        ["train", PHANTOM, TREE, "--config.data.root=prepared"],
        "expected --config.data.source=prepared",
    ),
    "train, not prepared": (
        ["train", PHANTOM, "--config.data.source=prepared", "--config.data.root=tree"],
        "not prepared; expected what `medcg data prepare tree OUT` writes",
    ),
    "train, another family": (
        ["train", PHANTOM, "--config.model.checkpoint=llava", "--config.model.name=qwen2_vl_tiny"],
        "is a llava checkpoint, and model.name=qwen2_vl_tiny is of qwen2_vl",
    ),
    "eval, nothing": (["eval", PHANTOM, "--workdir=none"], "params is missing and model.checkpoint is empty"),
    "eval, another run": (
        ["eval", PHANTOM, "--workdir=trained"],
        "was trained with data.system_prompt='vicuna', not ''",
    ),
    "data check": (["data", "check", "none"], "none: no such folder"),
    "data stats": (["data", "stats", "none", "out"], "none: no such folder"),
    "data stats, prepared": (["data", "stats", "prepared", "out"], "prepared: it is prepared"),
    "data prepare": (["data", "prepare", "none", "out"], "none: no such folder"),
    "config": (["config", "none.py"], "--config=none.py: there is no such file"),
}
PROGRAM = """
import contextlib, io, json, sys, time
from medcg_jax.cli import main
started = time.process_time()
found = {}
for name, argv in json.load(sys.stdin).items():
    began, err = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(err):
        status = main(argv)
    heavy = [name for name in ("jax", "flax", "transformers", "matplotlib", "pandas") if name in sys.modules]
    found[name] = [status, err.getvalue(), time.process_time() - began + started, heavy]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("paths")
    write_tree(path / "tree", train=4, test=2)
    (path / "prepared").mkdir()
    (path / "prepared" / ".plan.json").write_text("{}")
    (path / "llava").mkdir()
    (path / "llava" / "config.json").write_text('{"model_type": "llava"}')
    params = path / "trained" / "params"
    params.mkdir(parents=True)
    (params / "model.json").write_text('{"family": "llava"}')
    run = replace(RunConfig(), model__name="llava15_tiny", data__system_prompt="vicuna")
    sections = {name: vars(getattr(run, name)) for name in ("model", "data")}
    (params / "meta.json").write_text(json.dumps({"config": sections}))
    return path


@pytest.fixture(scope="module")
def refusals(folder) -> dict:
    given = json.dumps({name: argv for name, (argv, _) in CASES.items()})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        input=given,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_path_is_one_line_at_once(refusals, name):
    status, error, seconds, heavy = refusals[name]
    assert status == 2 and CASES[name][1] in error and error.count("\n") == 1, error
    assert not heavy and seconds < MOST_S


# Refusals that need JAX: of devices, of a topology, of what the data hold.
LATE = {
    "train": (["train", PHANTOM, "--config.data.subsets=ct-brain-stat"], "did you mean ct-brain-state"),
    "eval": (["eval", PHANTOM, "--config.model.checkpoint=none"], "there are no weights"),
    "bench": (["bench", PHANTOM, "--config.mesh.fsdp=3"], "needs a multiple of 3 devices"),
    "plan": (["plan", PHANTOM, "--topology=nothing"], "topology=nothing: expected local, v4|v5e"),
    "convert": (["convert", "tree", "out"], "tree holds no checkpoint"),
}


@pytest.mark.parametrize("verb", LATE)
def test_a_later_refusal_loads_no_statistics_and_no_decoders(verb, folder):
    argv, message = LATE[verb]
    program = (
        "import json, sys, time; from medcg_jax.cli import main; status = main(sys.argv[1:])\n"
        "slow = {'statsmodels', 'pandas', 'matplotlib', 'torch', 'scipy.stats', 'scipy.fft', 'pydicom'}\n"
        "print(json.dumps([status, sorted(slow & set(sys.modules)), time.process_time()]))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": ""}  # one device
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    status, slow, seconds = json.loads(done.stdout.splitlines()[-1])
    assert status == 2 and message in done.stderr and not slow
    # Processes of `bench` count apart; the rest takes half of this on a machine that has nothing else to do.
    assert seconds < MOST_S


def test_nothing_is_left_of_a_refusal(refusals, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["llava", "prepared", "trained", "tree"]


def test_help_is_there_within_a_second_of_cpu():
    program = "import time\nfrom medcg_jax.cli import main\ntry:\n    main(['train', '--help'])\n"
    program += "finally:\n    print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "--config FILE.py[:ARG]" in done.stdout and float(done.stdout.split()[-1]) < 1.0


# ------------------------------------------------------------------ the same from Python


def test_the_data_room_says_it_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    data = replace(RunConfig(), data__source="release", data__root="prepared").data
    for check in (check_root, open_source):
        with pytest.raises(
            DataError, match="data.root='prepared': it is prepared; expected --config.data.source=prepared"
        ):
            check(data)


@pytest.mark.parametrize(
    ("name", "stated", "family"),
    [
        ("config.json", {"model_type": "qwen2_vl"}, "qwen2_vl"),
        ("config.json", {"model_type": "mllama"}, "mllama"),
        ("model.json", {"family": "next_chat"}, "next_chat"),
        ("config.json", {"model_type": "bert"}, ""),
        ("config.json", {"model_type": 3}, ""),
        ("config.json", [], ""),
        ("other.json", {}, ""),
    ],
)
def test_the_family_of_a_checkpoint(name, stated, family, tmp_path):
    (tmp_path / name).write_text(json.dumps(stated))
    assert family_in(tmp_path) == family
    if family:
        check_family(
            tmp_path, {"qwen2_vl": "qwen2_vl_7b", "mllama": "llama32_vision_11b"}.get(family, "next_chat_tiny")
        )
        with pytest.raises(ConfigError, match=f"is a {family} checkpoint, and model.name=llava15_7b is of llava"):
            check_family(tmp_path, "llava15_7b")
    else:
        check_family(tmp_path, "llava15_7b")


# ------------------------------------------------------------------ the config that parameters were trained with


def recorded_as(run: RunConfig, folder: Path) -> Path:
    sections = {name: vars(getattr(run, name)) for name in ("model", "data")}
    (folder / "meta.json").write_text(json.dumps({"config": sections}))
    return folder


@pytest.mark.parametrize("key", trained_with.SAME)
def test_a_model_is_asked_as_it_was_trained(key, tmp_path):
    run, (section, name) = RunConfig(), key.split(".")
    value = getattr(getattr(run, section), name)
    other = "llava15_7b" if key == "model.name" else ("q",) if isinstance(value, tuple) else not value
    other = "qwen2" if key == "data.system_prompt" else other if not isinstance(value, int | float) else type(value)(7)
    other = True if value is False else other
    directory = recorded_as(run, tmp_path)
    trained_with.check_same(run, directory)
    with pytest.raises(ConfigError, match=f"{key}=") as error:
        trained_with.check_same(replace(run, **{f"{section}__{name}": other}), directory)
    assert "another run's config" in str(error.value)


def test_other_data_are_told_and_not_refused(tmp_path):
    directory = recorded_as(replace(RunConfig(), data__source="release", data__root="mine"), tmp_path)
    run = replace(RunConfig(), data__subsets=("04",), model__compute_dtype="bfloat16", data__phantom_decoys=0.5)
    trained_with.check_same(run, directory)
    lines = trained_with.lines(run, directory)
    assert lines == [
        "trained with data.source='release', tested with 'phantom'",
        "trained with data.root='mine', tested with ''",
        "trained with data.subsets=[], tested with ['04']",
        "trained with model.compute_dtype='float32', tested with 'bfloat16'",
    ]
    # What is of a training alone makes no difference, nor does a field that was not recorded.
    run = replace(run, train__learning_rate=0.5, model__trainable=("decoder",), data__max_text_tokens=99)
    trained_with.check_same(run, directory)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"config": 3}', '{"config": {"model": {}}}', '{"made_of": {}}'])
def test_where_nothing_is_recorded_nothing_is_compared(text, tmp_path):
    (tmp_path / "meta.json").write_text(text)
    trained_with.check_same(RunConfig(), tmp_path)
    assert trained_with.lines(RunConfig(), tmp_path) == [] and not training_config(tmp_path / "none")


def test_the_parameters_of_a_test(tmp_path):
    run = RunConfig(model=ModelConfig(checkpoint="base"))
    assert trained_with.parameters_of(run, tmp_path) == Path("base")
    assert trained_with.parameters_of(RunConfig(), tmp_path) == tmp_path / "params"
    (tmp_path / "params").mkdir()
    assert trained_with.parameters_of(run, tmp_path) == tmp_path / "params"


# ------------------------------------------------------------------ --dry


def test_a_dry_training_checks_its_config_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", PHANTOM, "--dry", "--workdir=w"]) == 0
    assert capsys.readouterr().out == "phantom_tiny: llava15_tiny on phantom data; workdir w\n"
    assert main(["eval", f"--config={ROOT}/configs/llava15_7b.py", "--dry", "--json=found.json"]) == 0
    assert "warning: data.root=Med-MAT is not there" in capsys.readouterr().err
    assert sorted(json.loads(Path("found.json").read_text())["missing"]) == ["data.root", "model.checkpoint"]
    assert main(["train", PHANTOM, "--dry", "--config.train.steps=-1"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


# ------------------------------------------------------------------ checkpoints


def test_a_workdir_stands_for_its_parameters_and_a_folder_of_several_names_them(tmp_path):
    (tmp_path / "run" / "params").mkdir(parents=True)
    (tmp_path / "run" / "params" / "model.json").write_text("{}")
    assert resolve(str(tmp_path / "run")) == tmp_path / "run" / "params"
    assert family_in(resolve(str(tmp_path / "run" / "params"))) == ""
    (tmp_path / "bases" / "abc").mkdir(parents=True)
    (tmp_path / "bases" / "abc" / "model.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="of several checkpoints, or of a grid; expected one checkpoint, as one of abc"
    ):
        open_checkpoint(tmp_path / "bases")
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "config.json").write_text('{"cells": [], "config": {}}')
    with pytest.raises(ConfigError, match="or of a grid; expected one checkpoint, as weights/CELL in it"):
        open_checkpoint(tmp_path / "grid")


def test_a_flag_before_the_verb_is_nearly_one_that_is_known(capfd):
    assert main(["--versoin"]) == 2
    assert "--versoin is not known to `medcg`; did you mean --version?" in capfd.readouterr().err


def test_the_result_alone_goes_to_a_pipe(capfd):
    config = Path(__file__).parent.parent / "configs" / "phantom.py"
    assert main(["reproduce", f"--config={config}:tiny", "--dry", "--json=-"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["trainings"] > 0 and "chip-hours" in shown.err
