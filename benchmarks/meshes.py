"""The mesh for each machine that LLaVA-1.5-7B is trained on, and the proof: compiled for it, what it needs and moves.

    python -m benchmarks.meshes [--json=FILE] [--config=FILE.py] [TOPOLOGY ...]

Every row is the product's own step, compiled by fast flags for a machine that need not be there; it holds if its peak
fits the device's memory and the bytes that it moves are within a tenth of the textbook's (`textbook`). Nothing is
executed: how fast a step is, this does not say.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from benchmarks import textbook
from medcg_jax.bench import steps as bench
from medcg_jax.config import ConfigError, MeshConfig, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.files import write_whole
from medcg_jax.plan import cells, topology

CONFIG = "configs/llava15_7b.py"
# How far the bytes moved may be from the textbook's.
TOLERANCE = 0.1
PAPER_BATCH_SIZE = 32


@dataclass(frozen=True)
class Row:
    """reason: why this mesh. batch_size: rows of a step; the paper's where data x fsdp divides it."""

    mesh: MeshConfig
    reason: str
    batch_size: int = PAPER_BATCH_SIZE


_WIDE = "the paper's 32 rows over data x fsdp, what is left to tensor: the fewest bytes at this batch"
_TPU7X = (
    "data=1: libtpu 0.0.52 sums gradients over data and fsdp at once on TPU7x and forms no reduce-scatter; "
    "so fsdp has the paper's 32 rows, and tensor the rest"
)
# Topology -> the mesh for a full fine-tune of the projector and decoder. A TPU7x chip is two devices.
MESHES = {
    "v5e:4x4": Row(
        MeshConfig(data=1, fsdp=8, tensor=2),
        "an fsdp group of the whole slice gets all-reduces in place of reduce-scatters; tensor=2 moves fewer bytes and "
        "needs less memory than data=2",
    ),
    "v5e:8x8": Row(MeshConfig(data=2, fsdp=16, tensor=2), _WIDE),
    "v5e:16x16": Row(MeshConfig(data=2, fsdp=16, tensor=8), _WIDE),
    "v5p:4x4x4": Row(MeshConfig(data=2, fsdp=16, tensor=2), _WIDE),
    "v5p:8x8x8": Row(MeshConfig(data=2, fsdp=16, tensor=16), _WIDE),
    "v6e:8x8": Row(MeshConfig(data=2, fsdp=16, tensor=2), _WIDE),
    "v6e:16x16": Row(MeshConfig(data=2, fsdp=16, tensor=8), _WIDE),
    "tpu7x:4x4x4": Row(MeshConfig(data=1, fsdp=32, tensor=4), _TPU7X),
    "tpu7x:4x8x8": Row(MeshConfig(data=1, fsdp=32, tensor=16), _TPU7X),
    "h100:8": Row(MeshConfig(data=1, fsdp=8), "one host: parameters over NVLink, 4 rows a GPU"),
    "h100:8x8": Row(
        MeshConfig(data=8, fsdp=8),
        "fsdp within a host, data across; one row a GPU: with tensor=2, for the paper's 32 rows, XLA's GPU compiler "
        "gathers weights three times",
        batch_size=64,
    ),
    "h200:1": Row(MeshConfig(data=1), "all 32 rows at once: micro-batches would need a float32 gradient beside"),
}


def check_row(run: RunConfig, where: str, row: Row) -> dict:
    """What the row's step needs per device and moves, the textbook's bytes, and whether it holds.

    `ratio` is bytes moved by the textbook's (None where neither moves any), `fits` whether the peak leaves
    `cells.MARGIN` of the memory free, `holds` whether both are as they should be.

    Raises:
      ConfigError: the topology cannot be compiled for here.
      ValueError: the program's text cannot be read.
    """
    run = replace(run, mesh=row.mesh, train__batch_size=row.batch_size)
    devices = topology.get_devices(where)
    found = cells.compiled_cells(run, devices, num_cells=1, num_groups=1)
    config = bench.architecture(run.model)
    mesh = jax.sharding.AbstractMesh(tuple(found["mesh"].values()), tuple(found["mesh"]))
    expected = textbook.textbook_bytes(
        config, mesh, cells.example_batch(run, config, mesh), trainable=run.model.trainable,
        accumulation_steps=run.train.accumulation_steps,
    )  # fmt: skip
    moved, usual = map(textbook.moved_bytes, (found["collective_bytes"], expected))
    limit = topology.memory_bytes(devices[0])
    ratio = moved / usual if usual else None
    fits = found["peak_bytes"] <= limit * (1 - cells.MARGIN)
    return found | {
        "topology": where, "reason": row.reason, "memory_bytes": limit, "textbook_bytes": expected,
        "ratio": ratio, "fits": fits,
        "holds": fits and (moved == 0 if ratio is None else abs(ratio - 1) <= TOLERANCE),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """0: every row holds; 1: one does not, or could not be compiled; 2: wrong use."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("topologies", nargs="*", metavar="TOPOLOGY", help=f"default: all of {', '.join(MESHES)}")
    parser.add_argument("--config", default=CONFIG, metavar="FILE.py", help=f"default: {CONFIG}")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    wanted = args.topologies or list(MESHES)
    unknown = [name for name in wanted if name not in MESHES]
    if unknown:
        print(f"{unknown[0]}: no mesh is recommended for it; one of {', '.join(MESHES)} is accepted", file=sys.stderr)
        return 2
    cells.use_fast_flags()
    rows = []
    try:
        run, about = load(args.config, {}), cells.about_compiling() | {"config": args.config, "flags": "O0"}
        for where in wanted:
            rows.append(_row(run, where))
            if args.json:  # after each: all of them take most of an hour
                write_whole(Path(args.json), json.dumps(about | {"rows": rows}, indent=1) + "\n")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(row["holds"] for row in rows) else 1


def _row(run: RunConfig, where: str) -> dict:
    """`check_row`, printed; what the compiler or the text's reader refuse is a row that does not hold."""
    try:
        row = check_row(run, where, MESHES[where])
    except ConfigError:
        raise
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        row = {"topology": where, "holds": False, "error": " ".join(str(error).split())[:500]}
        print(f"{where}: {row['error']}", file=sys.stderr)
        return row
    print_row(row)
    return row


def print_row(row: dict) -> None:
    sizes = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if axis != "cell")
    peak, limit = (row[name] / topology.GIB for name in ("peak_bytes", "memory_bytes"))
    ratio = "none" if row["ratio"] is None else f"{row['ratio']:.3f}"
    print(
        f"{row['topology']:13}{sizes:32}rows {row['batch']['size']:3}  peak {peak:6.2f} of {limit:.2f} GiB  "
        f"moved / textbook {ratio}  {row['compile_s']:.0f} s  {'holds' if row['holds'] else 'DOES NOT HOLD'}",
        flush=True,
    )
    for name in ("collective_bytes", "textbook_bytes"):
        sizes = (f"{kind} {size / cells.GB:.3f} GB" for kind, size in row[name].items() if size)
        print(f"  {name:17}{', '.join(sizes)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
