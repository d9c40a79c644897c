"""What every parity check is made of: one comparison, and the layers of a stack one by one."""

import math
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from medcg_jax.weights.files import WeightsError

# Largest difference allowed, as a share of the reference's largest value where that is above 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One comparison: `difference` is the largest, `scale` the reference's largest value."""

    stage: str
    difference: float
    scale: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance * max(1.0, self.scale)


def compared(stage: str, ours, theirs) -> Row:
    """The comparison of two arrays.

    Raises:
      WeightsError: they have different shapes.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise WeightsError(f"{stage}: shape {ours.shape} here, {theirs.shape} in the reference")
    difference = float(np.abs(ours - theirs).max())
    # A NaN on either side is a difference, not a comparison that says nothing.
    return Row(stage, math.inf if math.isnan(difference) else difference, float(np.abs(theirs).max()))


def layers(blocks: nnx.Module):
    """The modules of a stack, one by one."""
    graphdef, params = nnx.split(blocks)
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        yield nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], params))
