"""Checkpoints in and out: released PyTorch directories, and our own (Orbax parameters beside `model.json`).

`open_checkpoint` takes either; `load_checkpoint` puts one on a mesh, and each host reads only what its devices hold;
`convert` makes one from the other, one tensor in memory at a time.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.families import build, registry
from medcg_jax.families.build import Config
from medcg_jax.families.weights import engine, peft
from medcg_jax.families.weights.families import family_of, module_of, module_of_release
from medcg_jax.families.weights.fields import dataclass_of, quoted
from medcg_jax.families.weights.files import WeightsError, copy_companions, read_json, write_safetensors, written_whole
from medcg_jax.families.weights.hub import is_repository, resolve
from medcg_jax.families.weights.llava import is_original
from medcg_jax.families.weights.processor import write_processor
from medcg_jax.families.weights.tables import Index
from medcg_jax.nn.base import Base
from medcg_jax.terminal import doing

MODEL_FILE, CARD = "model.json", "README.md"
PARAMS_DIR = "params"
# Fields of a config that do not belong to the architecture: run options and token ids.
RUN_FIELDS = (
    "compute_dtype", "matmul", "attention", "remat", "scan_unroll", "image_token_id", "pad_token_id", "eos_token_id",
    "text.max_positions", "min_pixels", "max_pixels", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "max_boxes",
    "intermediate_from", "mask_text_only_rows_attention", "base.dtype", "base.trained",
)  # fmt: skip
NO_PARTS: Mapping[str, Path] = {}
NO_IDS: Mapping[str, int] = {}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory with parameters, which are not read yet.

    stated: its config.json, or its model.json if `is_ours`.
    parts: files or directories outside `src`, by the names in `weights.families`.
    trained_on, trained: if `src` holds only the parts that a run trained, the checkpoint of the others and the names of
      the trained parts.
    below: the released model of peft's adapters in `src`.
    """

    src: Path
    config: Any
    stated: dict
    parts: Mapping[str, Path]
    is_ours: bool = False
    trained_on: str = ""
    trained: tuple[str, ...] = ()
    below: "Checkpoint | None" = None

    def base(self) -> "Checkpoint":
        """The checkpoint `trained_on`.

        Raises:
          WeightsError: it does not exist, or is of another architecture.
        """
        src = self.parts.get("base") or resolve(self.trained_on)
        if not src.is_dir():
            raise WeightsError(
                f"{self.src} holds only what a run trained, and {src}, which it was trained on, does not exist; pass "
                "--base=DIR to `medcg convert`, or set a run's model.checkpoint"
            )
        base = open_checkpoint(src)
        check_same(dataclasses.replace(base.config, lora=None), dataclasses.replace(self.config, lora=None), src)
        return base

    def leaves(self) -> dict:
        """All parameters as `engine.Leaf`s, not quantised.

        Raises:
          WeightsError: tensors missing, unused or misshapen, or files that cannot be read.
        """
        if self.trained:
            return {**self.base().leaves(), **self.trained_leaves()}
        if self.is_ours:
            return self._stored(_abstract(self.config))
        family = module_of(self.config)
        release = self.below or self
        tensors, names = family.open_release(release.src, release.stated, self.parts)
        if self.below:
            tensors, names = peft.with_adapters(tensors, names, self.src, family.canonical, whole=True)
        return engine.lazy(family.table(self.config), _abstract(self.config), tensors, names, str(self.src))

    def trained_leaves(self) -> dict:
        """The parts that a run trained, as `engine.Leaf`s."""
        abstract = _abstract(self.config)
        unknown = sorted(set(self.trained) - set(abstract))
        if unknown:
            file, names = self.src / MODEL_FILE, list(self.trained)
            raise WeightsError(f"{file}: parts={quoted(names)}; expected some of {', '.join(abstract)}")
        return self._stored({name: abstract[name] for name in self.trained})

    def _stored(self, abstract: dict) -> dict:
        from medcg_jax.families.weights.orbax_leaves import restore

        directory = self.src / PARAMS_DIR
        try:
            stored = restore(directory, abstract)
        # Orbax raises whatever a damaged directory leads to.
        except Exception as error:
            raise WeightsError(f"{directory} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if any(jax.tree.leaves(jax.tree.map(lambda leaf, like: leaf.shape != like.shape, stored, abstract))):
            raise WeightsError(f"{directory} holds other shapes than {self.src / MODEL_FILE} states")
        stacks = _stacks(self.config)
        return jax.tree_util.tree_map_with_path(partial(_finite, directory, stacks), stored)


def _abstract(config: Config) -> dict:
    """Shapes and dtypes of all parameters as in files, where nothing is quantised."""
    return nnx.to_pure_dict(build.abstract(dataclasses.replace(config, base=Base()))[1])


def _stacks(config: Config) -> set[tuple[str, ...]]:
    """Paths of the parameters whose leading axis counts layers."""
    axes = build.axis_names(dataclasses.replace(config, base=Base()))
    named = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))[0]
    return {tuple(key.key for key in path) for path, names in named if names[:1] == ("layer",)}


