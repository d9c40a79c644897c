"""The weights of both sides of a parity check: their comparison, and weights that hide no fault.

torch's initial weights hide faults: biases of 0, norms of 1, gates of 0 that shut cross-attention off, matrices so small
that every activation is in its linear range. `telling` gives both sides other weights, the same on both, computed from
those that each side has loaded, so that a wrongly loaded tensor still shows.
"""

import zlib

import jax
import numpy as np

from medcg_jax.families.build import Config
from medcg_jax.families.weights import engine
from medcg_jax.families.weights.families import module_of
from medcg_jax.families.weights.files import Tensors, WeightsError
from medcg_jax.parity.rows import TOLERANCE, Row

# Tensors that write into a residual stream or to the input of a norm: small, so that a norm's epsilon matters.
STREAM = (
    "embed", "o_proj", "out_proj", "down_proj", "fc2", "attn.proj.", "linear_2", "merger.mlp.2", "projector.bias",
    "cross_attn.q_proj", "pre_layrnorm", "layernorm_pre", "layernorm_post",
)  # fmt: skip
SMALL = 0.02
# Reads a small stream without a norm between.
LARGE = ("multi_modal_projector.linear_1.weight",)
Arrays = dict[str, np.ndarray]


def tensors_of(config: Config, params) -> Arrays:
    """Canonical name -> float array in the released layout, of every tensor of this port's `params`."""
    return dict(engine.store(module_of(config).table(config), params)[1])


def params_of(config: Config, params, tensors: Arrays):
    """The inverse of `tensors_of`; shapes, dtypes and shardings as in `params`.

    params: of the whole model or of some of its submodules.
    """
    source = Tensors.of(tensors)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    names = {name: name for name in tensors}
    parts = {path[0] for path in engine.by_path(params)}
    table = [entry for entry in module_of(config).table(config) if entry.path[0] in parts]
    return engine.load(table, params, places, source, names, "memory")


def telling(name: str, value: np.ndarray) -> np.ndarray:
    """float32 of the shape of `value`: the tensor `name` (canonical), scaled to a size at which faults show.

    Gates are half open, biases and norms vary, matrices give numbers of order 1, streams are of order `SMALL`. A constant
    tensor is replaced by noise with a seed from `name`.
    """
    value = np.asarray(value, np.float32)
    small = SMALL if any(piece in name for piece in STREAM) else 1 / SMALL if name in LARGE else 1.0
    last = name.rsplit(".", 1)[-1]
    if value.size == 1 and ("gate" in last):
        return (0.7 + 0.2 * np.tanh(value)).astype(np.float32)
    middle = value.mean() if value.ndim == 1 else np.float32(0)
    centred = value - middle
    if centred.std() < 1e-3 * max(1.0, abs(float(middle))):
        centred = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(value.shape).astype(np.float32)
    centred = centred / centred.std()
    if value.ndim == 1 and "norm" in name or "ln_q" in name:
        return (small * (0.3 * centred + (last == "weight"))).astype(np.float32)
    if last == "bias":
        return (small * 0.3 * centred).astype(np.float32)
    size = 1.0 if "embed" in name and "patch" not in name else 1.3 * value[0].size ** -0.5
    return ((3 * value[0].size ** -0.5 if name.startswith("lm_head") else small * size) * centred).astype(np.float32)


def fingerprint(value: np.ndarray) -> np.ndarray:
    """float64[3] that depend on a tensor's numbers and their order: sum, root of the sum of squares, weighted sum."""
    flat = np.asarray(value, np.float64).reshape(-1)
    # Weights of order 1 without a short period.
    return np.array([flat.sum(), np.sqrt(np.square(flat).sum()), flat @ np.cos(np.arange(flat.size) * np.sqrt(2.0))])


def fingerprints(tensors: Arrays) -> Arrays:
    return {name: fingerprint(value) for name, value in tensors.items()}


def weight_rows(ours: Arrays, theirs: Arrays) -> list[Row]:
    """A row for each tensor whose `fingerprints` differ, relative to its size; one row, `weights`, where none differs.

    Raises:
      WeightsError: the two sides have different tensors; names them.
    """
    if set(ours) != set(theirs):
        here, there = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        raise WeightsError(f"tensors differ: {len(here)} only here {here[:8]}, {len(there)} only there {there[:8]}")
    rows = []
    for name in ours:
        scale = float(theirs[name][1]) or 1.0
        difference = float(np.abs(ours[name] - theirs[name]).max()) / scale
        rows.append(Row(f"weight {name}", difference if np.isfinite(difference) else np.inf, 1.0, TOLERANCE / 10))
    wrong = [row for row in rows if not row.ok]
    return wrong or [Row("weights", max(row.difference for row in rows), 1.0, TOLERANCE / 10)]
