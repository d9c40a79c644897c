"""Several fine-tunes in one program against the same one after another, here, in one run.

    python -m benchmarks.cells [--config=configs/phantom.py] [--cells=4] [--json=FILE]

Blocks of steps of both alternate, so that other load on the machine slows both. The ratio of medians is above 1 where
cells at once are slower.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from benchmarks.records import write_record
from medcg_jax.config import ConfigError, RunConfig
from medcg_jax.config_file import load
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import concat
from medcg_jax.families.build import shardings, split_trainable
from medcg_jax.mesh import put_batch
from medcg_jax.platform import keep_freed_memory
from medcg_jax.train.optim import hparams_from, make_optimizer, stack_hparams
from medcg_jax.train.setup import Setup, open_setup, start_params, with_small_tokenizer
from medcg_jax.train.step import Program, make_step

STEPS, BLOCKS = 10, 5


class Training:
    """`num_cells` cells in one program, on rows of two subsets."""

    def __init__(self, setup: Setup, graphdef, params, encoded, num_cells: int):
        run, names = setup.run, setup.run.model.trainable
        trainable, self.frozen = split_trainable(params, names)
        self.program: Program = make_step(
            setup.mesh, graphdef, *split_trainable(shardings(setup.model, setup.mesh), names),
            make_optimizer(run.train), num_cells=num_cells, loss_fn=setup.loss,
            accumulation_steps=run.train.accumulation_steps, compute_dtype=run.model.compute_dtype,
        )  # fmt: skip
        hparams = hparams_from(dataclasses.replace(run.train, steps=10**6), 1)  # longer than is measured
        self.hparams = self.program.put_hparams(stack_hparams([hparams] * num_cells) if num_cells > 1 else hparams)
        self.streams = [
            Batches(encoded, batch_size=run.train.batch_size, seed=seed, position=0) for seed in range(num_cells)
        ]
        self.state, self.num_cells = self.program.start(trainable), num_cells

    def run(self, num_steps: int) -> None:
        """As in the training loop: a batch of each cell, then one step."""
        for _ in range(num_steps):
            batches = [next(stream)[0] for stream in self.streams]
            batch = batches[0]
            if self.num_cells > 1:
                batch = {key: np.stack([rows[key] for rows in batches]) for key in batch}
            on_device = put_batch(batch, self.program.batch_sharding)
            self.state, metrics = self.program(self.state, self.frozen, self.hparams, on_device)
        jax.block_until_ready(metrics)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def bench_cells(run: RunConfig, *, num_cells: int = 4, num_steps: int = STEPS, num_blocks: int = BLOCKS) -> dict:
    """{"at_once", "one_by_one"}: seconds of each block (wall and CPU) for so many steps of all cells; and their ratios.

    Raises:
      ConfigError, DataError: as `open_setup`.
    """
    setup = open_setup(with_small_tokenizer(run), has_weights=True)
    names = [subset.name for subset in setup.source.subsets[:2]]
    encoded = setup.encode(concat([setup.source.records(name, "train") for name in names]))
    graphdef, params = start_params(setup, seed=0)
    both = {
        "at_once": Training(setup, graphdef, params, encoded, num_cells),
        "one_by_one": Training(setup, graphdef, params, encoded, 1),
    }
    steps = {"at_once": num_steps, "one_by_one": num_steps * num_cells}
    wall, cpu = ({name: [] for name in both} for _ in range(2))
    try:
        for training in both.values():
            training.run(2)  # compiles
        for _ in range(num_blocks):
            for name, training in both.items():
                began = time.perf_counter(), time.process_time()
                training.run(steps[name])
                wall[name].append(time.perf_counter() - began[0])
                cpu[name].append(time.process_time() - began[1])
    finally:
        for training in both.values():
            training.close()

    def ratio(seconds: dict) -> float:
        return statistics.median(seconds["at_once"]) / statistics.median(seconds["one_by_one"])

    return {
        "num_cells": num_cells, "num_steps": num_steps, "devices": len(jax.devices()),
        "device": jax.devices()[0].device_kind, "wall_s": wall, "cpu_s": cpu,
        "ratio": ratio(wall), "ratio_cpu": ratio(cpu),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/phantom.py", metavar="FILE.py[:arg]")
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        figures = bench_cells(load(args.config, {}), num_cells=args.cells)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for name in ("one_by_one", "at_once"):
        seconds = ", ".join(f"{s:.2f}" for s in figures["wall_s"][name])
        print(f"{name:10}: {seconds} s for {figures['num_steps']} steps of all")
    ratios = f"{figures['ratio']:.2f} times as long as one by one ({figures['ratio_cpu']:.2f} times the CPU time)"
    print(f"{args.cells} cells at once take {ratios}")
    write_record(args.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
