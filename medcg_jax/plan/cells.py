"""Several cells in one program, compiled for a machine that need not be there: memory, bytes moved, what leaves one.

    python -m medcg_jax.plan.cells --config=configs/llava15_7b.py --topology=v5p:4x4x4 --cells=4 [--json=FILE]
    python -m medcg_jax.plan.cells --config=configs/minigpt_v2_7b.py --topology=h100:8 --cells=8 --groups=2
    python -m medcg_jax.plan.cells --config=configs/llava15_7b.py --topology=h100:8 --groups=2 --cells=0

The step is the product's own, of abstract parameters at full size, and compiled beside one cell on its part of the
machine. `--cells=0` looks for as many as fit. Nothing is executed: how fast a step is, this does not say.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.bench import steps as bench
from medcg_jax.config import ConfigError, RunConfig
from medcg_jax.config_file import load
from medcg_jax.families import build
from medcg_jax.files import write_whole
from medcg_jax.mesh import check_batch, make_mesh
from medcg_jax.plan import hlo, topology
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import make_optimizer
from medcg_jax.train.step import Program, make_step

COMPILERS = ("libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cudnn-cu12")
GB = 1e9
# What allocators, collectives and other programs take beside a step, as a part of a device's memory.
MARGIN = 0.1


def make_program(
    run: RunConfig, config: build.Config, mesh: Mesh, *, num_cells: int, loss_fn: Callable = token_loss
) -> tuple[Program, nnx.State, nnx.State]:
    """(the run's training step for `num_cells` cells on `mesh`, abstract trainable and frozen parameters of one run).

    config: the architecture. loss_fn: as `train.setup.Setup.loss`.
    """
    graphdef, params = build.abstract(config)
    split = partial(build.split_trainable, names=run.model.trainable)
    program = make_step(
        mesh, graphdef, *split(build.shardings(config, mesh)), make_optimizer(run.train), num_cells=num_cells,
        loss_fn=loss_fn, accumulation_steps=run.train.accumulation_steps, compute_dtype=run.model.compute_dtype,
    )  # fmt: skip
    return program, *split(params)


def compile_step(
    run: RunConfig,
    config: build.Config,
    mesh: Mesh,
    batch: dict[str, np.ndarray],
    *,
    num_cells: int,
    options: dict | None = None,
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """(`make_program`'s step of the text's loss, compiled, seconds to lower and to compile); allocates nothing.

    config: the architecture. batch: of one cell; its shapes and dtypes alone are used.
    options: what to compile with; None: `topology.compiler_options`.
    """
    program, trainable, frozen = make_program(run, config, mesh, num_cells=num_cells)
    options = topology.compiler_options(mesh.devices.flat[0]) if options is None else options
    _, compiled, lower_s, compile_s = program.compile(trainable, frozen, batch, options)
    return compiled, {"lower_s": round(lower_s, 1), "compile_s": round(compile_s, 1)}


def measure(compiled: jax.stages.Compiled, text: str, mesh: Mesh) -> dict:
    """What a compiled step needs per device: bytes of memory, and of collectives by kind; and how many leave a cell.

    text: the program's, as `topology.text_of` gives it.

    Raises:
      ValueError: the program's collectives cannot be read (`hlo`), or it has none though devices are several.
    """
    found = hlo.collectives(text)
    groups = mesh.shape["cell"]
    across = hlo.crossing(found, num_devices=mesh.size, num_groups=groups) if mesh.size > 1 else []
    by_kind = hlo.bytes_by_kind(found)
    memory = compiled.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collective_bytes": by_kind,
        "collective_bytes_sum": sum(by_kind.values()),
        "num_collectives": len(found),
        "crossing": [f"{one.kind} {one.name}" for one in across],
        "attention": bench.attention_in(text),
    }


def compiled_cells(run: RunConfig, devices: list[jax.Device], *, num_cells: int, num_groups: int) -> dict:
    """`measure` of the run's step for so many cells in so many groups of the devices, and what it was.

    Rows are of the longest text that the run's data may have.

    Raises:
      ConfigError: the mesh does not fit the devices or the batch.
    """
    config = bench.architecture(run.model)
    mesh = make_mesh(dataclasses.replace(run.mesh, cell=num_groups), devices)
    batch = example_batch(run, config, mesh)
    options = topology.compiler_options(devices[0])
    compiled, seconds = compile_step(run, config, mesh, batch, num_cells=num_cells, options=options)
    about = {
        "device": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "num_cells": num_cells,
        "batch": {"size": len(batch["tokens"]), "length": batch["tokens"].shape[1]},
    }
    return about | measure(compiled, topology.text_of(compiled, options), mesh) | seconds


def example_batch(run: RunConfig, config: build.Config, mesh: Mesh) -> dict[str, np.ndarray]:
    """A batch of one cell, with the shapes of the run's data.

    Raises:
      ConfigError: the mesh does not divide it.
    """
    check_batch(mesh, run.train.batch_size // run.train.accumulation_steps, "train.batch_size per accumulation step")
    most = run.data.max_text_tokens
    return bench.example_batch(
        config, batch_size=run.train.batch_size, text_tokens=(most // 2, most), num_targets=run.data.max_target_tokens
    )


def against_one(run: RunConfig, where: str, *, num_cells: int, num_groups: int) -> dict:
    """{"cells", "alone", "ratio"}: so many cells at once, one cell on its own part of the machine, and cells / alone.

    where: a topology, or "local".

    Raises:
      ConfigError: the topology is unknown or cannot be divided so, or the mesh does not fit it or the batch.
    """
    cells = compiled_cells(run, topology.get_devices(where), num_cells=num_cells, num_groups=num_groups)
    alone = compiled_cells(run, topology.get_part(where, num_groups), num_cells=1, num_groups=1)
    names = ("peak_bytes", "collective_bytes_sum")
    return {"cells": cells, "alone": alone, "ratio": {name: cells[name] / alone[name] for name in names}}


# ------------------------------------------------------------------ as many cells as fit


@dataclass(frozen=True)
class Fit:
    """How many cells fit: 0 where not one does in every group.

    peaks: cells -> peak bytes of a device, of every program that was compiled; inf: the compiler said it does not fit.
    usable_bytes: of a device, less the margin.
    """

    num_cells: int
    peaks: dict[int, float]
    usable_bytes: float


def fitting_cells(
    compile_cells: Callable[[int], jax.stages.Compiled],
    *,
    num_groups: int,
    limit_bytes: float,
    margin: float = MARGIN,
    most: int = 64,
) -> Fit:
    """The largest number of cells, a multiple of `num_groups` and at most `most`, whose program fits a device's memory.

    What fits is what the compiler says: the peak that its plan of buffers has at any moment, arguments included. It
    grows by the same bytes for each further cell of a group, so two programs foretell the third, which is compiled to
    confirm it; where it does not, the search goes on between what fitted and what did not.

    compile_cells: the program of so many cells, as `compile_step` makes it (allocates nothing).
    num_groups: of devices, each with its own cells: the size of the mesh's axis `cell`.
    limit_bytes: memory of one device (`topology.memory_bytes`). margin: part of it that is left free.

    Raises:
      ValueError: `most` is below `num_groups`, or the compiler gives no peak.
    """
    if most < num_groups:
        raise ValueError(f"most={most}: at least one cell in each of {num_groups} groups is accepted")
    usable, peaks = limit_bytes * (1 - margin), {}

    def fits(local: int) -> bool:
        if local * num_groups not in peaks:
            peaks[local * num_groups] = _peak(compile_cells, local * num_groups)
        return peaks[local * num_groups] <= usable

    # `good` cells in a group fit, `bad` do not; none is known to fit at first, and more than `most` are not asked for.
    good, bad = 0, most // num_groups + 1
    guess = 1
    while good + 1 < bad:
        good, bad = (guess, bad) if fits(guess) else (good, guess)
        foretold = _foretold(peaks, num_groups, usable, good)
        # A number that was refuted foretells nothing more: halfway then.
        guess = (good + bad) // 2 if foretold >= bad <= most // num_groups else min(max(foretold, good + 1), bad - 1)
    return Fit(good * num_groups, dict(sorted(peaks.items())), usable)


def _foretold(peaks: dict[int, float], num_groups: int, usable: float, good: int) -> int:
    """Cells in a group that would fill the memory, by the two largest programs with a known peak."""
    known = sorted((cells // num_groups, peak) for cells, peak in peaks.items() if peak < math.inf)[-2:]
    if len(known) < 2:
        return good + 1
    (fewer, low), (more, high) = known
    each = (high - low) / (more - fewer)
    return more + math.floor((usable - high) / each) if each > 0 else sys.maxsize


def _peak(compile_cells: Callable[[int], jax.stages.Compiled], num_cells: int) -> float:
    try:
        analysis = compile_cells(num_cells).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    if not peak:
        raise ValueError(f"the compiler gives no peak memory for {num_cells} cells")
    return peak


# ------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    """0: no collective leaves a cell (with `--cells=0`: at least one cell in each group fits); 1: not; 2: wrong use."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="--config.a.b=value changes a field, as for `medcg`"
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:arg]")
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v6e:8x8, h100:8, local")
    parser.add_argument("--cells", type=int, required=True, help="at once; 0: as many as fit")
    parser.add_argument("--groups", type=int, default=0, help="of devices, sharing the cells; 0: one a cell")
    parser.add_argument("--optimize", action="store_true", help="full effort of the compiler: slower, more real")
    parser.add_argument("--json", metavar="FILE", help="a list, to which this is added")
    args, rest = parser.parse_known_args(argv)
    groups = args.groups or max(args.cells, 1)
    if not args.optimize:
        use_fast_flags()
    try:
        run = load(args.config, _overrides(rest))
        about = about_compiling() | {"config": args.config, "flags": rest, "full_effort": args.optimize}
        if args.cells:
            found = {"topology": args.topology}
            found |= against_one(run, args.topology, num_cells=args.cells, num_groups=groups)
            good = not found["cells"]["crossing"]
            print_compared(found)
        else:
            from medcg_jax.plan.programs import fitting_run  # which knows every family, and imports this module

            fit = fitting_run(run, args.topology, num_groups=groups)
            found = {"topology": args.topology, "num_groups": groups} | dataclasses.asdict(fit)
            good = fit.num_cells > 0
            print_fit(found)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    result = about | {"model": run.model.name, "trainable": list(run.model.trainable)} | found
    if args.json:
        file = Path(args.json)
        rows = json.loads(file.read_text()) if file.exists() else []
        write_whole(file, json.dumps([*rows, result], indent=1) + "\n")
    return 0 if good else 1


