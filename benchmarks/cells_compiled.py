"""Several cells in one program against one cell on its part of the machine, compiled for a machine that is not there.

    python -m benchmarks.cells_compiled --config=configs/llava15_7b.py --topology=v5p:4x4x4 --cells=4 [--json=FILE]
    python -m benchmarks.cells_compiled --config=configs/minigpt_v2_7b.py --topology=h100:8 --cells=8 --groups=2
    python -m benchmarks.cells_compiled --config=configs/llava15_7b.py --topology=h100:8 --groups=2 --cells=0

Prints memory, bytes moved, and collectives that leave a cell, of the product's step at full size. `--cells=0` finds how
many cells fit. Nothing is executed, so speed is not measured.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import jax

from benchmarks.records import overrides
from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.files import write_whole
from medcg_jax.mesh import make_mesh
from medcg_jax.plan import hlo, topology
from medcg_jax.plan.programs import PlannedRun, batch_of, effort, fitting_run, plan_run, print_fitting, train_rows

GB = 1e9


def compiled_step(planned: PlannedRun, *, countable: bool = True) -> dict:
    """The run's training step per device: bytes of memory and of collectives by kind, and collectives that leave a cell.

    countable: as in `topology.compiler_options`.

    Raises:
      ValueError: the program's collectives cannot be read (`hlo`), or it has none on several devices.
    """
    mesh, batch = planned.mesh, batch_of(train_rows(planned.setup), planned.run.train.batch_size)
    options = topology.compiler_options(mesh.devices.flat[0], countable)
    _, compiled, lower_s, compile_s = planned.program.compile(planned.trainable, planned.frozen, batch, options)
    text, memory = topology.text_of(compiled, options), compiled.memory_analysis()
    collectives = hlo.collectives(text)
    groups = mesh.shape["cell"]
    across = hlo.crossing(collectives, num_devices=mesh.size, num_groups=groups) if mesh.size > 1 else []
    by_kind = hlo.bytes_by_kind(collectives)
    return {
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "num_cells": planned.num_cells,
        "batch": dict(zip(("size", "length"), batch["tokens"].shape, strict=True)),
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collective_bytes": by_kind,
        "collective_bytes_sum": sum(by_kind.values()),
        "num_collectives": len(collectives),
        "crossing": [f"{collective.kind} {collective.name}" for collective in across],
        "attention": hlo.attention_in(text),
        "lower_s": round(lower_s, 1),
        "compile_s": round(compile_s, 1),
    }


def planned_cells(run: RunConfig, devices: list[jax.Device], num_cells: int, num_groups: int) -> PlannedRun:
    mesh = make_mesh(dataclasses.replace(run.mesh, cell=num_groups), devices)
    return plan_run(replace(run, study__cells_at_once=num_cells), mesh)


def against_one(run: RunConfig, where: str, *, num_cells: int, num_groups: int) -> dict:
    """{"cells", "alone", "ratio"}: so many cells at once, one cell on its own part of the machine, and cells / alone.

    where: a topology, or "local".

    Raises:
      ConfigError: the topology is unknown or cannot be divided so, or the mesh does not fit it or the batch.
    """
    cells = compiled_step(planned_cells(run, topology.get_devices(where), num_cells, num_groups))
    alone = compiled_step(planned_cells(run, part_devices(where, num_groups), 1, 1))
    names = ("peak_bytes", "collective_bytes_sum")
    return {"cells": cells, "alone": alone, "ratio": {name: cells[name] / alone[name] for name in names}}


def part_topology(name: str, num_parts: int) -> str:
    """One of `num_parts` equal parts: fewer slices or GPU hosts while that halves, then half of the longest side.

    "v5e:4x4*2", 4 -> "v5e:2x4"; "v5p:4x4x4", 4 -> "v5p:4x2x2", of equal sides the last; "h100:8x8", 16 -> "h100:1x4"

    Raises:
      ConfigError: the topology does not divide into `num_parts`.
    """
    kind, sizes, num_slices = topology.parse(name)
    sides, left = list(sizes), num_parts
    while left > 1:
        longest = max(range(len(sides)), key=lambda i: (sides[i], i))
        if kind in topology.GPU_TARGETS and sides[0] > 1:
            longest = 0
        if left % 2 or (num_slices if num_slices > 1 else sides[longest]) % 2:
            raise ConfigError(f"topology={name} in {num_parts} parts: expected a power of 2 that divides it")
        if num_slices > 1:
            num_slices //= 2
        else:
            sides[longest] //= 2
        left //= 2
    return f"{kind}:{'x'.join(map(str, sides))}" + (f"*{num_slices}" if num_slices > 1 else "")


def part_devices(name: str, num_parts: int) -> list[jax.Device]:
    """Devices of `part_topology`, as a machine of its own; of "local" the first of this process's.

    Raises:
      ConfigError: as `topology.get_devices` and `part_topology`.
    """
    if name != "local":
        return topology.get_devices(part_topology(name, num_parts))
    devices = jax.devices()
    if len(devices) % num_parts:
        raise ConfigError(f"{len(devices)} local devices in {num_parts} parts: expected a divisor")
    return devices[: len(devices) // num_parts]


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
    args, flags = parser.parse_known_args(argv)
    groups, here = args.groups or max(args.cells, 1), topology.about_here()
    figures = {"topology": args.topology}
    try:
        run = load(args.config, overrides(flags))
        with effort(args.optimize):
            if args.cells:
                figures |= against_one(run, args.topology, num_cells=args.cells, num_groups=groups)
                good = not figures["cells"]["crossing"]
                print_compared(figures)
            else:
                fitting = fitting_run(run, args.topology, num_groups=groups)
                figures |= {"num_groups": groups} | dataclasses.asdict(fitting)
                good = fitting.num_cells > 0
                print_fitting(fitting, args.topology, groups)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    about = {"date": here["date"], "versions": here["versions"], "config": args.config, "flags": flags}
    about |= {"full_effort": args.optimize, "model": run.model.name, "trainable": list(run.model.trainable)}
    if args.json:
        file = Path(args.json)
        rows = json.loads(file.read_text()) if file.exists() else []
        write_whole(file, json.dumps([*rows, about | figures], indent=1) + "\n")
    return 0 if good else 1


def print_compared(figures: dict) -> None:
    titles = f"{'cells':>6}{'args':>8}{'temp':>8}{'peak GiB':>10}{'GB moved':>10}{'collectives':>13}{'crossing':>10}"
    print(f"{'':28}{titles}")
    for name in ("cells", "alone"):
        row = figures[name]
        machine = f"{math.prod(row['mesh'].values())} x {row['device']}"
        gib = [row[f"{kind_bytes}_bytes"] / topology.GIB for kind_bytes in ("argument", "temp", "peak")]
        print(
            f"{machine:28}{row['num_cells']:6}{gib[0]:8.3f}{gib[1]:8.3f}{gib[2]:10.3f}"
            f"{row['collective_bytes_sum'] / GB:10.3f}{row['num_collectives']:13}{len(row['crossing']):10}"
        )
        print("  " + ", ".join(f"{kind} {size / GB:.3f}" for kind, size in row["collective_bytes"].items()))
        rows = f"{row['batch']['size']} x {row['batch']['length']}"
        print(f"  mesh {row['mesh']}, attention {row['attention']}, rows {rows}")
    ratio = figures["ratio"]
    print(f"cells / alone: peak {ratio['peak_bytes']:.4f}, bytes moved {ratio['collective_bytes_sum']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