def _finite(directory: Path, stacks: set, path, leaf: engine.Leaf) -> engine.Leaf:
    """The `Leaf` with a check of its numbers on reading."""
    keys = tuple(key.key for key in path)
    name = f"{directory}: {'.'.join(keys)}"

    def stored(layer: int | None) -> engine.Stored:
        in_file = leaf.stored(layer)

        def read(index: Index) -> np.ndarray:
            try:
                value = in_file.read(index)
            except ValueError as error:  # TensorStore's, for a damaged file
                raise WeightsError(f"{name} cannot be read: {str(error)[:200]}") from error
            engine.check_finite(value, name if layer is None else f"{name}, layer {layer}")
            return value

        return dataclasses.replace(in_file, read=read)

    return engine.Leaf(leaf.shape, leaf.dtype, stored, stacked=keys in stacks)


def open_checkpoint(src: Path, parts: Mapping[str, Path] = NO_PARTS) -> Checkpoint:
    """The checkpoint in `src`, released or converted.

    Raises:
      WeightsError: there is no checkpoint, or it is not one that this port computes.
    """
    if (src / MODEL_FILE).is_file():
        return _open_ours(src, parts)
    file = src / "config.json"
    stated = read_json(file) if file.is_file() else None
    # LLaVA's map reads the adapter directories of the original LLaVA code.
    if peft.are_adapters(src) and not (stated and is_original(stated)):
        below = _open_below(src, parts)
        if stated is not None:
            check_same(_open_release(src, stated, parts).config, below.config, src)
        return Checkpoint(src, below.config, stated or {}, parts, below=below)
    inside = sorted(path.parent.name for path in src.glob("*/" + MODEL_FILE))
    if inside and stated is None or stated and "cells" in stated and "model_type" not in stated:
        kept = f"one of {', '.join(inside[:3])} in it" if inside else "weights/CELL in it (study.keep_weights)"
        raise WeightsError(
            f"{src} is a folder of several checkpoints, or of a grid; expected one checkpoint, as {kept}"
        )
    if stated is None:
        raise WeightsError(
            f"{src} holds no checkpoint (neither config.json nor {MODEL_FILE}); accepted: a directory with "
            "llava-hf/llava-1.5-7b-hf, llava-hf/llava-1.5-13b-hf or liuhaotian/llava-v1.5-7b from the Hugging Face hub "
            f"(its name is accepted too, or `hf download llava-hf/llava-1.5-7b-hf --local-dir {src}` first), or what "
            "`medcg convert` wrote"
        )
    return _open_release(src, stated, parts)


def _open_release(src: Path, stated: dict, parts: Mapping[str, Path]) -> Checkpoint:
    try:
        return Checkpoint(src, module_of_release(stated).read_release(src, stated, parts), stated, parts)
    except (ValueError, ArithmeticError) as error:  # of a field, or of fields that do not go together
        raise _named(error, src / "config.json") from error


