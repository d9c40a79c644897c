"""Runs the documentation's commands, page by page, in a folder that holds what a reader has; marked `long`.

A page's commands run in their order, since the later ones read what the earlier ones wrote. What cannot run on two cores
without a network is listed in `documented.NOT_RUN`, with what it needs; launchers run with --dry-run.
"""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_files import dicom_bytes
from documented import NOT_RUN, PAGES, ROOT, commands_of, is_launcher, needs
from PIL import Image
from toy_checkpoints import trained, with_more_boxes

from medcg_jax.data.phantom.source import PhantomSource

# Table in docs/data.md -> the phantoms that stand for its images.
OWN_SUBSETS = {
    "knee-tear": "ct-brain-stage",
    "knee-effusion": "ct-brain-state",
    "shoulder-tear": "ct-eye-stage",
    "tendon-tear": "mri-eye-stage",
    "wrist-fracture": "photo-liver-cancer",
}
COMMANDS = [command for page in PAGES for command in commands_of(page)]


def test_every_reason_not_to_run_a_command_is_of_one():
    words = [" ".join(shlex.split(command, comments=True)) for command in COMMANDS]
    idle = [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in words)]
    assert not idle
    assert not needs("medcg data check mine") and needs("medcg plan --config=configs/llava15_7b.py --topology=h100:8")
    runs = [command for command in COMMANDS if not needs(command)]
    assert len(runs) > len(COMMANDS) / 2


def write_own_images(folder: Path) -> None:
    """The folder `mine` of docs/data.md: images, and a table of labels for each subset."""
    phantoms = PhantomSource(seed=1, train_records=24, test_records=8)
    for table, subset in OWN_SUBSETS.items():
        lines = [("image", "label", "split", "group")]
        for split in ("train", "test"):
            records = phantoms.records(subset, split)
            for index, record in enumerate(records.records):
                path = Path("scans", table.partition("-")[0], f"{table}-{split}-{index:04}.png")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(records.image(index)).save(folder / path)
                label = record.options["ABCD".index(record.answer)]
                lines.append((path.as_posix(), label, split, f"patient-{split}-{index}"))
        with (folder / f"{table}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    shutil.copy(folder / "scans/knee/knee-tear-test-0000.png", folder / "scans/knee/0003.png")


def write_belongings(folder: Path, page: str) -> None:
    """What the commands of `page` read and no earlier one of them writes."""
    for name in ("launch", "benchmarks", ".venv"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    needed = "\n".join(commands_of(page))
    if "mine" in needed:
        write_own_images(folder / "mine")
    if "Med-MAT" in needed:
        medcg(folder, "data phantom Med-MAT --train=4 --test=2")
        images = sorted(path.relative_to(folder / "Med-MAT") for path in (folder / "Med-MAT").rglob("*.png"))
        lines = [f"{path},{('benign', 'malignant')[index % 2]}" for index, path in enumerate(images[:40])]
        (folder / "labels.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    if "runs/first" in needed:
        trained(folder / "runs/first/params", "llava")
    if " ask " in needed:
        records = PhantomSource(seed=1, train_records=2, test_records=2).records("ct-brain-state", "test")
        Image.fromarray(records.image(0)).save(folder / "scan.png")
        (folder / "scan.dcm").write_bytes(dicom_bytes(np.arange(4096, dtype=np.uint16).reshape(64, 64)))
        trained(folder / "checkpoints/minigpt-v2-7b", "next_chat", with_more_boxes)
    if "report bench.json" in needed:
        shutil.copy(ROOT / "benchmarks/bench_tiny_8.json", folder / "bench.json")
    if "report runs/table3" in needed:
        for name in ("table3", "table3_again"):
            medcg(folder, f"reproduce --config=configs/phantom.py:tiny --workdir=runs/{name}")


def environment() -> dict[str, str]:
    """As a reader's shell: medcg and python of this interpreter, one device, benchmarks importable."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "CI": "true"}


def run(folder: Path, words: list[str]) -> None:
    if words[0] == "medcg":
        words = [sys.executable, "-m", "medcg_jax", *words[1:]]
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, (shlex.join(words), done.stdout[-2000:], done.stderr[-2000:])


def medcg(folder: Path, command: str) -> None:
    run(folder, ["medcg", *shlex.split(command)])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if any(not needs(c) for c in commands_of(page))])
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path):
    write_belongings(tmp_path, page)
    for command in commands_of(page):
        words = shlex.split(command, comments=True)
        if needs(command):
            continue
        if is_launcher(words) and "--dry-run" not in words:
            words.insert(2, "--dry-run")
        run(tmp_path, words)
        for flag in words:
            if flag.startswith("--json="):
                assert (tmp_path / flag.removeprefix("--json=")).is_file(), command


@pytest.mark.long
def test_a_command_that_fails_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="no such folder"):
        medcg(tmp_path, "data check none")
