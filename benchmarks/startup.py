"""Start-up of a training: what a process does from `python` until its first step could be handed to the device.

    python -m benchmarks.startup --config=configs/llava15_7b.py [--devices=8] [--json=FILE]

Prints wall and CPU seconds of each phase, for a first process with an empty cache of compiled programs and a second one
with a full cache. Shapes are the run's, on simulated CPU devices, with phantom records and the small tokenizer in place of
the run's. No weights are read and nothing is executed, so the machine may be too small for the model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.records import overrides, write_record
from medcg_jax.config import ConfigError

# A phase of a start: name, wall and CPU seconds.
Phase = tuple[str, float, float]
LIMIT_S = 1800
MODULE = "benchmarks.startup"


class Clock:
    """parts: the phases that have ended. The first is Python's own start, from `began` on (time.time() of the parent)."""

    def __init__(self, began: float):
        self.parts: list[Phase] = [("python", time.time() - began, time.process_time())]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self.parts.append((name, time.monotonic() - wall, time.process_time() - cpu))


def start(config: str, changes: dict[str, str], num_devices: int, num_records: int, began: float) -> dict:
    """Starts up in this process as `medcg train` does, in the same order: {"parts", "compiled", "from_cache"}.

    num_records: training records of each of the phantom's subsets.
    """
    clock = Clock(began)
    with clock.phase("imports"):
        import importlib

        import jax

        from medcg_jax.config import MeshConfig, replace
        from medcg_jax.config_file import load
        from medcg_jax.data.phantom.source import PhantomSource
        from medcg_jax.data.pipeline import Batches
        from medcg_jax.data.records import concat
        from medcg_jax.families import build
        from medcg_jax.mesh import local_rows, make_mesh
        from medcg_jax.plan import programs as plan_programs
        from medcg_jax.train.log import CompileMonitor, keep_programs
        from medcg_jax.train.step import with_shardings

        importlib.import_module("medcg_jax.train.run")  # what the verb imports
    with clock.phase("configuration"):
        run = replace(load(config, changes), mesh=MeshConfig(data=1, fsdp=num_devices))
        keep_programs()
    with clock.phase("devices"):
        monitor = CompileMonitor()
        mesh = make_mesh(run.mesh, jax.devices())
    with clock.phase("tokenizer and model"):
        planned = plan_programs.plan_run(run, mesh)
        setup, trainable = planned.setup, planned.trainable
    with clock.phase("records to rows"):
        source = PhantomSource(0, num_records, 1)
        encoded = setup.encode(concat([source.records(subset.name, "train") for subset in source.subsets]))
    with clock.phase("first batch"):
        size = run.train.batch_size
        batches = Batches(encoded, batch_size=size, seed=0, rows=local_rows(mesh, size))
        batch, _ = next(iter(batches))
    program = planned.program
    with clock.phase("state: lowered"), jax.set_mesh(mesh):
        split = build.split_trainable(build.shardings(setup.model, mesh), run.model.trainable)
        lowered = program.jitted_start.lower(with_shardings(trainable, split[0]))
    with clock.phase("state: compiled"):
        lowered.compile()
    wall, cpu = time.monotonic(), time.process_time()
    _, _, lower_s, compile_s = program.compile(trainable, planned.frozen, batch)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    clock.parts.append(("step: lowered", lower_s, cpu * lower_s / wall))
    clock.parts.append(("step: compiled", compile_s, cpu * compile_s / wall))
    return {"parts": clock.parts, "compiled": monitor.compiled, "from_cache": monitor.from_cache}


def measure(args: argparse.Namespace, config_flags: list[str], cache: str) -> dict:
    """`start` in a process of its own.

    Raises:
      RuntimeError: it failed.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={args.devices}".strip(),
        "XDG_CACHE_HOME": cache,
        "MEDCG_BEGAN": repr(time.time()),
    }
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", MODULE, "--child", f"--config={args.config}", f"--devices={args.devices}"]
    command += [f"--records={args.records}", *config_flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """0, or 1: the second process compiled something, so the cache was not warm; 2: wrong use."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="simulated ones of the CPU, all fsdp")
    parser.add_argument("--records", type=int, default=100, metavar="N", help="of each of the phantom's subsets")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, config_flags = parser.parse_known_args(argv)
    try:
        changes = overrides(config_flags)
    except ConfigError as error:
        parser.error(str(error))
    if args.child:
        print(json.dumps(start(args.config, changes, args.devices, args.records, float(os.environ["MEDCG_BEGAN"]))))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (measure(args, config_flags, cache) for _ in range(2))
        warm["cache_bytes"] = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    print_starts(cold, warm)
    write_record(args.json, {"cold": cold, "warm": warm})
    return int(warm["compiled"] > 0)


def print_starts(cold: dict, warm: dict) -> None:
    print(f"{'seconds':24}{'cold wall':>12}{'CPU':>8}{'warm wall':>12}{'CPU':>8}")
    for before, after in zip(cold["parts"], warm["parts"], strict=True):
        print(f"{before[0]:24}{before[1]:12.2f}{before[2]:8.2f}{after[1]:12.2f}{after[2]:8.2f}")
    sums = [sum(phase[i] for phase in start["parts"]) for start in (cold, warm) for i in (1, 2)]
    print(f"{'to the first step':24}{sums[0]:12.2f}{sums[1]:8.2f}{sums[2]:12.2f}{sums[3]:8.2f}")
    programs = f"{warm['compiled']} programs compiled, {warm['from_cache']} from the cache"
    print(f"the second start: {programs} of {warm['cache_bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