def _open_ours(src: Path, parts: Mapping[str, Path]) -> Checkpoint:
    file = src / MODEL_FILE
    stated = read_json(file)
    fields = dict(stated)
    family, trained_on, trained = (fields.pop(key, None) for key in ("family", "trained_on", "parts"))
    if not isinstance(family, str) or family not in registry.FAMILIES:
        raise WeightsError(f"{file}: family={quoted(family)}; accepted: {', '.join(registry.FAMILIES)}")
    if (trained_on, trained) != (None, None):
        if not isinstance(trained_on, str) or not trained_on or "\0" in trained_on:
            raise WeightsError(f"{file}: trained_on={quoted(trained_on)}; expected the path of a checkpoint")
        if not isinstance(trained, list) or not trained or not all(isinstance(name, str) for name in trained):
            raise WeightsError(f"{file}: parts={quoted(trained)}; expected a list of names of a model's parts")
    try:
        config = dataclass_of(registry.family(family).config_type, fields, MODEL_FILE)
    except (ValueError, ArithmeticError) as error:
        raise _named(error, file) from error
    return Checkpoint(src, config, stated, parts, True, trained_on or "", tuple(trained or ()))


def _named(error: Exception, file: Path) -> WeightsError:
    text = str(error)
    return WeightsError(text if str(file.parent) in text else f"{file}: {text}")


def _open_below(src: Path, parts: Mapping[str, Path]) -> Checkpoint:
    """The released model of peft's adapters in `src`.

    Raises:
      WeightsError: no base, or a base that is no whole model.
    """
    base = parts.get("base")
    named = read_json(src / peft.ADAPTER_JSON).get("base_model_name_or_path")
    if base is None and isinstance(named, str) and named and "\0" not in named and Path(named).is_dir():
        base = Path(named)
    if base is None:
        raise WeightsError(
            f"{src} holds peft's adapters alone; pass --base=DIR with the model that they were trained on"
            + (f", {str(named)[:200]}" if named else "")
        )
    if not (base / "config.json").is_file():
        raise WeightsError(f"--base={base} has no config.json; expected the released model that {src} was trained on")
    stated = read_json(base / "config.json")
    if is_original(stated) or stated.get("model_type") == "llama" or peft.are_adapters(base):
        raise WeightsError(
            f"{src} holds adapters without the config.json and non_lora_trainables.bin that LLaVA's training writes "
            f"at its end, and {base} is no whole model in transformers' layout, to which peft's adapters belong"
        )
    return _open_release(base, stated, parts)


def read_config(src: Path, *, parts: Mapping[str, Path] = NO_PARTS) -> Config:
    """The architecture of the checkpoint in `src`; raises as `open_checkpoint`."""
    return open_checkpoint(src, parts).config


def trained_parts(src: Path) -> tuple[str, tuple[str, ...]] | None:
    """(the start checkpoint, the trained parts) of a directory with only a run's trained parts; else None."""
    if not (src / MODEL_FILE).is_file():
        return None
    checkpoint = open_checkpoint(src)
    return (checkpoint.trained_on, checkpoint.trained) if checkpoint.trained else None


