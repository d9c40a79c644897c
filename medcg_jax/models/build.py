"""Models from configuration: abstract, created straight into shardings, split into what trains and what does not.

Parameters travel as an `nnx.State` of plain arrays (`params`), apart from the `graphdef` that turns them into a model:
`nnx.merge(graphdef, params)`.
"""

import dataclasses
import math
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medcg_jax.axes import spec
from medcg_jax.models import llava
from medcg_jax.models.llava import Llava, LlavaConfig


def llava_config(model, *, vocab_size=None, image_token_id=None, pad_token_id=None, eos_token_id=None) -> LlavaConfig:
    """The architecture that a `run_config.ModelConfig` names, with how it is to run.

    The token ids come from the tokenizer: the tiny model needs `vocab_size` and `image_token_id`; the released sizes
    have their own and take what is given.

    Raises:
      ValueError: the name is unknown, or the tiny model got no vocabulary.
    """
    ids = dict(image_token_id=image_token_id, pad_token_id=pad_token_id, eos_token_id=eos_token_id)
    ids = {name: value for name, value in ids.items() if value is not None}
    runs = dict(
        compute_dtype=model.compute_dtype, attention=model.attention, remat=model.remat, scan_unroll=model.scan_unroll
    )
    if model.name == "llava15_tiny":
        if vocab_size is None or image_token_id is None:
            raise ValueError("model.name='llava15_tiny' has no vocabulary of its own: pass the tokenizer's")
        return llava.llava15_tiny(vocab_size, **ids, **runs)
    sizes = {"llava15_7b": llava.llava15_7b, "llava15_13b": llava.llava15_13b}
    if model.name not in sizes:
        raise ValueError(f"model.name={model.name!r}; accepted: {', '.join(['llava15_tiny', *sizes])}")
    config = sizes[model.name](**ids, **runs)
    if vocab_size is not None:
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))
    return config


def abstract(config: LlavaConfig, *, param_dtype=jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) with a `jax.ShapeDtypeStruct` for each array; allocates nothing."""
    graphdef, state = _abstract_variables(config, param_dtype)
    return graphdef, _arrays(state)


def axis_names(config: LlavaConfig) -> nnx.State:
    """The logical names of every parameter's axes, as a tuple for each leaf of `params`."""
    _, state = _abstract_variables(config, jnp.float32)
    return jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=_is_variable)


def partition_specs(config: LlavaConfig) -> nnx.State:
    """The PartitionSpec of every parameter, by its logical names."""
    _, state = _abstract_variables(config, jnp.float32)
    return jax.tree.map(lambda v: spec(*v.get_metadata("axes")), state, is_leaf=_is_variable)


def shardings(config: LlavaConfig, mesh: Mesh) -> nnx.State:
    """The NamedSharding of every parameter on `mesh`, in params' tree.

    Raises:
      ValueError: a parameter's axis cannot be divided over the mesh axes that its name is split over.
    """
    _, state = _abstract_variables(config, jnp.float32)

    def one(path, variable):
        parts = spec(*variable.get_metadata("axes"))
        _check_divides(jax.tree_util.keystr(path), variable.get_value().shape, parts, mesh)
        return NamedSharding(mesh, parts)

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_variable)


def create(config: LlavaConfig, mesh: Mesh, *, seed: int, param_dtype=jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) with random weights, made directly in their shardings on `mesh`."""
    graphdef, _ = _abstract_variables(config, param_dtype)
    return graphdef, _initializer(config, mesh, param_dtype)(seed)


@lru_cache(maxsize=16)
def _initializer(config: LlavaConfig, mesh: Mesh, param_dtype):
    def init(seed):
        return _arrays(nnx.state(Llava(config, rngs=nnx.Rngs(jax.random.key(seed)), param_dtype=param_dtype)))

    return jax.jit(init, out_shardings=shardings(config, mesh))


def num_params(params) -> int:
    """How many numbers `params` hold, arrays or abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def split_trainable(params: nnx.State, names: tuple[str, ...]) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen): the submodules named in `names`, and the others.

    Raises:
      ValueError: `names` is empty, or one is no submodule of the model.
    """
    unknown = sorted(set(names) - set(params))
    if unknown or not names:
        raise ValueError(f"trainable={tuple(names)}; accepted: one or more of {', '.join(sorted(params))}")
    # The raw mapping: `items` would wrap each part in a State of its own, and `join` would give another tree.
    parts = params.raw_mapping
    trainable = {name: part for name, part in parts.items() if name in names}
    return nnx.State(trainable), nnx.State({name: part for name, part in parts.items() if name not in names})


def join(trainable: nnx.State, frozen: nnx.State) -> nnx.State:
    """The params that `split_trainable` split."""
    return nnx.State({**trainable.raw_mapping, **frozen.raw_mapping})


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _arrays(state: nnx.State) -> nnx.State:
    return jax.tree.map(lambda v: v.get_value(), state, is_leaf=_is_variable)


def _abstract_variables(config: LlavaConfig, param_dtype):
    return nnx.split(nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0), param_dtype=param_dtype)))


def _check_divides(name: str, shape, parts: PartitionSpec, mesh: Mesh) -> None:
    for size, axes in zip(shape, parts, strict=True):
        over = math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))
        if size % over:
            raise ValueError(f"{name} {shape}: {size} cannot be split over mesh axis {axes} of {over} devices")
