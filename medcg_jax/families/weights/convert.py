"""Checkpoints in and out: released PyTorch directories, and our own (Orbax parameters beside `model.json`).

`load_checkpoint` takes either; `convert` makes one from the other, one tensor in memory at a time.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.families import build, registry
from medcg_jax.families.build import Config
from medcg_jax.families.weights import adapters, companions, engine, peft_files
from medcg_jax.families.weights.families import family_of, is_original, module_of, module_of_release
from medcg_jax.families.weights.fields import quoted
from medcg_jax.families.weights.files import Tensors, WeightsError, read_json, write_safetensors, written_whole
from medcg_jax.families.weights.limits import dataclass_of
from medcg_jax.nn.base import Base
from medcg_jax.nn.quant import is_quantized

MODEL_FILE = "model.json"
PARAMS_DIR = "params"
# Fields of a config that say how a model runs, or name tokens: no part of the architecture.
RUN_FIELDS = (
    "compute_dtype", "matmul", "attention", "remat", "scan_unroll", "image_token_id", "pad_token_id", "eos_token_id",
    "text.max_positions", "min_pixels", "max_pixels", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "max_boxes",
    "intermediate_from", "mask_text_only_rows_attention", "base.dtype", "base.trained",
)  # fmt: skip
# What `model.json` states beside the architecture, where the directory holds no more than what was trained.
OWN_FIELDS = ("trained_on", "parts")
NO_PARTS: Mapping[str, Path] = {}
NO_IDS: Mapping[str, int] = {}


def convert(
    src: Path, dst: Path, *, to: str = "orbax", parts: Mapping[str, Path] = NO_PARTS, ids: Mapping[str, int] = NO_IDS
) -> dict:
    """{"out", "to", "parameters", "tensors", "dtype"} after writing `dst` from `src`; prints one line.

    src: a released directory, a converted one, or peft's adapters, whose model `parts` names as `base`. to: "orbax"; "hf" for the released layout, adapters merged into the
      weights (of the checkpoint that the run started from, not what was made of them in 4 or 8 bits); "peft" for the
      adapters, and a projector that was trained with them, as peft's.
    parts: files or directories of a release that lie elsewhere, by the names that `weights.families` explains.
    ids: of tokens, by field of the config, where the tokenizer beside `src` has others than its config states.
    Weights keep the dtype they have in `src`. `dst` appears when all of it is written, with the tokenizer, chat templates
    and processor's files that lie in `src` (or in the checkpoint that it was trained on).

    Raises:
      WeightsError: `src` is no checkpoint this port knows, or `dst` exists and is not empty.
    """
    if to not in ("orbax", "hf", "peft"):
        raise WeightsError(f"to={to!r}; accepted: orbax, hf, peft")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise WeightsError(f"{dst} exists and is not empty; a new or empty directory is accepted")
    config = dataclasses.replace(read_config(src, parts=parts), **ids)
    own = kept_parts(src)
    below = _base_of_adapters(src, parts)
    if to == "peft":
        params = _own_leaves(src, config, own[1]) if own else open_leaves(src, config, parts=parts)
        others = sorted(set(own[1] if own else ()) - set(adapters.PEFT_PARTS))
        if others:
            raise WeightsError(f"{src} holds {', '.join(others)}, too; to={to!r} takes adapters and a projector")
    else:
        params = open_leaves(src, config, parts=parts)
    with written_whole(dst) as part:
        base = _base_of(src, own[0], parts) if own and to == "hf" else None
        companions.copy([directory for directory in (src, base, below) if directory], part)
        if to == "peft":
            num_tensors = adapters.export_peft(params, config, part, base=own[0] if own else "")
        else:
            plain, without = adapters.without(params, config)
            num_tensors = len(engine.slots(module_of(config).table(without), plain))
            if to == "hf":
                export(params, config, part)
            else:
                save_params(part, params, dataclasses.replace(config, base=Base()))
    dtype, number = ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})), build.num_params(params)
    print(f"{src} -> {dst}: {num_tensors} tensors, {number:,} parameters, {dtype}")
    return {"out": str(dst), "to": to, "parameters": number, "tensors": num_tensors, "dtype": dtype}


def read_config(src: Path, *, parts: Mapping[str, Path] = NO_PARTS) -> Config:
    """The architecture of the checkpoint in `src`, released or converted.

    Raises:
      WeightsError: there is no checkpoint, or it is not one that this port computes.
    """
    if below := _base_of_adapters(src, parts):
        config = read_config(below, parts=parts)
        if (src / "config.json").is_file():
            _check_same(_released_config(src, parts), config, src)
        return config
    file = src / (MODEL_FILE if (src / MODEL_FILE).is_file() else "config.json")
    if not file.is_file():
        raise WeightsError(
            f"{src} holds no checkpoint (neither config.json nor {MODEL_FILE}); accepted: a directory with "
            "llava-hf/llava-1.5-7b-hf, llava-hf/llava-1.5-13b-hf or liuhaotian/llava-v1.5-7b from the Hugging Face hub "
            f"(`hf download llava-hf/llava-1.5-7b-hf --local-dir {src}`), or what `medcg convert` wrote"
        )
    return _stored_config(src) if file.name == MODEL_FILE else _released_config(src, parts)


def _stored_config(src: Path) -> Config:
    try:
        about = _about(src)
        return _config_from_dict({key: value for key, value in about.items() if key not in OWN_FIELDS})
    except (ValueError, ArithmeticError) as error:  # of a field, or of fields that do not go together
        raise _named(error, src / MODEL_FILE) from error


def _released_config(src: Path, parts: Mapping[str, Path]) -> Config:
    try:
        return module_of_release(src).read_release(src, parts)
    except (ValueError, ArithmeticError) as error:  # of a field, or of fields that do not go together
        raise _named(error, src / "config.json") from error


def _named(error: Exception, file: Path) -> WeightsError:
    text = str(error)
    return WeightsError(text if str(file.parent) in text else f"{file}: {text}")


def _base_of_adapters(src: Path, parts: Mapping[str, Path]) -> Path | None:
    """The released model that peft's adapters in `src` belong to; None: `src` holds no such adapters.

    LLaVA's own directories of adapters are another form (`weights.llava_base`).

    Raises:
      WeightsError: no base is given, or one that is no whole model.
    """
    if (src / MODEL_FILE).is_file() or not peft_files.are_adapters(src):
        return None
    if (src / "config.json").is_file() and is_original(read_json(src / "config.json")):
        return None
    base = parts.get("base")
    if base is None:
        named = read_json(src / peft_files.ADAPTER_JSON).get("base_model_name_or_path")
        raise WeightsError(
            f"{src} holds peft's adapters alone; pass --base=DIR with the model that they were trained on"
            + (f", {str(named)[:200]}" if named else "")
        )
    if not (base / "config.json").is_file():
        raise WeightsError(
            f"--base={base} has no config.json; the released model that {src} was trained on is accepted"
        )
    stated = read_json(base / "config.json")
    if is_original(stated) or stated.get("model_type") == "llama":
        raise WeightsError(
            f"{src} holds adapters without the config.json and non_lora_trainables.bin that LLaVA's training writes "
            f"at its end, and {base} is no whole model in transformers' layout, to which peft's adapters belong"
        )
    return base


def _open_release(src: Path, config: Config, parts: Mapping[str, Path]) -> tuple[Tensors, dict[str, str]]:
    """(tensors, canonical name -> name in them) of a released directory, or of one with peft's adapters in it."""
    family = module_of(config)
    below = _base_of_adapters(src, parts)
    if below is None:
        return family.open_release(src, parts)
    return peft_files.with_adapters(*family.open_release(below, parts), src, family.canonical, whole=True)


