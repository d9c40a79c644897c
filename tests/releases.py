"""Small checkpoints of every family with random numbers, for tests of any room that reads or writes weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.families.minigpt_v2.model import minigpt_v2_tiny
from medcg_jax.families.mllama.model import llama32_vision_tiny
from medcg_jax.families.next_chat.model import next_chat_tiny
from medcg_jax.families.next_chat.sam import sam_tiny
from medcg_jax.families.qwen2_vl.model import qwen2_vl_tiny
from medcg_jax.families.weights import engine
from medcg_jax.families.weights.convert import module_of, open_leaves
from medcg_jax.families.weights.files import write_safetensors
from medcg_jax.mesh import make_mesh

# Image tokens within the vocabulary, so that no rows are added; two layers, for speed.
FEW = {"num_layers": 2, "num_vision_layers": 2, "scan_unroll": 1}
CONFIGS = {
    "llava": llava15_tiny(96, 90, **FEW),
    "qwen2_vl": qwen2_vl_tiny(96, 90, tie_head=True, **FEW),
    "mllama": llama32_vision_tiny(96, 96, **FEW, cross_layers=(1,)),
    "minigpt_v2": minigpt_v2_tiny(96, 200, **FEW),
    "next_chat": next_chat_tiny(101, 96, at_token_id=99, box_token_id=100, sam=sam_tiny(), **FEW),
}


def one():
    """A mesh of one device."""
    return make_mesh(devices=jax.devices()[:1])


def same(a, b):
    """Asserts equal trees of arrays, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def same_as(params, src: Path, **parts: Path):
    """Asserts that the release in `src` holds `params`, bit for bit; nothing is compiled."""
    leaves = open_leaves(src, parts=parts)
    same(jax.tree.map(np.asarray, leaves), jax.tree.map(np.asarray, nnx.to_pure_dict(params)))


def write(directory: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    """A release of these tensors, under these names, with this config.json."""
    directory.mkdir(exist_ok=True)
    write_safetensors(directory, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_params(config, seed: int = 0):
    """Parameters that hide nothing: every number of every one is random."""
    rng = np.random.default_rng(seed)
    _, abstract = build.abstract(config)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), abstract)


def random_release(family: str, folder: Path) -> tuple[Path, nnx.State]:
    """(released directory in `folder`, its parameters) of one of `CONFIGS`."""
    config = CONFIGS[family]
    params = random_params(config)
    tensors = released(config, tensors_of(config, params))
    return write(folder / "src", tensors, module_of(config).config_to_json(config, "float32")), params


def tensors_of(config, params) -> dict[str, np.ndarray]:
    """Canonical name -> released tensor."""
    return dict(engine.store(module_of(config).table(config), params)[1])


def released(config, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical names -> the released spelling."""
    return {module_of(config).released_name(name): value for name, value in tensors.items()}


def replaced(config, part: str, **fields):
    """The config with fields of one part changed."""
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})