def fast_flags() -> dict[str, str | float]:
    """Settings of `jax.config` with which the compiler does little: memory and times are not production's, collectives
    nearly are."""
    wanted = {"jax_optimization_level": "O0", "jax_exec_time_optimization_effort": -1.0}
    return {name: value for name, value in wanted.items() if hasattr(jax.config, name)}  # jax 0.11 has the first alone


def use_fast_flags() -> None:
    """Sets `fast_flags` for this process."""
    for name, value in fast_flags().items():
        jax.config.update(name, value)


def _overrides(flags: list[str]) -> dict[str, str]:
    """{"a.b": "value"} of --config.a.b=value."""
    for flag in flags:
        if not flag.startswith("--config.") or "=" not in flag:
            raise ConfigError(f"{flag}: --config.KEY=VALUE is accepted")
    return dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)


def about_compiling() -> dict:
    """Date and versions, the compilers' included."""
    here = bench.about_here()
    for package in COMPILERS:
        try:
            here["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return {"date": here["date"], "versions": here["versions"]}


def print_compared(found: dict) -> None:
    titles = f"{'cells':>6}{'args':>8}{'temp':>8}{'peak GiB':>10}{'GB moved':>10}{'collectives':>13}{'crossing':>10}"
    print(f"{'':28}{titles}")
    for name in ("cells", "alone"):
        row = found[name]
        machine = f"{math.prod(row['mesh'].values())} x {row['device']}"
        gib = [row[f"{part}_bytes"] / topology.GIB for part in ("argument", "temp", "peak")]
        print(
            f"{machine:28}{row['num_cells']:6}{gib[0]:8.3f}{gib[1]:8.3f}{gib[2]:10.3f}"
            f"{row['collective_bytes_sum'] / GB:10.3f}{row['num_collectives']:13}{len(row['crossing']):10}"
        )
        print("  " + ", ".join(f"{kind} {size / GB:.3f}" for kind, size in row["collective_bytes"].items()))
        rows = f"{row['batch']['size']} x {row['batch']['length']}"
        print(f"  mesh {row['mesh']}, attention {row['attention']}, rows {rows}")
    ratio = found["ratio"]
    print(f"cells / alone: peak {ratio['peak_bytes']:.4f}, bytes moved {ratio['collective_bytes_sum']:.4f}")


def print_fit(found: dict) -> None:
    for cells, peak in found["peaks"].items():
        print(f"  {cells:4} cells: peak {peak / topology.GIB:.3f} GiB a device")
    usable = found["usable_bytes"] / topology.GIB
    where = f"{found['topology']} in {found['num_groups']} groups"
    print(f"{found['num_cells']} cells fit {where} ({usable:.2f} GiB usable a device)")


if __name__ == "__main__":
    sys.exit(main())
