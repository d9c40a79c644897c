"""What one machine with a GPU does, measured in stages of which none can lose another's results.

    python -m medcg_jax.scale.bench_gpu --json=FILE [--model=llava15_7b] [--time=570]

Every stage is a process of its own with a time limit; what it has found stands in its file before the next thing
starts, and FILE is written again after every stage. Needs jax, flax and optax, no network and no file of weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from medcg_jax.files import write_whole

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stage:
    limit_s: float
    about: str


# In order of what a reader wants first; a stage that ends early leaves its time to the later ones.
STAGES = {
    "machine": Stage(60, "versions, devices, memory"),
    "step": Stage(330, "a timed training step with random weights, larger batches until one does not fit"),
    "attention": Stage(100, "the attention this platform gets, against plain attention"),
    "parity": Stage(240, "the tiny parity tests on this device"),
}
TOTAL_S = 570.0


def main(argv: list[str] | None = None) -> int:
    """Runs all stages, or with --stage one; 0 when every stage that can run here did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--model", default="llava15_7b", choices=("llava15_tiny", "llava15_7b", "llava15_13b"))
    parser.add_argument("--time", type=float, default=TOTAL_S, metavar="S", help="seconds for everything")
    parser.add_argument("--batches", default="8,16,32,64,128", help="batch sizes of the step, smallest first")
    parser.add_argument("--stage", choices=tuple(STAGES), default="")
    args = parser.parse_args(argv)
    if args.stage:
        from medcg_jax.scale import bench_stages

        return bench_stages.run(args.stage, Path(args.json), args.model, tuple(map(int, args.batches.split(","))))
    return run_all(Path(args.json), args)


def run_all(out: Path, args) -> int:
    """Runs every stage within `args.time` seconds, merging their files into `out`; returns the exit status."""
    result: dict = {"model": args.model, "stages": {}}
    ends = time.monotonic() + args.time
    with tempfile.TemporaryDirectory() as scratch:
        for name, stage in STAGES.items():
            limit = min(stage.limit_s, ends - time.monotonic())
            print(f"== {name}: {stage.about} (at most {max(limit, 0):.0f} s)", flush=True)
            file = Path(scratch) / f"{name}.json"
            flags = [f"--stage={name}", f"--json={file}", f"--model={args.model}", f"--batches={args.batches}"]
            status, seconds = ("no time left", 0.0) if limit < 5 else run_stage(flags, limit)
            found = json.loads(file.read_text()) if file.exists() else {}
            result["stages"][name] = {"status": status, "seconds": round(seconds, 1), **found}
            if "error" in found:
                print(f"   {found['error']}", flush=True)
            print(f"   {result['stages'][name]['status']} after {seconds:.0f} s", flush=True)
            write_json(out, result)
    print(f"== {out}")
    return 0 if all(stage["status"] in ("done", "skipped") for stage in result["stages"].values()) else 1


def run_stage(flags: list[str], limit_s: float) -> tuple[str, float]:
    """(status, seconds) of a stage in a process group of its own, which is ended when its time is over."""
    began = time.monotonic()
    command = [sys.executable, "-m", "medcg_jax.scale.bench_gpu", *flags]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(timeout=limit_s)
        status = "done" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped at its limit of {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, time.monotonic() - began


def write_json(path: Path, value: dict) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
