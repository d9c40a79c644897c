"""Checkpoints in and out: released PyTorch directories, and our own (Orbax parameters beside `model.json`).

`load_checkpoint` takes either; `convert` makes one from the other.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.mesh import make_mesh
from medcg_jax.models import build
from medcg_jax.models.clip import ClipVisionConfig
from medcg_jax.models.decoder import DecoderConfig
from medcg_jax.models.llava import LlavaConfig
from medcg_jax.weights import engine, llava
from medcg_jax.weights.files import Tensors, WeightsError, open_tensors, write_safetensors

MODEL_FILE = "model.json"
PARAMS_DIR = "params"
CLIP_REPO = "openai/clip-vit-large-patch14-336"
# What a checkpoint directory holds beside weights and config, and a converted one keeps.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "chat_template.json",
)  # fmt: skip


def convert(src: Path, dst: Path, *, to: str = "orbax", clip: Path | None = None) -> dict:
    """{"out", "to", "parameters", "tensors", "dtype"} after writing `dst` from `src`; prints one line.

    src: a released directory (llava-hf or liuhaotian) or a converted one. to: "orbax", or "hf" for llava-hf's layout.
    clip: directory of CLIP ViT-L/14-336, where `src` is liuhaotian's and holds no vision tower.
    Weights keep the dtype they have in `src`.

    Raises:
      WeightsError: `src` is no checkpoint this port knows, or `dst` exists and is not empty.
    """
    if to not in ("orbax", "hf"):
        raise WeightsError(f"to={to!r}; accepted: orbax, hf")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise WeightsError(f"{dst} exists and is not empty; a new or empty directory is accepted")
    config = read_config(src, clip=clip)
    mesh = make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    _, params = load_checkpoint(src, config, mesh, clip=clip, param_dtype=None)
    dst.mkdir(parents=True, exist_ok=True)
    num_tensors = len(engine.slots(llava.table(config), params))
    if to == "hf":
        export(params, config, dst)
    else:
        save_params(dst, params, config)
    for name in COMPANIONS:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)
    dtype, number = str(jax.tree.leaves(params)[0].dtype), build.num_params(params)
    print(f"{src} -> {dst}: {num_tensors} tensors, {number:,} parameters, {dtype}")
    return {"out": str(dst), "to": to, "parameters": number, "tensors": num_tensors, "dtype": dtype}


def read_config(src: Path, *, clip: Path | None = None) -> LlavaConfig:
    """The architecture of the checkpoint in `src`, released or converted.

    Raises:
      WeightsError: there is no checkpoint, or it is not one that this port computes.
    """
    if (src / MODEL_FILE).is_file():
        return _config_from_dict(json.loads((src / MODEL_FILE).read_text()))
    if not (src / "config.json").is_file():
        raise WeightsError(
            f"{src} holds no checkpoint (neither config.json nor {MODEL_FILE}); accepted: a directory with "
            "llava-hf/llava-1.5-7b-hf, llava-hf/llava-1.5-13b-hf or liuhaotian/llava-v1.5-7b from the Hugging Face hub "
            f"(`hf download llava-hf/llava-1.5-7b-hf --local-dir {src}`), or what `medcg convert` wrote"
        )
    clip = clip or _clip_beside(src)
    clip_json = _json(clip / "config.json") if clip else None
    return llava.config_from_json(_json(src / "config.json"), clip_json)


def load_checkpoint(
    src: Path, config: LlavaConfig, mesh: Mesh, *, clip: Path | None = None, param_dtype=jnp.float32
) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) of the checkpoint in `src` on `mesh`, for the architecture and settings of `config`.

    A checkpoint with more vocabulary rows than `config` (llava-hf pads 32000 to 32064) loses the rest of them.
    param_dtype: None keeps the checkpoint's.

    Raises:
      WeightsError: no checkpoint, another architecture, or tensors missing, unused or misshapen.
    """
    found = read_config(src, clip=clip)
    if (src / MODEL_FILE).is_file():
        _check_same(found, config, src)
        return _restore(src, found, config, mesh, param_dtype)
    tensors = open_tensors(src)
    names = engine.canonical_names(tensors.shapes, llava.canonical, str(src))
    if not llava.has_vision_tower(names):
        tensors, names = _with_clip(tensors, names, clip or _clip_beside(src), src)
    _check_same(found, config, src)
    if param_dtype is None:
        param_dtype = tensors.read(names["language_model.norm.weight"]).dtype
    graphdef, abstract = build.abstract(config, param_dtype=param_dtype)
    places = build.shardings(config, mesh)
    return graphdef, engine.load(llava.table(config), abstract, places, tensors, names, str(src))


