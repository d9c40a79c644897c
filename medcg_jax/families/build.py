"""Models from configuration: abstract, created straight into shardings, split into trainable and frozen.

Parameters are an `nnx.State` of plain arrays (`params`), apart from the `graphdef` that turns them into a model:
`nnx.merge(graphdef, params)`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medcg_jax.axes import spec
from medcg_jax.config import EMBEDDING, MODELS
from medcg_jax.families import registry
from medcg_jax.families.common import FamilyConfig
from medcg_jax.nn import matmul
from medcg_jax.nn.base import Base
from medcg_jax.nn.layers import Dense
from medcg_jax.nn.lora import LoraConfig
from medcg_jax.nn.quant import QUANTIZED, array_type, is_quantized, like, quantize

# Size -> the function that makes its configuration; the tiny ones have no vocabulary of their own.
SIZES = {name: getattr(family.model, name) for family in registry.families() for name in family.released}
TINY = {name: getattr(family.model, name) for family in registry.families() for name in family.tiny}
# `create` quantises a stack of at least so many numbers (256 MiB in float32) before it makes the next.
ALONE_NUMBERS = 1 << 26
Config = FamilyConfig
# A model of more parameters that is not trained is held in bfloat16 unless asked otherwise: in float32 these take 2 GB.
MOST_IN_FLOAT32 = 500_000_000


def architecture(model, *, vocab_size: int | None = None, **ids: int | None) -> Config:
    """The architecture and run options that a `config.ModelConfig` names; of a family, the one that its checkpoint states.

    ids: token ids of the tokenizer by field of the config (`image_token_id`, `pad_token_id`, ...). A tiny model needs
    them and `vocab_size`; for others they replace the defaults.

    Raises:
      ValueError: the name is unknown, or a tiny model got no vocabulary.
      ConfigError: a package that `model.matmul` needs is not installed, or the checkpoint of a family cannot be read or is
        of another one.
    """
    matmul.require(model.matmul)
    ids = {name: value for name, value in ids.items() if value is not None}
    runs = dict(
        compute_dtype=model.compute_dtype,
        attention=model.attention,
        remat=model.remat,
        scan_unroll=model.scan_unroll,
        matmul=model.matmul,
    )
    if model.name not in MODELS:
        raise ValueError(f"model.name={model.name!r}; accepted: {', '.join(MODELS)}")
    runs |= {name: value for name in registry.of_model(model.name).options if (value := getattr(model, name))}
    if model.lora_rank:
        runs["lora"] = LoraConfig(model.lora_rank, model.lora_alpha or 2.0 * model.lora_rank, model.lora_targets)
    if model.base_dtype != "float32":
        runs["base"] = Base(model.base_dtype, model.trainable)
    if model.name in registry.FAMILIES:
        return with_vocabulary(stated_architecture(model, runs | ids), vocab_size)
    if model.name in TINY:
        if vocab_size is None or "image_token_id" not in ids:
            raise ValueError(f"model.name={model.name!r} has no vocabulary of its own: pass the tokenizer's")
        return TINY[model.name](vocab_size, **ids, **runs)
    return with_vocabulary(SIZES[model.name](**ids, **runs), vocab_size)


def stated_architecture(model, fields: dict[str, Any]) -> Config:
    """The architecture that `model.checkpoint` states, with these fields of the configuration replaced.

    Adapters are the run's, except those that belong to the family's checkpoints.

    Raises:
      ConfigError: there is no checkpoint, this port does not compute it, or it is of another family than `model.name`.
    """
    from medcg_jax.families.weights.convert import read_config  # it imports this module
    from medcg_jax.families.weights.hub import resolve
    from medcg_jax.families.weights.kind import check_family

    directory = resolve(model.checkpoint, weights=False)
    config = read_config(directory)
    check_family(directory, model.name, config.family)
    adapters = config.lora if "lora" in registry.of(config).parts else None
    return dataclasses.replace(config, **({"lora": adapters, "base": Base()} | fields))


def with_vocabulary(config: Config, vocab_size: int | None) -> Config:
    if vocab_size is None:
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))


def abstract(config: Config, *, param_dtype=jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) with a `jax.ShapeDtypeStruct` for each array; allocates nothing.

    A matrix that `config.base` quantises is a `QArray` of them.
    """
    graphdef, state = _abstract_variables(config, param_dtype)

    def leaf_of(path, variable):
        shape, dtype = variable.get_value(), stored_dtype(config, path, variable)
        if dtype in QUANTIZED:
            return like(shape.shape, dtype)
        return shape if dtype is None else jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype))

    return graphdef, jax.tree_util.tree_map_with_path(leaf_of, state, is_leaf=_is_variable)


