"""The mesh for each machine that LLaVA-1.5-7B is trained on, and the proof: compiled for it, what it needs and moves.

    python -m benchmarks.meshes [--json=FILE] [--config=FILE.py] [TOPOLOGY ...]

Every row is the product's step, compiled with fast flags for a machine that may be absent. A row holds if the peak fits
the device's memory and the bytes moved are within a tenth of the textbook's. Nothing is executed, so speed is not
measured.

The textbook: sharded data parallelism (FSDP) gathers each weight in the compute dtype where it is used and reduces each
gradient once; tensor parallelism sums activations after every matrix that is split by rows; data parallel replicas sum
gradients. Sources: arXiv 1910.02054, section 7 (ZeRO: two gathers and a reduction of the parameters), arXiv 1909.08053,
section 3 (two sums of activations a layer, forward and backward each).
"""

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.cells_compiled import GB, compiled_step
from benchmarks.records import write_record
from medcg_jax.config import ConfigError, MeshConfig, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.families import build
from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.base import Base
from medcg_jax.plan import topology
from medcg_jax.plan.programs import MARGIN, Shapes, batch_of, effort, plan_run, train_rows

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


_WIDE = "the paper's 32 rows over data x fsdp, what is left to tensor"
_TENSOR_4 = (
    "two rows a device and half of the parameters' bytes: by the schedules of 64 v5e, v5p and v6e 167, 69 and 53 ms a step, "
    "of which 56, 11 and 22 exposed, where data=2 and tensor=2 take 174, 85 and 83, of which 58, 36 and 53"
)
_TPU7X = (
    "data=1: libtpu 0.0.52 sums gradients over data and fsdp at once on TPU7x and forms no reduce-scatter; "
    "so fsdp has the paper's 32 rows, and tensor the rest"
)
# Topology -> the mesh for a full fine-tune of the projector and decoder. A TPU7x chip is two devices.
MESHES = {
    "v5e:4x4": Row(
        MeshConfig(data=1, fsdp=16),
        "parameters and gradients travel as permutes beside products: 473 ms a step by its schedule, of which 12 exposed, "
        "where fsdp=8 with tensor=2 takes 492 and waits 22 for sums over tensor, and with data=2 561",
    ),
    "v5e:8x8": Row(MeshConfig(data=1, fsdp=16, tensor=4), _TENSOR_4),
    "v5e:16x16": Row(MeshConfig(data=2, fsdp=16, tensor=8), _WIDE),
    "v5p:4x4x4": Row(MeshConfig(data=1, fsdp=16, tensor=4), _TENSOR_4),
    "v5p:8x8x8": Row(MeshConfig(data=2, fsdp=16, tensor=16), _WIDE),
    "v6e:8x8": Row(MeshConfig(data=1, fsdp=16, tensor=4), _TENSOR_4),
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
    """Memory and bytes moved of the row's step per device, the textbook's bytes, and whether the row holds.

    `ratio` is bytes moved over the textbook's (None where the textbook moves none), `fits` whether the peak leaves
    `MARGIN` of the memory free, `holds` whether it fits and the ratio is within `TOLERANCE` of 1.

    Raises:
      ConfigError: the topology cannot be compiled for here.
      ValueError: the program's text cannot be read.
    """
    run = replace(run, mesh=row.mesh, train__batch_size=row.batch_size)
    devices = topology.get_devices(where)
    planned = plan_run(run, make_mesh(run.mesh, devices))
    figures = compiled_step(planned, countable=False)
    expected = textbook_bytes(
        planned.setup.model, planned.mesh, batch_of(train_rows(planned.setup), row.batch_size),
        trainable=run.model.trainable, accumulation_steps=run.train.accumulation_steps,
    )  # fmt: skip
    moved, usual = moved_bytes(figures["collective_bytes"]), moved_bytes(expected)
    limit = topology.memory_bytes(devices[0])
    ratio = moved / usual if usual else None
    fits = figures["peak_bytes"] <= limit * (1 - MARGIN)
    return figures | {
        "topology": where, "reason": row.reason, "memory_bytes": limit, "textbook_bytes": expected,
        "ratio": ratio, "fits": fits,
        "holds": fits and (moved == 0 if ratio is None else abs(ratio - 1) <= TOLERANCE),
    }  # fmt: skip


# ------------------------------------------------------------------ the textbook


def textbook_bytes(
    config: build.Config, mesh: Mesh, batch: Shapes, *, trainable: tuple[str, ...], accumulation_steps: int = 1
) -> dict[str, int]:
    """Payload in bytes per device and step of one cell, by kind of collective, as `hlo.bytes_by_kind` counts a program.

    With b bytes a number of the compute dtype, and of each weight n numbers on a device once fsdp is gathered (all of
    them, divided by tensor where that splits it):

    all-gather: b n of every weight that fsdp splits, once; of a stack that gradients pass through, once more, since
      the backward pass gathers a layer's weights anew (with rematerialisation its recomputation and its gradient
      share that gather; without, the forward pass does not keep them either). Embedding tables are not gathered.
    reduce-scatter: b n of every trainable weight that fsdp splits; a table's gradient arises on its part.
    all-reduce: over `data`, b n / fsdp of every trainable weight, or b n over data x fsdp where fsdp does not split
      it; over `tensor`, the activations: with a the bytes of a decoder layer's input on one device, 2 a a layer
      forward and 2 a backward, and 1 a where the layer is rematerialised (of its attention; nobody asks for the sum
      behind its MLP again); 2 of the tower's a layer, forward; 1 of the projector's output; 1 of the looked up rows.
    all-to-all: over `fsdp`, looked up rows exchanged for parts of the width, a forward and, where the table trains,
      a backward.

    Everything is once for each micro-batch. Logits, norms' statistics and the batch's own arrays are left out: less
    than 1 % of a 7B model.

    batch: shapes of the global batch of one cell, as `programs.batch_of`. trainable: `ModelConfig.trainable`.

    Raises:
      ValueError: the model is none of LLaVA-1.5's architecture.
    """
    if config.family != "llava":
        raise ValueError(f"{type(config).__name__}: what a step moves is counted for LLaVA-1.5 alone")
    # Quantised matrices travel as what they are made into.
    config = dataclasses.replace(config, base=Base())
    _, params = build.abstract(config)
    specs = jax.tree.map(lambda sharding: sharding.spec, build.shardings(config, mesh))
    width = jnp.dtype(config.compute_dtype).itemsize
    by_kind: Counter[str] = Counter()
    for name in params:
        if name == "unused":
            continue
        flat = jax.tree_util.tree_flatten_with_path(params[name])[0]
        for (path, weight), spec in zip(flat, jax.tree.leaves(specs[name]), strict=True):
            names = [key.key for key in path]
            by_kind.update(
                _of_weight(
                    weight, spec, mesh, width=width, trains=name in trainable, table=names[-1] == "table",
                    gathers=2 if "blocks" in names and (name in trainable or name == "decoder") else 1,
                )
            )  # fmt: skip
    num_images = batch["pixels"].shape[1]
    rows, length = batch["tokens"].shape
    local_rows = rows / (mesh.shape["data"] * mesh.shape["fsdp"] * accumulation_steps)
    by_kind.update(_of_activations(config, mesh, local_rows * width, length, num_images, "decoder" in trainable))
    return {kind: round(size * accumulation_steps) for kind, size in by_kind.items() if size}


def moved_bytes(by_kind: Mapping[str, float]) -> float:
    """Bytes that a device sends for these payloads, but for a factor (n - 1) / n of the n devices that exchange them.

    A sum that all keep is sent twice, as a sum of which each keeps a part and a gather; every other kind once.
    """
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, size in by_kind.items())


