"""A grid that gets SIGTERM: what is under way is saved, its claims are given back, status 75; then it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_grid import CONFIG, ROOT

from medcg_jax.study.run import claims

SMALL = CONFIG | {
    "study.targets": "('ct-liver-stage',)", "study.tables": "('pairs',)", "eval.controls": "()",
    "study.arms": "('trained',)", "study.seeds": "(0,)", "eval.generate": "False", "base.steps": "4",
    "train.steps": "20", "train.checkpoint_every_steps": "1000",
}  # fmt: skip
TIMEOUT_S = 240.0


def start(workdir: Path, log: Path, **more: str) -> subprocess.Popen:
    """`medcg reproduce` on one device, compiled as quickly as in other tests; ended by whoever started it."""
    flags = [f"--config.{key}={value}" for key, value in more.items()]
    command = [sys.executable, "-m", "medcg_jax.cli", "reproduce", "--config=configs/phantom.py:tiny", *flags]
    quick = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = os.environ | {"XLA_FLAGS": quick, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as out:
        return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, stdout=out, stderr=out)


def wait_for(there, process) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
def test_saved_given_back_and_gone_on_with(tmp_path):
    workdir, log = tmp_path / "grid", tmp_path / "log"
    more = SMALL | {"study.jobs": "2", "study.base_dir": str(tmp_path / "bases")}
    process = start(workdir, log, **more)
    try:
        # A cell is being trained when its losses come in.
        wait_for(lambda: any(p.stat().st_size for p in workdir.glob("metrics/pairs*.jsonl")), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 75, log.read_text()[-2000:]
        assert log.read_text().splitlines()[-1].startswith("medcg: ") and "told to stop" in log.read_text()
        folder = workdir / "state" / "claims"
        held = {name: claims._last(folder, name)[1]["pid"] for name in claims.num_holders(folder)}
        assert held and not any(held.values()), held  # 0: given back, where a process that died leaves its number
        saved = [p for p in (workdir / "state" / "checkpoints").glob("*/*") if p.name.isdigit()]
        assert saved  # by the signal alone: the next one was due after a thousand steps
        process = start(workdir, log, **more)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()[-2000:]
        text = log.read_text() + "".join(p.read_text() for p in Path(workdir).glob("logs/*"))
        assert "going on from step" in text
    finally:
        process.kill()
        process.wait()