def stored_dtype(config: Config, path, variable: nnx.Variable) -> str | None:
    """The dtype that `config.base` gives the parameter at `path`, one of `config.BASE_DTYPES`; None: its own."""
    base = config.base
    is_embedding = (path[0].key, path[1].key) == ("decoder", "embed")
    if base.dtype == "float32" or path[0].key in base.trained or (is_embedding and EMBEDDING in base.trained):
        return None
    is_matrix = path[-1].key == "kernel" and variable.get_metadata("axes")[0] == "layer"
    return base.dtype if base.dtype in QUANTIZED and is_matrix else "bfloat16"


def axis_names(config: Config) -> nnx.State:
    """The logical names of every parameter's axes, as a tuple for each leaf of `params`."""
    _, state = _abstract_variables(config, jnp.float32)

    def names_of(path, variable):
        names, dtype = variable.get_metadata("axes"), stored_dtype(config, path, variable)
        return array_type()(names, names, None, dtype) if dtype in QUANTIZED else names

    return jax.tree_util.tree_map_with_path(names_of, state, is_leaf=_is_variable)


def shardings(config: Config, mesh: Mesh) -> nnx.State:
    """The NamedSharding of every parameter on `mesh`, in params' tree.

    Key and value heads that the tensor axis does not divide are replicated. A vocabulary that it does not divide is not
    split; the width of its table is split over fsdp and tensor instead, if they divide it. The scales of a quantised
    matrix are split like the matrix, except along an axis that the mesh does not divide.

    Raises:
      ValueError: the mesh does not divide another axis of a parameter.
    """
    _, state = _abstract_variables(config, jnp.float32)

    def sharding_of(path, variable):
        shape, parts = variable.get_value().shape, _spec_on(variable, mesh)
        _check_divides(jax.tree_util.keystr(path), shape, parts, mesh)
        sharding, dtype = NamedSharding(mesh, parts), stored_dtype(config, path, variable)
        if dtype not in QUANTIZED:
            return sharding
        scales = like(shape, dtype).scale.shape
        split = [axes if _divides(size, axes, mesh) else None for size, axes in zip(scales, parts, strict=True)]
        return array_type()(sharding, NamedSharding(mesh, PartitionSpec(*split)), None, dtype)

    return jax.tree_util.tree_map_with_path(sharding_of, state, is_leaf=_is_variable)


def replicated(config: Config, mesh: Mesh) -> list[str]:
    """Parameters that every device holds whole, because the tensor axis does not divide them."""
    _, state = _abstract_variables(config, jnp.float32)
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]
    return [
        ".".join(key.key for key in path)
        for path, variable in leaves
        if "tensor" in _flat(spec(*variable.get_metadata("axes"))) and "tensor" not in _flat(_spec_on(variable, mesh))
    ]


def _spec_on(variable: nnx.Variable, mesh: Mesh) -> PartitionSpec:
    """The spec of a parameter on `mesh`, without the axes that the mesh does not divide."""
    names, shape = variable.get_metadata("axes"), variable.get_value().shape
    undivided = {
        name for name, size in zip(names, shape, strict=True)
        if name in ("kv_heads", "vocab") and size % mesh.shape["tensor"]
        or name == "rank_parts" and size % mesh.shape["fsdp"]
    }  # fmt: skip

    def name_on(name: str, size: int) -> str | None:
        if name in undivided:
            return None
        fits = size % (mesh.shape["fsdp"] * mesh.shape["tensor"]) == 0
        if name == "table_embed":
            return name if fits else "vision_embed"
        return "table_embed" if name == "embed" and "vocab" in undivided and fits else name

    return spec(*map(name_on, names, shape))


def _flat(parts: PartitionSpec) -> set[str]:
    return {axis for axes in parts if axes for axis in ([axes] if isinstance(axes, str) else axes)}