def _of_weight(weight, spec, mesh: Mesh, *, width: int, trains: bool, table: bool, gathers: int) -> dict[str, float]:
    axes = {axis for entry in spec if entry for axis in ([entry] if isinstance(entry, str) else entry)}
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    whole = width * math.prod(weight.shape) / (tensor if "tensor" in axes else 1)
    split = "fsdp" in axes and fsdp > 1
    by_kind = {}
    if split and not table:
        by_kind["all-gather"] = gathers * whole
        by_kind["reduce-scatter"] = whole * trains
    if split and data > 1:
        by_kind["all-reduce"] = whole / fsdp * trains
    elif not split and data * fsdp > 1:
        by_kind["all-reduce"] = whole * trains
    return by_kind


def _of_activations(
    config: LlavaConfig, mesh: Mesh, row_bytes: float, length: int, num_images: int, table_trains: bool
) -> dict[str, float]:
    """row_bytes: of one number in each row of a device."""
    vision, text = config.vision, config.text
    embedded = row_bytes * length * text.embed_dim
    by_kind = {}
    if mesh.shape["fsdp"] > 1:
        by_kind["all-to-all"] = embedded * (2 if table_trains else 1)
    if mesh.shape["tensor"] > 1:
        sums = text.num_layers * (5 if config.remat == "full" else 4) + 1
        tower = row_bytes * num_images * (vision.num_patches + 1) * vision.embed_dim * 2 * vision.num_run_layers
        projected = row_bytes * num_images * vision.num_features * text.embed_dim
        by_kind["all-reduce"] = sums * embedded + tower + projected
    return by_kind


# ------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    """0: every row holds; 1: one does not, or could not be compiled; 2: wrong use."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("topologies", nargs="*", metavar="TOPOLOGY", help=f"default: all of {', '.join(MESHES)}")
    parser.add_argument("--config", default=CONFIG, metavar="FILE.py", help=f"default: {CONFIG}")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    unknown = [name for name in args.topologies if name not in MESHES]
    if unknown:
        print(f"{unknown[0]}: no mesh is recommended for it; expected one of {', '.join(MESHES)}", file=sys.stderr)
        return 2
    rows = []
    try:
        run = load(args.config, {})
        with effort(full=False):
            for where in args.topologies or MESHES:
                rows.append(_row(run, where))
                # After each: all of them take most of an hour.
                write_record(args.json, {"config": args.config, "flags": "O0", "rows": rows})
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
        sizes = (f"{kind} {size / GB:.3f} GB" for kind, size in row[name].items() if size)
        print(f"  {name:17}{', '.join(sizes)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