def export(params, config: LlavaConfig, dst: Path, *, dtype=None) -> None:
    """Writes llava-hf's layout into `dst`: config.json and safetensors, one tensor in host memory at a time.

    Where the image token (or the padding) lies outside the vocabulary, its tables get rows up to the next multiple
    of 64: the mean of the others, so that no added row ever has the largest logit.
    dtype: of the file; None: the parameters'.
    """
    dtype = np.dtype(jax.tree.leaves(params)[0].dtype if dtype is None else dtype)
    num_rows = config.text.vocab_size
    last = max(config.image_token_id, config.pad_token_id)
    if last >= num_rows:
        num_rows = -(-(last + 1) // 64) * 64
    table = llava.table(config)
    rows = {entry.name for entry in table if entry.rows}
    shapes, stream = engine.store(table, params)
    specs = {}
    for name, shape in shapes.items():
        shape = (num_rows, *shape[1:]) if name in rows else shape
        specs[llava.released_name(name)] = (shape, dtype)

    def tensors():
        for name, value in stream:
            if name in rows and len(value) < num_rows:
                mean = value.astype(np.float32).mean(axis=0, keepdims=True).astype(value.dtype)
                value = np.concatenate([value, np.repeat(mean, num_rows - len(value), axis=0)])
            yield llava.released_name(name), value.astype(dtype)

    dst.mkdir(parents=True, exist_ok=True)
    write_safetensors(dst, specs, tensors())
    text = dataclasses.replace(config.text, vocab_size=num_rows)
    released = llava.config_to_json(dataclasses.replace(config, text=text), dtype.name)
    (dst / "config.json").write_text(json.dumps(released, indent=2) + "\n")


def save_params(directory: Path, params, config: LlavaConfig) -> None:
    """Writes `params` with Orbax, and `config` beside them, into `directory`."""
    import orbax.checkpoint as ocp

    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / PARAMS_DIR).absolute(), nnx.to_pure_dict(params))
    # Last: a directory with this file is whole.
    (directory / MODEL_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def _restore(src: Path, found: LlavaConfig, config: LlavaConfig, mesh: Mesh, param_dtype):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        if param_dtype is None:
            metadata = checkpointer.metadata((src / PARAMS_DIR).absolute())
            param_dtype = jax.tree.leaves(getattr(metadata, "item_metadata", metadata))[0].dtype
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


def _with_clip(tensors: Tensors, names: dict[str, str], clip: Path | None, src: Path):
    """Tensors and names of `src` with the vision tower of the CLIP checkpoint in `clip`."""
    if clip is None:
        raise WeightsError(
            f"{src} holds no vision tower; pass --clip=DIR with {CLIP_REPO} from the Hugging Face hub "
            f"(`hf download {CLIP_REPO} --local-dir DIR`), or put it beside {src} as {CLIP_REPO.split('/')[1]}"
        )
    tower = open_tensors(clip)
    tower_names = engine.canonical_names(tower.shapes, llava.canonical_clip, str(clip))
    # A prefix keeps the two checkpoints' names apart.
    shapes = {**tensors.shapes, **{f"clip:{name}": shape for name, shape in tower.shapes.items()}}

    def read(name: str) -> np.ndarray:
        return tower.read(name.removeprefix("clip:")) if name.startswith("clip:") else tensors.read(name)

    return Tensors(shapes, read), {**names, **{key: f"clip:{name}" for key, name in tower_names.items()}}


def _clip_beside(src: Path) -> Path | None:
    beside = src.resolve().parent / CLIP_REPO.split("/")[1]
    return beside if (beside / "config.json").is_file() else None


def _check_same(found: LlavaConfig, wanted: LlavaConfig, src: Path) -> None:
    different = []
    for part in ("vision", "text"):
        theirs, ours = dataclasses.asdict(getattr(found, part)), dataclasses.asdict(getattr(wanted, part))
        for name, value in theirs.items():
            fits = math.isclose(value, ours[name]) if isinstance(value, float) else value == ours[name]
            # Positions allocate nothing; rows beyond ours are dropped.
            if name == "max_positions" or (name == "vocab_size" and value >= ours[name]):
                fits = True
            if not fits:
                different.append(f"{part}.{name} {value} (wanted {ours[name]})")
    if different:
        raise WeightsError(f"{src} is of another architecture: {', '.join(different)}")


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__}; an object is accepted")
    return found


def _config_from_dict(found: dict) -> LlavaConfig:
    vision = {key: tuple(value) if isinstance(value, list) else value for key, value in found.pop("vision").items()}
    return LlavaConfig(vision=ClipVisionConfig(**vision), text=DecoderConfig(**found.pop("text")), **found)
