"""A model of three matrices with a `Program` of its own, which traces in a fraction of a second: for tests that start
processes a hundred times over. All that is around the model is the real thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from train_toys import TRAIN, VOCAB

from medcg_jax.config import MeshConfig
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh
from medcg_jax.train.losses import negative_log_likelihood
from medcg_jax.train.optim import make_optimizer
from medcg_jax.train.step import make_step

WIDTH = 16
SHAPES = {"decoder": (WIDTH, VOCAB), "projector": (WIDTH, WIDTH), "vision": (VOCAB, WIDTH)}
# Rows or columns that two devices share.
PLACES = {"decoder": PartitionSpec("fsdp", None), "projector": PartitionSpec(None, "fsdp"), "vision": PartitionSpec()}
TRAINABLE = ("decoder", "projector")


class Micro(nnx.Module):
    """Each token's row of `vision`, the mean of those before it added, through two matrices."""

    def __init__(self):
        for name, shape in SHAPES.items():
            drawn = np.random.default_rng(sum(shape)).normal(size=shape) / 4
            setattr(self, name, nnx.Param(jnp.asarray(drawn, jnp.float32)))

    def __call__(self, batch) -> jax.Array:
        """float32[B, L, V] logits at the target positions."""
        seen = self.vision[...][batch["tokens"]] * (batch["segment_ids"] != 0)[..., None]
        mean = jnp.cumsum(seen, axis=1) / (1 + jnp.arange(seen.shape[1]))[:, None]
        hidden = jnp.tanh((seen + mean) @ self.projector[...])
        at_targets = jnp.take_along_axis(hidden, batch["target_positions"][..., None], axis=1)
        return at_targets @ self.decoder[...]


def loss(model: Micro, batch) -> tuple[jax.Array, jax.Array]:
    weights = batch["target_weights"]
    return (negative_log_likelihood(model(batch), batch["targets"]) * weights).sum(), weights.sum()


@functools.cache
def setup(mesh_config: MeshConfig | None = None, *, train=TRAIN, loss_fn=loss, **fields):
    """(program, trainable, frozen) on one device, or on a mesh of all, as `train_toys.setup`."""
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:1] if mesh_config is None else None)
    graphdef, state = nnx.split(Micro())
    places = nnx.State({name: NamedSharding(mesh, spec) for name, spec in PLACES.items()})
    params = nnx.State({name: jax.device_put(state[name][...], places[name]) for name in SHAPES})
    split = build.split_trainable(places, TRAINABLE)
    program = make_step(mesh, graphdef, *split, make_optimizer(train), loss_fn=loss_fn, **fields)
    return program, *build.split_trainable(params, TRAINABLE)
