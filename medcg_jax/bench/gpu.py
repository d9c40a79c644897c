"""What one machine with a GPU does, measured in stages of which none can lose another's results.

    python -m medcg_jax.bench.gpu --json=FILE [--model=llava15_7b] [--time=570] [--stages=machine,train]

Every stage is a process of its own with a time limit; what it has found stands in its file before the next thing
starts, and FILE has it within a second. Needs jax, flax and optax, no network and no file of weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    "machine": Stage(60, "versions, memory, the rate of bfloat16 matrix products and of memory"),
    "train": Stage(170, "full fine-tuning with random weights, parameters and moments in bfloat16"),
    "torch": Stage(110, "the same by Hugging Face transformers: training steps, forward, generate"),
    "eval": Stage(60, "option letters by their likelihood, and generation"),
    "trace": Stage(50, "a trace of the fastest step, and where its time goes"),
    "train_fp32": Stage(110, "full fine-tuning with float32 master weights and moments"),
    "lora": Stage(80, "adapters of rank 128 on a frozen base in bfloat16, int8 and nf4"),
    "attention": Stage(50, "the attention this platform gets, against plain attention"),
    "numerics": Stage(80, "the tiny model on this device and on the CPU"),
    "torch_fp32": Stage(80, "transformers with float32 weights and autocast"),
    "flags": Stage(120, "the fastest step under other flags of XLA"),
    "parity": Stage(200, "the tiny parity tests on this device, against PyTorch"),
}
TOTAL_S = 570.0


def main(argv: list[str] | None = None) -> int:
    """Runs all stages, or those of --stages, or with --stage one here; 0 when every stage that can run here did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--model", default="llava15_7b", choices=("llava15_tiny", "llava15_7b", "llava15_13b"))
    seconds = "seconds for all; with more than the default every stage has more too"
    parser.add_argument("--time", type=float, default=TOTAL_S, metavar="S", help=seconds)
    parser.add_argument("--batches", default="", help="batch sizes of the stages' first cases, in place of their cases")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, in the order to run them in")
    parser.add_argument("--so_far", default="", metavar="FILE", help="an earlier FILE, whose other stages are kept")
    for hidden in ("--stage", "--scratch"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        batches = tuple(map(int, filter(None, args.batches.split(","))))
    except ValueError:
        parser.error(f"--batches={args.batches}: numbers with commas between are accepted")
    if args.stage:
        from medcg_jax.bench import stages

        so_far = read_json(Path(args.so_far)) if args.so_far else {}
        ask = stages.Ask(args.model, batches, args.limit, Path(args.scratch or "."), so_far.get("stages", {}))
        return stages.run(args.stage, Path(args.json), ask)
    names = args.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"--stages: {', '.join(unknown)}; accepted: {', '.join(STAGES)}")
    return run_all(Path(args.json), args, names)


def run_all(out: Path, args, names: list[str]) -> int:
    """Runs these stages within `args.time` seconds, merging their files into `out`; returns the exit status."""
    from medcg_jax.bench.gpu_text import conclusions

    # What ends this process ends its stage too: at the next look, as an exception inside of Popen.wait may leave its
    # lock taken for ever.
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    earlier = read_json(Path(args.so_far)).get("stages", {}) if args.so_far else {}
    result: dict = {"model": args.model, "stages": earlier}
    ends = time.monotonic() + args.time
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            limit = min(STAGES[name].limit_s * max(1.0, args.time / TOTAL_S), ends - time.monotonic())
            print(f"== {name}: {STAGES[name].about} (at most {max(limit, 0):.0f} s)", flush=True)
            file = Path(scratch) / f"{name}.json"

            def keep(status: str, seconds: float, name=name, file=file) -> None:
                found = {"status": status, "seconds": round(seconds, 1), **read_json(file)}
                result["stages"][name] = found
                write_json(out, result)

            def look(seconds: float, keep=keep, file=file) -> None:
                if file.exists():
                    keep("running", seconds)
                if told:
                    sys.exit(128 + told[0])

            flags = [
                f"--stage={name}", f"--json={file}", f"--model={args.model}", f"--batches={args.batches}",
                f"--limit={limit:.0f}", f"--scratch={scratch}", f"--so_far={out}",
            ]  # fmt: skip
            status, seconds = "no time left", 0.0
            if limit >= 5:
                keep("running", 0.0)
                status, seconds = run_stage(flags, limit, look)
            keep(status, seconds)
            found = result["stages"][name]
            if "error" in found:
                print(f"   {found['error']}", flush=True)
            print(f"   {found['status']} after {seconds:.0f} s", flush=True)
    result["conclusions"] = conclusions(result["stages"])
    write_json(out, result)
    print("\n".join(["== what it comes to", *(f"   {line}" for line in result["conclusions"]["lines"])]))
    print(f"== {out}")
    return 0 if all(result["stages"][name]["status"] in ("done", "skipped") for name in names) else 1


def run_stage(flags: list[str], limit_s: float, look: Callable[[float], object]) -> tuple[str, float]:
    """(status, seconds) of a stage in a process group of its own, which is ended when its time is over.

    look: called every second with the seconds since it began.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "medcg_jax.bench.gpu", *flags]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    status = f"stopped at its limit of {limit_s:.0f} s"
    try:
        while (seconds := time.monotonic() - began) < limit_s:
            try:
                code = process.wait(timeout=min(1.0, limit_s - seconds))
                status = "done" if code == 0 else f"failed with exit status {code}"
                break
            except subprocess.TimeoutExpired:
                look(time.monotonic() - began)
    finally:
        # The group, even where the stage has ended: what it started must not keep the device's memory.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return status, time.monotonic() - began


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, value: dict) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