def load_checkpoint(
    src: Path,
    config: Config,
    mesh: Mesh,
    *,
    parts: Mapping[str, Path] = NO_PARTS,
    param_dtype=jnp.float32,
    seed: int = 0,
) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) of the checkpoint in `src` on `mesh`, for the architecture and settings of `config`.

    What `config.base` says to quantise is so a layer at a time, on the devices. Adapters that the checkpoint lacks are
    made of `seed`. A directory of what was trained alone is laid over what it was trained on, which `model.json` states
    (or `parts` as `base`).
    A checkpoint with more vocabulary rows than `config` (llava-hf pads 32000 to 32064) loses the rest of them.
    Beside the device arrays no more than one tensor is on the host.

    Raises:
      WeightsError: no checkpoint, another architecture, or tensors missing, unused or misshapen.
    """
    found = read_config(src, parts=parts)
    if found.lora is None and config.lora is not None:
        bare = dataclasses.replace(config, lora=None)
        _, params = load_checkpoint(src, bare, mesh, parts=parts, param_dtype=param_dtype)
        lora = build.create_adapters(config, mesh, seed=seed, param_dtype=param_dtype)
        return build.abstract(config)[0], build.join(params, nnx.State({"lora": lora}))
    _check_same(found, config, src)
    graphdef, abstract = build.abstract(config, param_dtype=param_dtype)
    places = build.shardings(config, mesh)
    if own := kept_parts(src):
        base = _base_of(src, own[0], parts)
        _, params = load_checkpoint(base, config, mesh, param_dtype=param_dtype)
        leaves, shapes, wanted = _own_leaves(src, config, own[1]), abstract.raw_mapping, places.raw_mapping
        trained = {name: engine.place(leaves[name], shapes[name], wanted[name]) for name in own[1]}
        return graphdef, nnx.State({**params.raw_mapping, **trained})
    if (src / MODEL_FILE).is_file():
        if config.base.dtype != "float32":
            return graphdef, engine.place(open_leaves(src, found), abstract, places)
        return _restore(src, dataclasses.replace(found, base=Base()), config, mesh, param_dtype)
    tensors, names = _open_release(src, config, parts)
    table, num_rows = module_of(config).table(config), found.text.vocab_size
    return graphdef, engine.load(table, abstract, places, tensors, names, str(src), num_rows=num_rows)


def kept_parts(src: Path) -> tuple[str, tuple[str, ...]] | None:
    """(what a run started from, the parts that it trained) of a directory that holds these parts alone; else None."""
    about = _about(src) if (src / MODEL_FILE).is_file() else {}
    return (about["trained_on"], tuple(about["parts"])) if "parts" in about else None


def _about(src: Path) -> dict:
    """What `model.json` states.

    Raises:
      WeightsError: it is no such file, or names parts that no model has.
    """
    about, file = read_json(src / MODEL_FILE), src / MODEL_FILE
    if not any(key in about for key in OWN_FIELDS):
        return about
    parts, known = about.get("parts"), registry.FAMILIES.get(str(about.get("family")))
    if not isinstance(about.get("trained_on"), str) or not about["trained_on"] or "\0" in about["trained_on"]:
        raise WeightsError(
            f"{file}: trained_on={quoted(about.get('trained_on'))}; the path of a checkpoint is accepted"
        )
    if not isinstance(parts, list) or not parts or not all(isinstance(name, str) for name in parts) or known is None:
        raise WeightsError(f"{file}: parts={quoted(parts)}; a list of names of a model's parts is accepted")
    return about


def saved_leaves(src: Path) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every array that `save_params` wrote as it was, in the order of the tree."""
    own, abstract = kept_parts(src), build.abstract(read_config(src))[1].raw_mapping
    found = engine.by_path({name: abstract[name] for name in own[1]} if own else abstract)
    return {path: leaf for path, leaf in found.items() if not is_quantized(leaf)}


