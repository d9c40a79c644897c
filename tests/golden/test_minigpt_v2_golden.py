"""Every array that the original MiniGPT-v2 code gave, and every usual mistake seen in them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.minigpt_v2 import eva
from medcg_jax.families.minigpt_v2 import model as minigpt_v2
from medcg_jax.families.weights.files import WeightsError, read_json
from medcg_jax.nn.attention import attention
from medcg_jax.parity.rows import layers
from tests.golden import minigpt_v2 as golden
from tests.golden.minigpt_v2 import TOLERANCE, golden_rows

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "minigpt_v2"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/expected.npz"))

if not FOLDERS:
    pytest.skip("../shared/golden/minigpt_v2 is not on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def loaded():
    """(config, graphdef, params, pixels, expected) of the first folder."""
    folder = FOLDERS[0]
    pixels = np.load(folder / "inputs.npz")["image"].transpose(0, 2, 3, 1)[:, None]
    return *golden.load(folder), jnp.asarray(pixels), dict(np.load(folder / "expected.npz"))


def vision(**fields):
    return lambda config: dataclasses.replace(config, vision=dataclasses.replace(config.vision, **fields))


def blocks_of_two(x, num):
    """Patches of 2 x 2 to a token, as other models group them."""
    side = round(x.shape[1] ** 0.5)
    x = x.reshape(x.shape[0], side // 2, 2, side // 2, 2, x.shape[2])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], -1, num * x.shape[-1])


def last_for_class(self, pixels, **options):
    """The tower's output with the class token kept, and the last patch gone in its place."""
    x = self.embed(pixels, options["dtype"])
    for block in layers(self.blocks):
        x = block(x, implementation=options["attention"])
    return self.norm(x)[:, :-1]


def values_bias_on_keys(q, k, v, **options):
    return attention(q, k + 0.3, v - 0.3, **options)


def varying_bias_on_keys(q, k, v, **options):
    return attention(q, k * 1.01, v, **options)


def no_class_token(params):
    params["vision"]["class_token"] = params["vision"]["class_token"] * 0


def swapped_biases(params):
    block = params["vision"]["blocks"]
    block["q_bias"], block["v_bias"] = block["v_bias"], block["q_bias"]


# name -> (change of config, change of params, (module, name, replacement) in the code); all seen in the image's tokens
IMAGE_FAULTS = {
    "norm behind the tower, eps": (vision(out_norm_eps=1e-6), None, None),
    "norms of the blocks, eps": (vision(norm_eps=1e-5), None, None),
    "tanh gelu": (None, None, (eva, "gelu", jax.nn.gelu)),
    "2 x 2 patches to a token": (None, None, (minigpt_v2, "group", blocks_of_two)),
    "class token kept": (None, None, (eva.EvaVision, "__call__", last_for_class)),
    "class token forgotten": (None, no_class_token, None),
    "biases of values on keys": (None, None, (eva, "attention", values_bias_on_keys)),
    "biases of queries and values": (None, swapped_biases, None),
}


def image_tokens(config, params, pixels):
    graphdef, _ = build.abstract(config)
    # A new function: what has been traced would hide a patch.
    return jax.jit(lambda params, pixels: nnx.merge(graphdef, params).encode_images({"pixels": pixels}))(params, pixels)


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_faults_in_the_images_are_seen(fault, loaded, monkeypatch):
    config, _, params, pixels, expected = loaded
    change, edit, patch = IMAGE_FAULTS[fault]
    params = jax.tree.map(lambda w: w, params)
    if edit:
        edit(params)
    if patch:
        monkeypatch.setattr(*patch)
    tokens = image_tokens(change(config) if change else config, params, pixels)
    assert np.abs(np.asarray(tokens) - expected["image_tokens"]).max() > 2 * TOLERANCE


def test_a_bias_on_every_key_alike_changes_nothing(loaded, monkeypatch):
    """Softmax does not see what is added to all scores of a query: why the keys need no bias, and why none is held."""
    config, _, params, pixels, expected = loaded
    monkeypatch.setattr(eva, "attention", lambda q, k, v, **options: attention(q, k + 0.3, v, **options))
    assert np.abs(np.asarray(image_tokens(config, params, pixels)) - expected["image_tokens"]).max() < TOLERANCE
    monkeypatch.setattr(eva, "attention", varying_bias_on_keys)
    assert np.abs(np.asarray(image_tokens(config, params, pixels)) - expected["image_tokens"]).max() > 2 * TOLERANCE


def lora(**fields):
    return lambda config: dataclasses.replace(config, lora=dataclasses.replace(config.lora, **fields))


def text(**fields):
    return lambda config: dataclasses.replace(config, text=dataclasses.replace(config.text, **fields))


def no_value_adapter(params):
    params["lora"]["v"]["b"] = params["lora"]["v"]["b"] * 0


# name -> (change of config, change of params, change of the pieces of a prompt); seen in the first generated logits
TEXT_FAULTS = {
    "adapters' scale": (lora(alpha=1.2), None, None),
    "adapters on queries alone": (None, no_value_adapter, None),
    "norm eps": (text(norm_eps=1e-6), None, None),
    "one <s> where the original has two": (
        None,
        None,
        lambda piece: {**piece, "before_image": piece["before_image"][1:]},
    ),
    "none": (None, None, None),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_faults_in_the_text_are_seen(fault, loaded):
    """And, as the last, that nothing is seen without one."""
    config, _, params, pixels, expected = loaded
    change, edit, pieces = TEXT_FAULTS[fault]
    params = jax.tree.map(lambda w: w, params)
    if edit:
        edit(params)
    graphdef, _ = build.abstract(change(config) if change else config)
    prompts = [(pieces or dict)(piece) for piece in read_json(FOLDERS[0] / "inputs.json")["generate"]]
    given = golden.left_padded(config, prompts)
    run = jax.jit(lambda params, given, images: nnx.merge(graphdef, params).hidden(**given, images=images)[0][:, -1])
    hidden = run(params, given, {"pixels": pixels})
    logits = nnx.merge(graphdef, params).logits(hidden)
    difference = np.abs(np.asarray(logits) - expected["gen_step_logits"][:, 0]).max()
    assert difference < 1e-4 if fault == "none" else difference > 5e-4


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json: No such file"):
        golden_rows(tmp_path)
    for file in FOLDERS[0].iterdir():
        if file.name != "expected.npz":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "expected.npz").write_text("nothing")
    with pytest.raises(WeightsError, match=r"expected\.npz is no readable \.npz file"):
        golden_rows(tmp_path)