def create(config: Config, mesh: Mesh, *, seed: int, param_dtype=jnp.float32) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) with random weights, made directly in their shardings on `mesh`.

    Large stacks to be quantised are made one after the other, so that only one exists in float32 at a time.
    """
    graphdef, _ = _abstract_variables(config, param_dtype)
    structure: Any = jax.tree.structure(shardings(config, mesh), is_leaf=is_quantized)
    leaves: list = [None] * structure.num_leaves
    for positions, init in _initializers(config, mesh, param_dtype):
        for position, leaf in zip(positions, jax.block_until_ready(init(seed)), strict=True):
            leaves[position] = leaf
    return graphdef, jax.tree.unflatten(structure, leaves)


@lru_cache(maxsize=16)
def _initializers(config: Config, mesh: Mesh, param_dtype) -> list[tuple[list[int], Callable]]:
    """(positions of leaves in the tree, the program that makes them from a seed); each large leaf is alone."""
    targets = jax.tree.leaves(shardings(config, mesh), is_leaf=is_quantized)
    shapes = jax.tree.leaves(abstract(config)[1], is_leaf=is_quantized)
    large = [i for i, x in enumerate(shapes) if is_quantized(x) and math.prod(x.shape) >= ALONE_NUMBERS]
    groups = [[i for i in range(len(targets)) if i not in large], *([i] for i in large)]

    def init(seed, positions):
        state = nnx.state(_module(config, nnx.Rngs(jax.random.key(seed)), param_dtype))
        leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]
        return [_stored(config, *leaves[i]) for i in positions]

    # Hundreds of small random draws, run once: on a CPU, LLVM would optimise them for longer than they run.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    jit = partial(jax.jit, compiler_options=quick)
    return [(g, jit(partial(init, positions=g), out_shardings=[targets[i] for i in g])) for g in groups]


def create_adapters(config: Config, mesh: Mesh, *, seed: int, param_dtype=jnp.float32) -> dict:
    """The submodule "lora" of the params that `create` makes, as a dict."""
    return _adapter_initializer(config, mesh, param_dtype)(seed)


@lru_cache(maxsize=16)
def _adapter_initializer(config: Config, mesh: Mesh, param_dtype):
    def init(seed):
        return _arrays(nnx.state(_module(config, nnx.Rngs(jax.random.key(seed)), param_dtype))).raw_mapping["lora"]

    return jax.jit(init, out_shardings=shardings(config, mesh).raw_mapping["lora"])


def _stored(config: Config, path, variable: nnx.Variable):
    """The parameter's value in the dtype that `config.base` gives it."""
    value, dtype = variable.get_value(), stored_dtype(config, path, variable)
    if dtype is None:
        return value
    return quantize(value, dtype) if dtype in QUANTIZED else value.astype(dtype)


def num_params(params) -> int:
    """How many numbers `params` (arrays or abstract) hold, without the scales of quantised matrices."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_quantized))


def num_bytes(params) -> float:
    """Bytes that `params` (arrays or abstract) take on devices; two 4-bit numbers share a byte."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(x.shape) * (0.5 if x.dtype == jnp.uint4 else x.dtype.itemsize) for x in leaves)


def split_trainable(params: nnx.State, names: tuple[str, ...]) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen): the submodules named in `names`, and the others. `EMBEDDING` names the decoder's table.

    Raises:
      ValueError: `names` is empty or has a name that is no submodule.
    """
    accepted = {*params, EMBEDDING}
    unknown = sorted(set(names) - accepted)
    if unknown or not names:
        raise ValueError(f"trainable={tuple(names)}; accepted: one or more of {', '.join(sorted(accepted))}")
    # The raw mapping: `items` would wrap each submodule in a State, and `join` would give another tree.
    trees = params.raw_mapping
    trainable = {name: tree for name, tree in trees.items() if name in names}
    frozen = {name: tree for name, tree in trees.items() if name not in names}
    if EMBEDDING in names:
        decoder = dict(frozen.pop("decoder"))
        trainable["decoder"] = {"embed": decoder.pop("embed")}
        frozen["decoder"] = decoder
    return nnx.State(trainable), nnx.State(frozen)


def join(trainable: nnx.State, frozen: nnx.State) -> nnx.State:
    """The params that `split_trainable` split."""
    joined = {**trainable.raw_mapping, **frozen.raw_mapping}
    for name in trainable.raw_mapping.keys() & frozen.raw_mapping.keys():
        joined[name] = {**trainable.raw_mapping[name], **frozen.raw_mapping[name]}
    return nnx.State(joined)


def _module(config: Config, rngs: nnx.Rngs, param_dtype) -> nnx.Module:
    module = registry.of(config).module_type(config, rngs=rngs, param_dtype=param_dtype)
    # Every matrix of the decoder's layers. The head, whose product needs full precision, does not call its Dense.
    for _, layer in nnx.iter_modules(module.decoder):
        if isinstance(layer, Dense):
            layer.matmul = config.matmul
    return module


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _arrays(state: nnx.State) -> nnx.State:
    return jax.tree.map(lambda v: v.get_value(), state, is_leaf=_is_variable)


def _abstract_variables(config: Config, param_dtype):
    return nnx.split(nnx.eval_shape(lambda: _module(config, nnx.Rngs(0), param_dtype)))


def _check_divides(name: str, shape, parts: PartitionSpec, mesh: Mesh) -> None:
    for size, axes in zip(shape, parts, strict=True):
        if not _divides(size, axes, mesh):
            over = _num_parts(axes, mesh)
            raise ValueError(f"{name} {shape}: {size} cannot be split over mesh axis {axes} of {over} devices")


def _divides(size: int, axes, mesh: Mesh) -> bool:
    """Whether an axis can be split over these mesh axes of a PartitionSpec."""
    return size % _num_parts(axes, mesh) == 0


def _num_parts(axes, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))