def _base_of(src: Path, stated: str, parts: Mapping[str, Path]) -> Path:
    base = Path(parts.get("base") or stated)
    if not base.is_dir():
        raise WeightsError(
            f"{src} holds what a run trained alone, and {base}, which it was trained on, is not there; its place is "
            "accepted as --base=DIR of `medcg convert` and as model.checkpoint of a run"
        )
    return base


def open_leaves(src: Path, config: Config, *, parts: Mapping[str, Path] = NO_PARTS) -> dict:
    """The parameters of the checkpoint in `src`, whose architecture `config` is, as `engine.Leaf`s: none is read yet.

    Raises:
      WeightsError: tensors missing, unused or misshapen, or files that cannot be read.
    """
    config = dataclasses.replace(config, base=Base())
    if own := kept_parts(src):
        base = _base_of(src, own[0], parts)
        has_lora = read_config(base).lora is not None
        below = config if has_lora else dataclasses.replace(config, lora=None)
        return {**open_leaves(base, below), **_own_leaves(src, config, own[1])}
    family = module_of(config)
    abstract = nnx.to_pure_dict(build.abstract(config)[1])
    if not (src / MODEL_FILE).is_file():
        return engine.lazy(family.table(config), abstract, *_open_release(src, config, parts), str(src))
    return _stored(src, abstract)