def load_checkpoint(
    src: Path, config: Any, mesh: Mesh, *, parts: Mapping[str, Path] = NO_PARTS, param_dtype=jnp.float32, seed: int = 0
) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) of the checkpoint in `src` on `mesh`, for the architecture and settings of `config`.

    `config.base` quantises on the devices, one layer at a time. Adapters that the checkpoint lacks are initialised from
    `seed`. Trained parts replace those of the checkpoint that they were trained on (in model.json, or `parts["base"]`).
    Vocabulary rows beyond those of `config` are dropped (llava-hf pads 32000 to 32064).
    A host reads its share of all rows, which the devices exchange, and has at most two layers of one tensor beside them.

    Raises:
      WeightsError: no checkpoint, another architecture, or tensors missing, unused or misshapen.
    """
    checkpoint = open_checkpoint(src, parts)
    loaded = without_new_adapters(config, checkpoint)
    lacks_adapters = loaded is not config
    check_same(checkpoint.config, loaded, src)
    _, abstract = build.abstract(loaded, param_dtype=param_dtype)
    shardings = build.shardings(loaded, mesh)
    params = engine.put(checkpoint.leaves(), abstract, shardings)
    if lacks_adapters:
        lora = build.create_adapters(config, mesh, seed=seed, param_dtype=param_dtype)
        params = build.join(params, nnx.State({"lora": lora}))
    return build.abstract(config, param_dtype=param_dtype)[0], params


def without_new_adapters(config: Config, checkpoint: Checkpoint) -> Config:
    """`config` itself, or without adapters where the checkpoint has none: they are then initialised."""
    lacks_adapters = checkpoint.config.lora is None and config.lora is not None
    return dataclasses.replace(config, lora=None) if lacks_adapters else config


def open_leaves(src: Path, *, parts: Mapping[str, Path] = NO_PARTS) -> dict:
    """The parameters of the checkpoint in `src` as `engine.Leaf`s; raises as `Checkpoint.leaves`."""
    return open_checkpoint(src, parts).leaves()


def convert(
    src: Path,
    dst: Path,
    *,
    to: str = "orbax",
    parts: Mapping[str, Path] = NO_PARTS,
    ids: Mapping[str, int] = NO_IDS,
    system_prompt: str | None = None,
    card: Callable[[Checkpoint, tuple[str, ...]], str] | None = None,
    meta: tuple[str, str] | None = None,
) -> dict:
    """{"out", "to", "parameters", "tensors", "dtype"} after writing `dst` from `src`; prints one line.

    src: a released directory, a converted one, or peft's adapters, whose model `parts` names as `base`.
    to: "orbax"; "hf" for the released layout, adapters merged into the weights (those of the start checkpoint, never
      quantised); "peft" for the adapters, and a projector that was trained with them, as peft's.
    parts: files or directories outside `src`, by the names in `weights.families`.
    ids: token ids by field of the config, to replace those of the config in `src`.
    system_prompt: of the training that wrote `src`, for the chat template; None: it was not trained here.
    card: the text of README.md from the checkpoint and `write_processor`'s notes, for "hf" and "peft".
    meta: name and text of a file for "orbax", what is recorded of the training.
    Weights keep their dtype. `dst` appears when it is complete, with the tokenizer, chat templates and processor files
    of `src` (or of the checkpoint that it was trained on).

    Raises:
      WeightsError: `src` is no checkpoint this port knows, or `dst` exists and is not empty.
    """
    if to not in ("orbax", "hf", "peft"):
        raise WeightsError(f"to={to!r}; accepted: orbax, hf, peft")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise WeightsError(f"{dst} exists and is not empty; expected a new or empty directory")
    checkpoint = open_checkpoint(src, parts)
    config, trained = dataclasses.replace(checkpoint.config, **ids), checkpoint.trained
    if to == "peft" and (others := sorted(set(trained) - set(peft.PEFT_PARTS))):
        raise WeightsError(f"{src} holds {', '.join(others)}, too; to={to!r} takes adapters and a projector")
    params = checkpoint.trained_leaves() if to == "peft" and trained else checkpoint.leaves()
    beside = [src, *([checkpoint.base().src] if trained and to == "hf" else [])]
    family = module_of(config)
    with written_whole(dst) as new, doing(f"writing {dst}"):
        copy_companions([*beside, *([checkpoint.below.src] if checkpoint.below else [])], new)
        if to == "peft":
            num_tensors = peft.export_peft(family, params, config, new, base=checkpoint.trained_on)
            notes = write_processor(new, config, system_prompt)
        else:
            num_tensors = sum(1 if entry.layers is None else len(entry.layers) for entry in family.table(config))
            if to == "hf":
                export(params, config, new)
                notes = write_processor(new, config, system_prompt)
            else:
                save_params(new, params, dataclasses.replace(config, base=Base()))
                if meta:
                    (new / meta[0]).write_text(meta[1], encoding="utf-8")
        if card and to != "orbax":
            (new / CARD).write_text(card(checkpoint, notes), encoding="utf-8")
    dtype, number = ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})), build.num_params(params)
    print(f"{src} -> {dst}: {num_tensors} tensors, {number:,} parameters, {dtype}")
    return {"out": str(dst), "to": to, "parameters": number, "tensors": num_tensors, "dtype": dtype}


def export(params, config: Config, dst: Path, *, dtype=None) -> None:
    """Writes the family's released layout into `dst`: safetensors and config.json, one tensor on the host at a time.

    If the image or the padding token is outside LLaVA's vocabulary, its tables get rows up to the next multiple of 64:
    the mean of the others, so that no added row ever has the largest logit.
    Adapters that the layout does not have are merged into the weights.
    params: arrays or `engine.Leaf`s. dtype: of all tensors; None: their own.
    """
    family = module_of(config)
    params, config = peft.merged(family, params, config)
    params = peft.whole_leaves(params)
    table = family.table(config)
    rows = {entry.name for entry in table if entry.rows}
    num_rows = config.text.vocab_size
    last = max(config.image_token_id, config.pad_token_id)
    if rows and last >= num_rows:
        num_rows = -(-(last + 1) // 64) * 64
    stored, stream = engine.store(table, params)
    specs = {}
    for name, (shape, stored_dtype) in stored.items():
        shape = (num_rows, *shape[1:]) if name in rows else shape
        specs[family.released_name(name)] = shape, np.dtype(stored_dtype if dtype is None else dtype)

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
    text: Any = dataclasses.replace(config.text, vocab_size=num_rows)
    # The widest dtype, so that readers that take it from config.json lose nothing.
    widest = reduce(jnp.promote_types, {dtype for _, dtype in specs.values()})
    released = family.config_to_json(dataclasses.replace(config, text=text), widest.name)
    # Last: a directory with this file is whole.
    (dst / "config.json").write_text(json.dumps(released, indent=2) + "\n")


def save_params(directory: Path, params, config: Config, *, trained_on: str = "") -> None:
    """Writes `params` (arrays or `engine.Leaf`s) with Orbax, and `config` beside them, into `directory`.

    trained_on: the checkpoint with the other parameters (a path, or the hub's), if `params` are only those that were
      trained.
    """
    from medcg_jax.families.weights.orbax_leaves import save

    directory.mkdir(parents=True, exist_ok=True)
    tree = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    tree = peft.whole_leaves(tree)
    save(directory / PARAMS_DIR, tree, _stacks(config))
    # Last: a directory with this file is whole.
    written = {"family": family_of(config), **dataclasses.asdict(config)}
    if trained_on:
        start = trained_on if is_repository(trained_on) else str(Path(trained_on).absolute())
        written |= {"trained_on": start, "parts": sorted(tree)}
    (directory / MODEL_FILE).write_text(json.dumps(written, indent=1) + "\n")


def check_same(stored: Config, asked: Config, src: Path) -> None:
    """Raises WeightsError if the checkpoint in `src` is of another architecture than `asked`."""
    if type(stored) is not type(asked):
        raise WeightsError(f"{src} holds a {family_of(stored)}; expected a {family_of(asked)}")
    different = _differences(dataclasses.asdict(stored), dataclasses.asdict(asked))
    if different:
        raise WeightsError(f"{src} is of another architecture: {', '.join(different)}")


def _differences(stored: dict, asked: dict, prefix: str = "") -> list[str]:
    """The fields of the architecture that differ, each with both values."""
    different = []
    for key, value in stored.items():
        name, ours = prefix + key, asked[key]
        if isinstance(value, dict) and isinstance(ours, dict):
            different += _differences(value, ours, f"{name}.")
        # Vocabulary rows beyond ours are dropped on loading.
        elif name in RUN_FIELDS or (name == "text.vocab_size" and value >= ours):
            continue
        elif not (math.isclose(value, ours) if isinstance(value, float) and isinstance(ours, float) else value == ours):
            different.append(f"{name} {value} (expected {ours})")
    return different
