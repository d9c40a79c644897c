"""The five families at a tiny size, for tests that hold for all of them: configurations, weights, rows of phantoms.

Every axis that a rule splits divides by 8, but the key heads of Qwen2-VL and Llama-3.2-Vision, of which there are two.
"""

import functools

import jax
import numpy as np
import pytest
from record_sets import PhantomsWithFourOptions

from medcg_jax.config import DataConfig, MeshConfig, RunConfig
from medcg_jax.data.encoding import Encoded, concat_encoded
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import build, registry
from medcg_jax.mesh import make_mesh
from medcg_jax.train.setup import Setup

TINY = {family.name: family.tiny[0] for family in registry.families()}
WITH_BOXES = tuple(family.name for family in registry.families() if "detection_pairs" in family.tables)
SIZES = dict(embed_dim=64, num_heads=8, num_vision_heads=8, num_layers=2, num_vision_layers=2, scan_unroll=1)
OWN_SIZES = {
    "llava": dict(image_size_px=16, num_kv_heads=8),
    # An image takes fewer slots than a row has for it.
    "qwen2_vl": dict(mrope_sections=(1, 1, 2), max_pixels=512),
    "mllama": dict(image_size_px=16, cross_layers=(1,)),
    "minigpt_v2": dict(image_size_px=16, num_kv_heads=8),
    "next_chat": dict(image_size_px=16, num_kv_heads=8),
}
MESHES = {
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
}
DATA = DataConfig(system_prompt="", max_text_tokens=100, max_target_tokens=70)
SOURCE = PhantomsWithFourOptions(3, 6, 4)
# Questions of two and of four options, in rows of two lengths.
SUBSETS = ("ct-liver-state", PhantomsWithFourOptions.FOUR)


@functools.cache
def setup(family: str, mesh: str | None = None) -> Setup:
    """What a run of the family has before its first step, on a mesh of `MESHES` or on one device."""
    tokenizer = load_tokenizer("", registry.family(family).tokenizer)
    model = build.TINY[TINY[family]](
        -(-tokenizer.vocab_size // 64) * 64, **registry.family(family).token_ids(tokenizer), **SIZES | OWN_SIZES[family]
    )
    where = make_mesh(MESHES[mesh]) if mesh else make_mesh(devices=jax.devices()[:1])
    return Setup(RunConfig(data=DATA), where, tokenizer, model, registry.of(model).row_format(model), SOURCE)


@functools.cache
def training_rows(family: str) -> Encoded:
    """Choice questions of two subsets, and detection records where the family answers with boxes."""
    subsets = [*SUBSETS, *(["ct-liver-det"] if family in WITH_BOXES else [])]
    found = setup(family)
    return concat_encoded([found.encode(SOURCE.records(name, "train")) for name in subsets])


@functools.cache
def weights(family: str, seed: int = 0):
    """Random parameters as numpy arrays: every one away from its usual start, so that none is inert, logits up to 10.

    No compilation, unlike `build.create`, and the same on every mesh. The head never prefers a special token that no
    prompt ends a text with: what a model makes of an image's token among its own answers is not asked here.
    """
    config = setup(family).model
    rng = np.random.default_rng(seed)
    names = jax.tree.leaves(build.axis_names(config), is_leaf=lambda x: isinstance(x, tuple))
    _, shapes = build.abstract(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    made = []
    for (path, leaf), axes in zip(leaves, names, strict=True):
        keys = [key.key for key in path]
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        made.append(noise * _scale(keys, leaf.shape, axes) + (1 if keys[-1] == "scale" else 0))
    params = jax.tree.unflatten(tree, made)
    head = params["decoder"]["head"]["kernel"]
    head[:, config.image_token_id] = 0
    if family == "next_chat":
        # Longer than the others, so that boxes are among what is generated.
        head[:, config.at_token_id] *= 2
    return params


def _scale(keys: list[str], shape: tuple[int, ...], axes: tuple[str, ...]) -> float:
    """The spread of a parameter: of a kernel by what it sums over, of the head larger, of biases and norms smaller."""
    if keys[-1] in ("bias", "scale", "q_bias", "v_bias"):
        return 0.2
    if keys[-1].endswith("gate"):
        return 0.7
    if keys[0] == "lora":
        # Adapters change a projection by a part of it.
        return 0.3 * float(shape[1]) ** -0.5
    if keys[-1] != "kernel":
        return 1.0
    inner = [size for size, name in zip(shape, axes, strict=True) if name != "layer"]
    summed = np.prod(inner[:-1]) if keys[-2] in ("out", "down") else inner[0]
    return (2.0 if keys[-2] == "head" else 1.2) * float(summed) ** -0.5


def placed(family: str, mesh: str | None):
    """The weights on a mesh, by the rules."""
    found = setup(family, mesh)
    return jax.device_put(weights(family), build.shardings(found.model, found.mesh))


def compiled(mesh, jitted, *args):
    """The program of a jitted function for these arguments on a mesh."""
    with jax.set_mesh(mesh):
        return jitted.lower(*args).compile()


def every_other_long(names) -> list:
    """The parameters of a test, of which every second one runs with the long tests alone."""
    return [pytest.param(name, marks=pytest.mark.long) if i % 2 else name for i, name in enumerate(names)]
