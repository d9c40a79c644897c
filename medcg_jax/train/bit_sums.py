"""Sums of arrays' bits: taken on the devices, equal on every mesh, other after any flipped bit."""

import jax
import jax.numpy as jnp

from medcg_jax.families.build import num_params


def bit_sums(tree) -> list[int]:
    """For every array the sum of its elements' bits modulo 2**32: equal on every mesh, other after any flipped bit.

    bfloat16 counts as the float32 that it is: parameters kept in one and read in the other have the same sums.
    """
    return [int(x) for x in jax.device_get(_bit_sums(jax.tree.leaves(tree)))]


def check_bit_sums(tree, expected: list[int]) -> None:
    """Raises ValueError where `tree` does not have the sums that were stored with it."""
    found = bit_sums(tree)
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} arrays, {len(expected)} expected")
    wrong = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    if wrong:
        numbers = f"{num_params(tree):,} numbers"
        raise ValueError(f"{len(wrong)} of {len(found)} arrays ({numbers}) are not as they were saved")


@jax.jit
def _bit_sums(leaves):
    def one(x):
        x = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return [one(x) for x in leaves]
