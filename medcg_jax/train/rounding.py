"""Training state kept in fewer bits than it is computed in, rounded at random so that small updates are not lost.

An update far below a bfloat16's last digit is lost by rounding to the nearest, every time. Rounded up with the
probability of the part that is cut off it is kept in the mean (arXiv 2010.06192).
"""

import jax
import jax.numpy as jnp


def widen(tree):
    """`tree` with its floating arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def narrow(tree, like, seed: jax.Array, step: jax.Array):
    """`tree` in the dtypes of `like`; what loses digits is rounded by noise of (seed, step, place in the tree) alone.

    So the same update gives the same bits on every mesh, after every resumption, and in every slot of several cells.

    seed: uint32[] of the run. step: int32[].
    """
    leaves, treedef = jax.tree.flatten(tree)
    dtypes = [x.dtype for x in jax.tree.leaves(like)]
    if all(x.dtype == dtype for x, dtype in zip(leaves, dtypes, strict=True)):
        return tree
    key = jax.random.fold_in(jax.random.key(seed), step)
    rounded = [
        x if x.dtype == dtype else round_at_random(x, jax.random.fold_in(key, place))
        for place, (x, dtype) in enumerate(zip(leaves, dtypes, strict=True))
    ]
    return jax.tree.unflatten(treedef, rounded)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """bfloat16[...] whose mean over keys is x, float32[...]; a number that bfloat16 holds stays as it is.

    A bfloat16 is the upper half of a float32: what is added to the lower half carries as often as that half is large.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    # The carry of a NaN may end anywhere.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
