"""Every verb with a broken file in each place that it reads: one line, status 2, the file's name, soon and in little memory."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from study.report_grids import make_grid, run_of
from trees import write_tree

from medcg_jax.cli import main
from medcg_jax.config_file import load
from medcg_jax.data.tokenizer import SMALL
from medcg_jax.train.checkpoint import save_params
from medcg_jax.train.setup import open_setup, start_params

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"eval.batch_size": "8", "train.batch_size": "8", "base.batch_size": "8"}
TINY = (f"--config={CONFIGS / 'phantom.py'}:tiny", *(f"--config.{field}={value}" for field, value in SIZES.items()))
MAX_SECONDS = 10.0
MAX_GROWTH_MB = 500.0
SPARSE_BYTES = 60 * 2**30


# ------------------------------------------------------------------ how a file is broken


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_bytes(path: Path) -> None:
    path.write_bytes(b"\xff\xfe[\x00" + bytes(range(256)) * 4)


def a_number(path: Path) -> None:
    path.write_text("5\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, SPARSE_BYTES)


BREAKS = [
    *(pytest.param(broken, id=broken.__name__) for broken in (cut, a_fifo)),
    *(
        pytest.param(broken, id=broken.__name__, marks=pytest.mark.long)
        for broken in (emptied, other_bytes, a_number, a_folder, a_device, sparse)
    ),
]


# ------------------------------------------------------------------ what the verbs read, made once


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with an unbroken one of everything that a verb reads."""
    folder = tmp_path_factory.mktemp("whole")
    write_tree(folder / "tree")
    (folder / "tree" / "manifest.json").write_text(
        json.dumps({"subsets": [{"subset": "04", "modality": "MRI", "area": "Brain", "task": "State"}]})
    )
    assert main(["data", "prepare", str(folder / "tree"), str(folder / "prepared"), "--image=keep"]) == 0
    make_grid(folder / "grid", run_of())
    (folder / "tokenizer").mkdir()
    shutil.copy(SMALL, folder / "tokenizer" / "tokenizer.json")
    setup = open_setup(load(f"{CONFIGS / 'phantom.py'}:tiny", SIZES))
    _, params = start_params(setup, seed=0)
    save_params(folder / "params", params, setup.model)
    assert main(["convert", str(folder / "params"), str(folder / "hf"), "--to=hf"]) == 0
    assert main(["convert", str(folder / "hf"), str(folder / "orbax")]) == 0
    shutil.copy(CONFIGS / "phantom.py", folder / "config.py")
    (folder / "labels.csv").write_text(
        "image,label\n" + "".join(f"med-mat/a b/{i} [1]%.png,{'xy'[i % 2]}\n" for i in range(1, 13))
    )
    return folder


