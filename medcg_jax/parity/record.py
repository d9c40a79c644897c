"""Numbers of a reference in a file, and this port against them without PyTorch.

A file (.npz) holds HF's forward arguments by their names, `logits` [B, T, V], and where they were recorded `labels`,
`loss`, `stage/NAME` for outputs by stage and `weight/NAME` for fingerprints of the tensors (canonical names). Whoever
has a reference may write the first two; `medcg parity SRC --record=FILE.npz` writes all. It is what tells a checkpoint
whose tensors were exchanged after it was recorded: two programs that read the same wrong file agree.
"""

import os
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from medcg_jax.families.build import Config
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.parity import weights as parity_weights
from medcg_jax.parity.rows import Row, compared, read_arrays

Arrays = dict[str, np.ndarray]
NEEDED = ("input_ids", "pixel_values", "logits")


def write(path: Path, inputs: Arrays, stages: Arrays, tensors: Arrays) -> None:
    """Writes a file: inputs, stages (`logits` and `loss` among them), fingerprints of `tensors`."""
    plain = {name: stages[name] for name in ("logits", "loss") if name in stages}
    rest = {f"stage/{name}": value for name, value in stages.items() if name not in plain}
    marks = {f"weight/{name}": value for name, value in parity_weights.fingerprints(tensors).items()}
    # Beside the file first: one that is cut off by a full disk must not take its place.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        np.savez(file, **inputs, **plain, **rest, **marks)
    os.replace(part, path)


def read(path: Path) -> Arrays:
    """The arrays of a file.

    Raises:
      WeightsError: it is no .npz file of arrays, or lacks one of `NEEDED`.
    """
    found = read_arrays(path)
    missing = [name for name in NEEDED if name not in found]
    if missing:
        held = ", ".join(sorted(found)) or "nothing"
        raise WeightsError(f"--inputs={path} lacks {', '.join(missing)}; it holds {held}")
    return found


def part_named(found: Arrays, prefix: str) -> Arrays:
    """The arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def weight_rows(config: Config, params, found: Arrays) -> list[Row]:
    """Rows for the tensors, where the file has fingerprints of them."""
    theirs = part_named(found, "weight/")
    ours = parity_weights.fingerprints(parity_weights.tensors_of(config, params)) if theirs else {}
    return parity_weights.weight_rows(ours, theirs) if theirs else []


def logits_row(model: nnx.Module, given: dict, theirs: np.ndarray, source: Path) -> tuple[Row, jax.Array]:
    """(the row for logits of real tokens, this port's logits at every position); theirs may have fewer columns.

    Raises:
      WeightsError: they are of other rows or positions.
    """
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda model, given: model(**given))(model, given)
    if theirs.shape[:2] != logits.shape[:2] or theirs.shape[2] > logits.shape[2]:
        raise WeightsError(f"{source}: logits {theirs.shape} recorded, {logits.shape} computed")
    real = np.asarray(given["segment_ids"]) != 0
    logits = logits[..., : theirs.shape[2]]
    return compared("logits", np.asarray(logits)[real], theirs[real]), logits
