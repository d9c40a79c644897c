"""The bytes that one training step must exchange on a mesh, by counting: what a compiled program is held against.

Sharded data parallelism (FSDP) gathers each weight in the compute dtype where it is used and reduces each gradient
once; tensor parallelism sums activations behind every matrix that is split by rows; replicas of the data sum gradients.
Sources: arXiv 1910.02054, section 7 (ZeRO: two gathers and a reduction of the parameters), arXiv 1909.08053, section 3
(two sums of activations a layer, forward and backward each).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medcg_jax.families import build
from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.nn.base import Base


def textbook_bytes(
    config: build.Config,
    mesh: Mesh,
    batch: Mapping[str, np.ndarray | jax.ShapeDtypeStruct],
    *,
    trainable: tuple[str, ...],
    accumulation_steps: int = 1,
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

    batch: shapes of the global batch of one cell, as `bench.example_batch`. trainable: `ModelConfig.trainable`.

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
    found: Counter[str] = Counter()
    for name in params:
        if name == "unused":
            continue
        flat = jax.tree_util.tree_flatten_with_path(params[name])[0]
        for (path, weight), spec in zip(flat, jax.tree.leaves(specs[name]), strict=True):
            names = [key.key for key in path]
            found.update(
                _of_weight(
                    weight, spec, mesh, width=width, trains=name in trainable, table=names[-1] == "table",
                    gathers=2 if "blocks" in names and (name in trainable or name == "decoder") else 1,
                )
            )  # fmt: skip
    num_images = batch["pixels"].shape[1]
    rows, length = batch["tokens"].shape
    local_rows = rows / (mesh.shape["data"] * mesh.shape["fsdp"] * accumulation_steps)
    found.update(_of_activations(config, mesh, local_rows * width, length, num_images, "decoder" in trainable))
    return {kind: round(size * accumulation_steps) for kind, size in found.items() if size}


def moved_bytes(by_kind: Mapping[str, float]) -> float:
    """Bytes that a device sends for these payloads, but for a factor (n - 1) / n of the n devices that exchange them.

    A sum that all keep is sent twice, as a sum of which each keeps a part and a gather; every other kind once.
    """
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, size in by_kind.items())


def _of_weight(weight, spec, mesh: Mesh, *, width: int, trains: bool, table: bool, gathers: int) -> dict[str, float]:
    axes = {axis for part in spec if part for axis in ([part] if isinstance(part, str) else part)}
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    whole = width * math.prod(weight.shape) / (tensor if "tensor" in axes else 1)
    split = "fsdp" in axes and fsdp > 1
    found = {}
    if split and not table:
        found["all-gather"] = gathers * whole
        found["reduce-scatter"] = whole * trains
    if split and data > 1:
        found["all-reduce"] = whole / fsdp * trains
    elif not split and data * fsdp > 1:
        found["all-reduce"] = whole * trains
    return found


def _of_activations(
    config: LlavaConfig, mesh: Mesh, row_bytes: float, length: int, num_images: int, table_trains: bool
) -> dict[str, float]:
    """row_bytes: of one number in each row of a device."""
    vision, text = config.vision, config.text
    embedded = row_bytes * length * text.embed_dim
    found = {}
    if mesh.shape["fsdp"] > 1:
        found["all-to-all"] = embedded * (2 if table_trains else 1)
    if mesh.shape["tensor"] > 1:
        sums = text.num_layers * (5 if config.remat == "full" else 4) + 1
        tower = row_bytes * num_images * (vision.num_patches + 1) * vision.embed_dim * 2 * vision.num_run_layers
        projected = row_bytes * num_images * vision.num_features * text.embed_dim
        found["all-reduce"] = sums * embedded + tower + projected
    return found