def first_of(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


# (name, verb's arguments from the folder, pattern of the file below it, breaks that leave it a file the verb can take)
RELEASE = ("--config.data.source=release", "--config.data.root={folder}/tree", "--config.data.subsets=('04',)")
PLACES = {
    "train, config file": (["train", "--config={folder}/config.py:tiny", "--workdir={folder}/w"], "config.py", (cut,)),
    "train, subset file": (["train", *TINY, *RELEASE, "--workdir={folder}/w"], "tree/Aggregated_Subsets/Subset--04-train.json", ()),
    "train, manifest": (["train", *TINY, *RELEASE, "--workdir={folder}/w"], "tree/manifest.json", ()),
    "train, tokenizer": (["train", *TINY, "--config.model.tokenizer={folder}/tokenizer", "--workdir={folder}/w"],
                         "tokenizer/tokenizer.json", ()),
    "train, checkpoint's model.json": (["train", *TINY, "--config.model.checkpoint={folder}/params",
                                        "--config.base.steps=0", "--workdir={folder}/w"], "params/model.json", ()),
    "train, released config.json": (["train", *TINY, "--config.model.checkpoint={folder}/hf", "--config.base.steps=0",
                                     "--workdir={folder}/w"], "hf/config.json", ()),
    "train, prepared manifest": (["train", *TINY, "--config.data.source=prepared", "--config.data.root={folder}/prepared",
                                  "--workdir={folder}/w"], "prepared/manifest.json", ()),
    "train, prepared lines": (["train", *TINY, "--config.data.source=prepared", "--config.data.root={folder}/prepared",
                               "--config.data.max_text_tokens=120", "--workdir={folder}/w"],
                              "prepared/records/04-train.jsonl", ()),
    "eval, subset file": (["eval", *TINY, *RELEASE, "--config.model.checkpoint={folder}/params", "--config.base.steps=0",
                           "--workdir={folder}/w"], "tree/Aggregated_Subsets/Subset--04-test.json", ()),
    "eval, checkpoint's model.json": (["eval", *TINY, "--config.model.checkpoint={folder}/params", "--config.base.steps=0",
                                       "--workdir={folder}/w"], "params/model.json", ()),
    "reproduce, config.json of its workdir": (["reproduce", *TINY, "--workdir={folder}/grid"], "grid/config.json", ()),
    "reproduce, tree": (["reproduce", *TINY, *RELEASE, "--config.base.steps=0", "--workdir={folder}/w"],
                        "tree/Aggregated_Subsets/Subset--04-train.json", ()),
    "plan, config file": (["plan", "--config={folder}/config.py", "--topology=v5e:1x1"], "config.py", (cut,)),
    "bench, config file": (["bench", "--config={folder}/config.py"], "config.py", (cut,)),
    "convert, config.json": (["convert", "{folder}/hf", "{folder}/out"], "hf/config.json", ()),
    "convert, weights": (["convert", "{folder}/hf", "{folder}/out"], "hf/model.safetensors", ()),
    "convert back, model.json": (["convert", "{folder}/orbax", "{folder}/out", "--to=hf"], "orbax/model.json", ()),
    "parity, config.json": (["parity", "{folder}/hf"], "hf/config.json", ()),
    "parity, weights": (["parity", "{folder}/hf"], "hf/model.safetensors", ()),
    "data ledger, subset file": (["data", "ledger", "{folder}/tree"], "tree/Aggregated_Subsets/Subset--04-train.json", ()),
    "data check, subset file": (["data", "check", "{folder}/tree"], "tree/Aggregated_Subsets/Subset--04-train.json", ()),
    "data check, manifest": (["data", "check", "{folder}/tree"], "tree/manifest.json", ()),
    "data check, image": (["data", "check", "{folder}/tree"], "tree/med-mat/a b/1 [[]1]%.png", ()),
    "data check, prepared manifest": (["data", "check", "{folder}/prepared"], "prepared/manifest.json", ()),
    "data check, shard": (["data", "check", "{folder}/prepared"], "prepared/records/04-train-*.arrayrecord", ()),
    "data prepare, subset file": (["data", "prepare", "{folder}/tree", "{folder}/out"],
                                  "tree/Aggregated_Subsets/Subset--04-train.json", ()),
    "data prepare, plan": (["data", "prepare", "{folder}/tree", "{folder}/prepared", "--image=keep"], "prepared/.plan.json", ()),
    "data stats, subset file": (["data", "stats", "{folder}/tree", "{folder}/out"],
                                "tree/Aggregated_Subsets/Subset--04-train.json", ()),
    "data format, labels": (["data", "format", "{folder}/labels.csv", "{folder}/tree", "--subset=mine", "--modality=MRI",
                             "--area=Brain", "--task=State"], "labels.csv", (cut,)),
    "report, config.json": (["report", "{folder}/grid"], "grid/config.json", ()),
    "report, cells.csv": (["report", "{folder}/grid"], "grid/cells.csv", ()),
    "report, results.csv": (["report", "{folder}/grid"], "grid/results.csv", ()),
    "report, predictions": (["report", "{folder}/grid"], "grid/predictions/*.jsonl", ()),
    "report of two, config.json": (["report", "{folder}/grid", "{folder}/grid"], "grid/config.json", ()),
}  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("place", PLACES)
def test_a_broken_file_is_one_line(whole, tmp_path, place, broken, capfd, monkeypatch):
    arguments, pattern, taken = PLACES[place]
    if broken in taken:
        pytest.skip("such a file can be taken")
    top = pattern.split("/")[0]
    for name in {top, *re.findall(r"\{folder\}/(\w+(?:\.\w+)?)", " ".join(arguments))}:
        source = whole / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        elif source.is_file():
            shutil.copy(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    victim = first_of(tmp_path, pattern)
    broken(victim)
    before, began = resident_mb(), time.monotonic()
    status = main([argument.format(folder=tmp_path) for argument in arguments])
    seconds, growth = time.monotonic() - began, peak_mb() - before
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("medcg: ")]
    assert status == 2, (status, out[-300:], err[-300:])
    assert "Traceback" not in out + err
    assert len(lines) <= 1 and any(victim.name in line for line in (lines or out.splitlines())), (lines, out[-500:])
    assert seconds < MAX_SECONDS and growth < MAX_GROWTH_MB, (seconds, growth)


def resident_mb() -> float:
    """Resident memory now, from which `peak_mb` counts on."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmRSS")


def peak_mb() -> float:
    return status_mb("VmHWM")


def status_mb(field: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 1024
