"""Simulated against measured step times: one training step on all ten meshes of eight simulated CPU devices.

    python -m benchmarks.schedule_cpu [--config=configs/bench_tiny.py] [--rows=8] [--json=FILE]

The machine is measured in the same run, on the same eight devices, which share this host's cores: the rate of matrix
products and of the memory when all devices work at once, and what a collective costs, fixed and for each byte. On a CPU
no collective is asynchronous, so this shows how well the reading of products, bytes and collectives tells one mesh from
another; it shows nothing of how an accelerator hides them. Steps of all meshes alternate, so that other load slows all.
Seconds are told twice: of the wall, and of CPU time divided by the cores, which is what the wall would be if the cores did
nothing else and never idled.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.stats import spearmanr

from benchmarks.records import write_record
from medcg_jax.config import MeshConfig, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.mesh import make_mesh, put_batch
from medcg_jax.plan import schedule
from medcg_jax.plan.programs import architecture_of, compile_training, plan_run, train_rows
from medcg_jax.plan.roofline import RING
from medcg_jax.plan.simulate import Machine, simulate
from medcg_jax.platform import keep_freed_memory
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.step import with_shardings

NUM_DEVICES = 8
MESHES = tuple(
    MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    for data, fsdp, tensor in itertools.product((1, 2, 4, 8), repeat=3)
    if data * fsdp * tensor == NUM_DEVICES
)
# Of the machine's measurements: side of the matrices, bytes of an array (more than caches hold, as a model's state is),
# payloads and groups of a sum, repetitions.
SIDE, ARRAY_BYTES, PAYLOADS, GROUP_SIZES, REPEATS = 512, 1 << 26, (1 << 10, 1 << 21), (2, 4, 8), 20


WALL, CPU = "wall", "cpu"
CLOCKS = {WALL: time.perf_counter, CPU: lambda: time.process_time() / (os.cpu_count() or 1)}


def timed(call) -> dict[str, float]:
    """Seconds of one call, which returns arrays, by each of `CLOCKS`."""
    began = {name: clock() for name, clock in CLOCKS.items()}
    jax.block_until_ready(call())
    return {name: clock() - began[name] for name, clock in CLOCKS.items()}


def median_seconds(call, rounds: int = 7) -> dict[str, float]:
    """Median seconds of a repetition in `call`, by clock; its first call compiles and does not count."""
    jax.block_until_ready(call())
    seconds = [timed(call) for _ in range(rounds)]
    return {name: statistics.median(times[name] for times in seconds) / REPEATS for name in CLOCKS}


def on_each(body, *shapes):
    """A call of `body` on every device at once, each with arrays of its own; `REPEATS` times in one program."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    spec = PartitionSpec("x")
    arrays = [
        jax.device_put(np.full((NUM_DEVICES * shape[0], *shape[1:]), 1e-3, np.float32), NamedSharding(mesh, spec))
        for shape in shapes
    ]

    def repeated(*locals_):
        return jax.lax.fori_loop(0, REPEATS, lambda _, first: body(first, *locals_[1:]), locals_[0])

    program = jax.jit(jax.shard_map(repeated, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return lambda: program(*arrays)


def measure_machines() -> tuple[dict[str, Machine], dict]:
    """By clock: what one of eight devices that work at once does in a second; and the measurements."""
    product = median_seconds(on_each(lambda x, w: x @ w, (SIDE, SIDE), (SIDE, SIDE)))
    numbers = ARRAY_BYTES // 4
    memory = median_seconds(on_each(lambda x, y: x + y, (numbers,), (numbers,)))

    def of_payload(payload: int, size: int) -> dict[str, float]:
        groups = [list(range(first, first + size)) for first in range(0, NUM_DEVICES, size)]

        def summed(x):
            return jax.lax.psum(x, "x", axis_index_groups=groups) * (1.0 / size)

        return median_seconds(on_each(summed, (payload // 4,)))

    small, large = ([of_payload(payload, size) for size in GROUP_SIZES] for payload in PAYLOADS)
    added = (PAYLOADS[1] - PAYLOADS[0]) * sum(map(RING["all-reduce"], GROUP_SIZES))
    machines = {
        clock: Machine(
            flops_per_s=2 * SIDE**3 / product[clock],
            memory_bytes_per_s=3 * ARRAY_BYTES / memory[clock],
            link_bytes_per_s=added / sum(a[clock] - b[clock] for a, b in zip(large, small, strict=True)),
            network_bytes_per_s=1.0,
            island_of=(0,) * NUM_DEVICES,
            collective_s=statistics.mean(times[clock] for times in small),
        )
        for clock in CLOCKS
    }
    rates = ("flops_per_s", "memory_bytes_per_s", "link_bytes_per_s", "collective_s")
    return machines, {clock: {name: getattr(machine, name) for name in rates} for clock, machine in machines.items()}


class Step:
    """One training step compiled for a mesh, with arrays to run it on."""

    def __init__(self, run: RunConfig, mesh: MeshConfig):
        run = replace(run, mesh=mesh)
        # Heads that every mesh divides: the tower of this size has four.
        model = architecture_of(run.model)
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, num_heads=NUM_DEVICES))
        planned = plan_run(run, make_mesh(mesh), alone=True, model=model)
        compiled = compile_training(planned, run.train.batch_size)
        self.sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "tensor")}
        self.steps, self.program = schedule.read(compiled.text()), compiled.program
        random = np.random.default_rng(0)

        def filled(x):
            values = random.normal(0, 0.02, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape)
            return jax.device_put(values.astype(x.dtype), x.sharding)

        state = planned.program.start(
            jax.tree.map(filled, with_shardings(planned.trainable, planned.program.run_shardings.params))
        )
        frozen = jax.tree.map(filled, with_shardings(planned.frozen, planned.program.frozen_shardings))
        rows, _ = train_rows(planned.setup).rows(np.zeros(run.train.batch_size, np.int64))
        hparams = planned.program.put_hparams(hparams_from(dataclasses.replace(run.train, steps=10**6), 1))
        self.state, self.rest = state, (frozen, hparams, put_batch(rows, planned.program.batch_sharding))

    def run(self) -> dict[str, float]:
        """Seconds of one step, by clock."""

        def step():
            self.state, metrics = self.program(self.state, *self.rest)
            return self.state, metrics

        return timed(step)


def measure(run: RunConfig, rounds: int) -> dict:
    """The machine, and for each mesh its measured and simulated seconds a step; rank correlation and errors over all."""
    steps = [Step(run, mesh) for mesh in MESHES]
    machines, about = measure_machines()
    seconds: list[list[dict[str, float]]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, measured in zip(steps, seconds, strict=True):
            taken = step.run()
            if number:  # the first one warms up
                measured.append(taken)
    result = {
        "model": run.model.name, "rows": run.train.batch_size, "rounds": rounds, "cores": os.cpu_count(),
        "load": os.getloadavg(), "machine": about, "machine_after": measure_machines()[1],
    }  # fmt: skip
    for clock, machine in machines.items():
        rows = []
        for step, measured in zip(steps, seconds, strict=True):
            simulated, times = simulate(step.steps, machine), [taken[clock] for taken in measured]
            rows.append(
                step.sizes
                | {"measured_s": statistics.median(times), "least_s": min(times), "most_s": max(times)}
                | {"simulated_s": simulated.step_s, "busy_s": simulated.busy_s}
                | {"collectives_s": simulated.collectives_s}
            )
        ratios = [row["simulated_s"] / row["measured_s"] for row in rows]
        scale = statistics.median(ratios)
        both = ([row[key] for row in rows] for key in ("simulated_s", "measured_s"))
        result[clock] = {
            "meshes": rows,
            "spearman": float(spearmanr(*both).statistic),
            "simulated_over_measured": {"least": min(ratios), "median": scale, "most": max(ratios)},
            "largest_error_after_scaling": max(abs(ratio / scale - 1) for ratio in ratios),
        }
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/bench_tiny.py", metavar="FILE.py")
    parser.add_argument("--rows", type=int, default=8, help="of a step, over all devices (default: 8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    keep_freed_memory()
    if len(jax.devices()) != NUM_DEVICES:
        print(
            f"{len(jax.devices())} devices; expected {NUM_DEVICES}: set JAX_PLATFORMS=cpu and "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={NUM_DEVICES}",
            file=sys.stderr,
        )
        return 2
    result = measure(replace(load(args.config, {}), train__batch_size=args.rows), args.rounds)
    for clock in CLOCKS:
        print(f"{clock} seconds; the machine: {result['machine'][clock]}")
        for row in sorted(result[clock]["meshes"], key=lambda row: row["measured_s"]):
            print(
                f"  data {row['data']} x fsdp {row['fsdp']} x tensor {row['tensor']}: measured "
                f"{row['measured_s'] * 1e3:7.1f} ms ({row['least_s'] * 1e3:.1f} to {row['most_s'] * 1e3:.1f}), simulated "
                f"{row['simulated_s'] * 1e3:7.1f} (computations {row['busy_s'] * 1e3:.1f}, collectives "
                f"{row['collectives_s'] * 1e3:.1f})"
            )
        ratio = result[clock]["simulated_over_measured"]
        print(
            f"  rank correlation {result[clock]['spearman']:.3f}; simulated over measured {ratio['median']:.2f} "
            f"({ratio['least']:.2f} to {ratio['most']:.2f})"
        )
    write_record(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