def _own_leaves(src: Path, config: Config, parts: tuple[str, ...]) -> dict:
    """`Leaf`s of these parts, which are all that the directory holds."""
    abstract = nnx.to_pure_dict(build.abstract(dataclasses.replace(config, base=Base()))[1])
    unknown = sorted(set(parts) - set(abstract))
    if unknown:
        raise WeightsError(f"{src / MODEL_FILE}: parts={quoted(parts)}; of {', '.join(abstract)} are accepted")
    return _stored(src, {name: abstract[name] for name in parts})


def _stored(src: Path, abstract: dict) -> dict:
    from medcg_jax.families.weights.parts import restore

    try:
        found = restore(src / PARAMS_DIR, abstract)
    # Orbax raises whatever a damaged directory leads to.
    except Exception as error:
        raise WeightsError(f"{src / PARAMS_DIR} cannot be read: {' '.join(str(error).split())[:200]}") from error
    wrong = jax.tree.map(lambda leaf, like: leaf.shape != like.shape, found, abstract)
    if any(jax.tree.leaves(wrong)):
        raise WeightsError(f"{src / PARAMS_DIR} holds other shapes than {src / MODEL_FILE} states")
    return jax.tree_util.tree_map_with_path(partial(_finite, src / PARAMS_DIR), found)


def _finite(directory: Path, path, leaf: engine.Leaf) -> engine.Leaf:
    """The `Leaf`, whose numbers are looked at as they are read."""
    name = f"{directory}: {'.'.join(key.key for key in path)}"

    def read(layer: int | None) -> np.ndarray:
        try:
            value = leaf.read(layer)
        except ValueError as error:  # TensorStore's, for a damaged file
            raise WeightsError(f"{name} cannot be read: {str(error)[:200]}") from error
        engine.check_finite(value, name if layer is None else f"{name}, layer {layer}")
        return value

    return engine.Leaf(leaf.shape, leaf.dtype, read)


