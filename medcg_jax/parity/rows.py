"""What every parity check is made of: one comparison, the layers of a stack one by one, and ids of tokens to try."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from medcg_jax.families.weights.files import WeightsError

# Largest difference allowed, as a share of the reference's largest value.
TOLERANCE = 1e-4
# So many times as far as the reference itself moves when every weight is rounded otherwise; and never further than a
# fault would be small.
NOISE_FACTOR, MAX_TOLERANCE = 8.0, 1e-2


@dataclass(frozen=True)
class Row:
    """One comparison: `difference` is the largest, `scale` the reference's largest value.

    floor: the scale below which the allowed difference shrinks no more. 0: it is always a share of the scale, so that
      numbers of order 0.01, which random weights give, hide no fault.
    """

    stage: str
    difference: float
    scale: float
    tolerance: float = TOLERANCE
    floor: float = 0.0

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance * max(self.floor, self.scale)


def compared(stage: str, ours, theirs, *, floor: float = 0.0) -> Row:
    """The comparison of two arrays.

    Raises:
      WeightsError: they have different shapes.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise WeightsError(f"{stage}: shape {ours.shape} here, {theirs.shape} in the reference")
    difference = float(np.abs(ours - theirs).max()) if ours.size else 0.0
    # A NaN on either side is a difference, not a comparison that says nothing.
    scale = float(np.abs(theirs).max()) if theirs.size else 0.0
    return Row(stage, math.inf if math.isnan(difference) else difference, scale, floor=floor)


def judged(rows: list[Row], noise: dict[str, Row]) -> list[Row]:
    """`rows`, those that differ with the tolerance that the reference's own rounding asks for.

    noise: stage -> the reference with its weights rounded otherwise, compared with itself.
    """

    def one(row: Row) -> Row:
        moved = noise.get(row.stage)
        if row.ok or moved is None or not moved.scale:
            return row
        return replace(
            row, tolerance=max(row.tolerance, min(MAX_TOLERANCE, NOISE_FACTOR * moved.difference / moved.scale))
        )

    return [one(row) for row in rows]


def exactly(stage: str, ours, theirs) -> Row:
    """A row whose difference is 1 where any number differs, whatever their size."""
    return Row(stage, float(not np.array_equal(ours, theirs)), 1.0)


def named(prefix: str, rows: list[Row]) -> list[Row]:
    """`rows` with `prefix` before their names."""
    return [replace(row, stage=prefix + row.stage) for row in rows]


def layers(blocks: nnx.Module):
    """The modules of a stack, one by one."""
    graphdef, params = nnx.split(blocks)
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        yield nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], params))


def text_ids(rng: np.random.Generator, shape, num: int, special: set[int]) -> np.ndarray:
    """int64[shape] random ids from 0 to `num` - 1 without `special`."""
    return rng.choice([i for i in range(num) if i not in special], shape).astype(np.int64)


def placed(ids: dict[str, int], num: int) -> dict[str, int]:
    """Those of `ids` that lie outside of a table of `num` rows, or stand twice, each with a free row from its end.

    A config of a tiny model often keeps the released ids, which no lookup of its table can take.
    """
    taken = {i for i in ids.values() if 0 <= i < num}
    free = (i for i in reversed(range(num)) if i not in taken)
    seen, moved = set(), {}
    for name, i in ids.items():
        if not 0 <= i < num or i in seen:
            moved[name] = next(free)
        seen.add(i)
    return moved


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
      WeightsError: it is missing, or no .npz file of arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is no readable .npz file: {error}") from error


def check_arrays(path: Path, held: Iterable[str], wanted: Iterable[str]) -> None:
    """Raises WeightsError where the file `path` lacks an array, or holds one that nothing is compared with."""
    held, wanted = set(held), set(wanted)
    if held != wanted:
        raise WeightsError(
            f"{path} lacks {sorted(wanted - held)[:8]}; nothing is compared with {sorted(held - wanted)[:8]}"
        )
