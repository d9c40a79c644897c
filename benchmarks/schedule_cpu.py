"""Simulated against measured step times: one training step on all ten meshes of eight simulated CPU devices.

    python -m benchmarks.schedule_cpu [--config=configs/bench_tiny.py] [--rows=16] [--json=FILE]

The machine is measured in the same run, on the same eight devices, which share this host's cores: the rate of matrix
products and of the memory when all devices work at once, and what a collective costs, fixed and for each byte. On a CPU
no collective is asynchronous, so this shows how well the reading of products, bytes and collectives tells one mesh from
another; it shows nothing of how an accelerator hides them. Steps of all meshes alternate, so that other load slows all.
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
from medcg_jax.plan.programs import compile_training, plan_run, train_rows
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
# Of the measurements of the machine: side of the matrices, bytes of an array, payloads of a collective, repetitions.
SIDE, ARRAY_BYTES, PAYLOADS, REPEATS = 512, 1 << 20, (1 << 10, 1 << 21), 20


def median_seconds(call, rounds: int = 7) -> float:
    """Median seconds of `call`, which returns arrays; its first call compiles and does not count."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


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


def measure_machine() -> tuple[Machine, dict]:
    """What one of eight devices that work at once does in a second, and the measurements in words."""
    product = median_seconds(on_each(lambda x, w: x @ w, (SIDE, SIDE), (SIDE, SIDE))) / REPEATS
    numbers = ARRAY_BYTES // 4
    memory = median_seconds(on_each(lambda x, y: x + y, (numbers,), (numbers,))) / REPEATS

    def of_payload(payload: int, size: int) -> float:
        groups = [list(range(first, first + size)) for first in range(0, NUM_DEVICES, size)]

        def summed(x):
            return jax.lax.psum(x, "x", axis_index_groups=groups) * (1.0 / size)

        return median_seconds(on_each(summed, (payload // 4,))) / REPEATS

    small, large = ({size: of_payload(payload, size) for size in (2, 4, 8)} for payload in PAYLOADS)
    added = (PAYLOADS[1] - PAYLOADS[0]) * sum(RING["all-reduce"](size) for size in large)
    machine = Machine(
        flops_per_s=2 * SIDE**3 / product,
        memory_bytes_per_s=3 * ARRAY_BYTES / memory,
        link_bytes_per_s=added / (sum(large.values()) - sum(small.values())),
        network_bytes_per_s=1.0,
        island_of=(0,) * NUM_DEVICES,
        collective_s=statistics.mean(small.values()),
    )
    return machine, {
        "product_side": SIDE, "array_bytes": ARRAY_BYTES, "payload_bytes": PAYLOADS,
        "sum_s_by_devices": {"small": small, "large": large},
        "flops_per_s": machine.flops_per_s, "memory_bytes_per_s": machine.memory_bytes_per_s,
        "link_bytes_per_s": machine.link_bytes_per_s, "collective_s": machine.collective_s,
    }  # fmt: skip


class Step:
    """One training step compiled for a mesh, with arrays to run it on."""

    def __init__(self, run: RunConfig, mesh: MeshConfig):
        run = replace(run, mesh=mesh)
        planned = plan_run(run, make_mesh(mesh), alone=True)
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

    def run(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.state, metrics = self.program(self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began


def measure(run: RunConfig, rounds: int) -> dict:
    """The machine, and for each mesh its measured and simulated seconds a step; rank correlation and errors over all."""
    steps = [Step(run, mesh) for mesh in MESHES]
    machine, about = measure_machine()
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, measured in zip(steps, seconds, strict=True):
            taken = step.run()
            if number:  # the first one warms up
                measured.append(taken)
    after, about_after = measure_machine()
    rows = []
    for step, measured in zip(steps, seconds, strict=True):
        result = simulate(step.steps, machine)
        rows.append(
            step.sizes
            | {"measured_s": statistics.median(measured), "least_s": min(measured), "most_s": max(measured)}
            | {"simulated_s": result.step_s, "simulated_after_s": simulate(step.steps, after).step_s}
            | {"busy_s": result.busy_s, "collectives_s": result.collectives_s}
        )
    ratios = [row["simulated_s"] / row["measured_s"] for row in rows]
    scale = statistics.median(ratios)
    return {
        "model": run.model.name, "rows": run.train.batch_size, "rounds": rounds, "cores": os.cpu_count(),
        "machine": about, "machine_after": about_after, "meshes": rows,
        "spearman": float(spearmanr(*([row[key] for row in rows] for key in ("simulated_s", "measured_s"))).statistic),
        "simulated_over_measured": {"least": min(ratios), "median": scale, "most": max(ratios)},
        "largest_error_after_scaling": max(abs(ratio / scale - 1) for ratio in ratios),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/bench_tiny.py", metavar="FILE.py")
    parser.add_argument("--rows", type=int, default=16, help="of a step, over all devices (default: 16)")
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
    for row in sorted(result["meshes"], key=lambda row: row["measured_s"]):
        print(
            f"data {row['data']} x fsdp {row['fsdp']} x tensor {row['tensor']}: measured {row['measured_s'] * 1e3:7.1f} ms "
            f"({row['least_s'] * 1e3:.1f} to {row['most_s'] * 1e3:.1f}), simulated {row['simulated_s'] * 1e3:7.1f} "
            f"(computations {row['busy_s'] * 1e3:.1f}, collectives {row['collectives_s'] * 1e3:.1f})"
        )
    ratio = result["simulated_over_measured"]
    print(
        f"rank correlation {result['spearman']:.3f}; simulated over measured {ratio['median']:.2f} "
        f"({ratio['least']:.2f} to {ratio['most']:.2f})"
    )
    write_record(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