def export(params, config: Config, dst: Path, *, dtype=None) -> None:
    """Writes the family's released layout into `dst`: safetensors and config.json, one tensor on the host at a time.

    Where the image token (or the padding) lies outside LLaVA's vocabulary, its tables get rows up to the next multiple
    of 64: the mean of the others, so that no added row ever has the largest logit.
    Adapters that the layout does not hold are merged into the weights.
    params: arrays or `engine.Leaf`s. dtype: of all tensors; None: each one's own.
    """
    params, config = adapters.merged(params, config)
    params = adapters.whole_leaves(params)
    family = module_of(config)
    table = family.table(config)
    rows = {entry.name for entry in table if entry.rows}
    num_rows = config.text.vocab_size
    last = max(config.image_token_id, config.pad_token_id)
    if rows and last >= num_rows:
        num_rows = -(-(last + 1) // 64) * 64
    found, stream = engine.store(table, params)
    specs = {}
    for name, (shape, own) in found.items():
        shape = (num_rows, *shape[1:]) if name in rows else shape
        specs[family.released_name(name)] = shape, np.dtype(own if dtype is None else dtype)

    def tensors():
        for name, value in stream:
            if name in rows and len(value) < num_rows:
                mean = value.mean(axis=0, dtype=np.float32, keepdims=True).astype(value.dtype)
                value = np.concatenate([value, np.repeat(mean, num_rows - len(value), axis=0)])
            name = family.released_name(name)
            yield name, value.astype(specs[name][1], copy=False)
            # Dropped before the next is read.
            del value

    dst.mkdir(parents=True, exist_ok=True)
    write_safetensors(dst, specs, tensors())
    text = dataclasses.replace(config.text, vocab_size=num_rows)
    # Readers that take their dtype from here lose nothing with the widest one.
    widest = reduce(jnp.promote_types, {dtype for _, dtype in specs.values()})
    released = family.config_to_json(dataclasses.replace(config, text=text), widest.name)
    # Last: a directory with this file is whole.
    (dst / "config.json").write_text(json.dumps(released, indent=2) + "\n")


def save_params(directory: Path, params, config: Config, *, trained_on: str = "") -> None:
    """Writes `params` (arrays or `engine.Leaf`s) with Orbax, and `config` beside them, into `directory`.

    trained_on: the checkpoint that the rest of the parameters is, where `params` are no more than what was trained.
    """
    from medcg_jax.families.weights.parts import save

    directory.mkdir(parents=True, exist_ok=True)
    tree = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    tree = adapters.whole_leaves(tree)
    stacked = {entry.path for entry in module_of(config).table(config) if entry.layers is not None}
    save(directory / PARAMS_DIR, tree, stacked)
    # Last: a directory with this file is whole.
    written = {"family": family_of(config), **dataclasses.asdict(config)}
    if trained_on:
        written |= {"trained_on": str(Path(trained_on).absolute()), "parts": sorted(tree)}
    (directory / MODEL_FILE).write_text(json.dumps(written, indent=1) + "\n")


def _restore(src: Path, found: Config, config: Config, mesh: Mesh, param_dtype):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        _, abstract = build.abstract(found, param_dtype=param_dtype)
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract, build.shardings(found, mesh),
        )  # fmt: skip
        restored = checkpointer.restore((src / PARAMS_DIR).absolute(), nnx.to_pure_dict(target))
    graphdef, wanted = build.abstract(config, param_dtype=param_dtype)
    places = build.shardings(config, mesh)

    def trim(value, leaf, place):
        if value.shape == leaf.shape:
            return value
        index = tuple(slice(size) for size in leaf.shape)
        return jax.jit(lambda x: x[index], out_shardings=place)(value)

    values = jax.tree.unflatten(jax.tree.structure(wanted), jax.tree.leaves(restored))
    return graphdef, jax.tree.map(trim, values, wanted, places)


def _check_same(found: Config, wanted: Config, src: Path) -> None:
    if type(found) is not type(wanted):
        raise WeightsError(f"{src} holds a {family_of(found)}; a {family_of(wanted)} is wanted")
    different = _differences(dataclasses.asdict(found), dataclasses.asdict(wanted))
    if different:
        raise WeightsError(f"{src} is of another architecture: {', '.join(different)}")


def _differences(found: dict, wanted: dict, prefix: str = "") -> list[str]:
    """The fields of the architecture that are not the same, each with both values."""
    different = []
    for key, value in found.items():
        name, ours = prefix + key, wanted[key]
        if isinstance(value, dict) and isinstance(ours, dict):
            different += _differences(value, ours, f"{name}.")
        # Rows beyond ours are dropped.
        elif name in RUN_FIELDS or (name == "text.vocab_size" and value >= ours):
            continue
        elif not (math.isclose(value, ours) if isinstance(value, float) and isinstance(ours, float) else value == ours):
            different.append(f"{name} {value} (wanted {ours})")
    return different


def _config_from_dict(found: dict) -> Config:
    family = found.pop("family", None)
    if not isinstance(family, str) or family not in registry.FAMILIES:
        raise WeightsError(f"family={quoted(family)}; accepted: {', '.join(registry.FAMILIES)}")
    return dataclass_of(registry.family(family).config_type, found, MODEL_FILE)
