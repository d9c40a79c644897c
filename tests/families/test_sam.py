"""SAM against transformers on a tiny random model: encoder, prompts, masks; and every fault it must see."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families.next_chat import sam as sam_lib
from medcg_jax.families.next_chat import sam_decoder
from medcg_jax.families.next_chat.sam import SamConfig, SamEncoder, SamPrompt
from medcg_jax.families.next_chat.sam_decoder import MaskDecoder
from medcg_jax.families.weights import engine, next_chat
from medcg_jax.families.weights.files import Tensors
from medcg_jax.mesh import make_mesh

TOLERANCE = 1e-5
# A grid of 7 in windows of 3.
CONFIG = SamConfig(
    image_size_px=56, patch_size_px=8, num_layers=4, embed_dim=24, num_heads=3, mlp_dim=40, window_size=3,
    global_layers=(1, 2), prompt_dim=32, mask_prompt_dim=8, num_decoder_heads=4, decoder_mlp_dim=52, iou_dim=20,
)  # fmt: skip
# Names of transformers -> the original's.
RENAMED = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.layers\.(\d+)\.layer_norm(\d)", r".blocks.\1.norm\2"),
    (r"image_encoder\.layers", "image_encoder.blocks"),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"transformer\.blocks", "transformer.layers"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"(mlps\.\d+|prediction_head)\.layers\.0", r"\1.layers.1"),
    (r"proj_in", "layers.0"),
    (r"proj_out", "layers.2"),
    (r"shared_embedding\.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
    (r"encoder\.point_embed\.", "encoder.point_embeddings."),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
)


class Sam(nnx.Module):
    def __init__(self, config, rngs):
        self.sam_encoder = SamEncoder(config, rngs=rngs, unroll=1, remat="none")
        self.sam_prompt = SamPrompt(config, rngs=rngs)
        self.mask_decoder = MaskDecoder(config, rngs=rngs)


def original_name(name: str) -> str:
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return f"sam.model.{name}"


@pytest.fixture(scope="module")
def reference():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = CONFIG
    config = transformers.SamConfig(
        vision_config=dict(
            hidden_size=c.embed_dim, output_channels=c.prompt_dim, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, image_size=c.image_size_px, patch_size=c.patch_size_px, mlp_dim=c.mlp_dim,
            window_size=c.window_size, global_attn_indexes=list(c.global_layers), num_pos_feats=c.prompt_dim // 2,
        ),
        prompt_encoder_config=dict(
            hidden_size=c.prompt_dim, image_size=c.image_size_px, patch_size=c.patch_size_px,
            mask_input_channels=c.mask_prompt_dim,
        ),
        mask_decoder_config=dict(
            hidden_size=c.prompt_dim, mlp_dim=c.decoder_mlp_dim, num_attention_heads=c.num_decoder_heads,
            iou_head_hidden_dim=c.iou_dim, layer_norm_eps=1e-5,
        ),
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.SamModel(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif "rel_pos" in name or "embed.weight" in name or "token" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(1.3 * p[0].numel() ** -0.5 * noise)
        # A small residual stream, in which a wrong epsilon is seen.
        for p in (model.vision_encoder.pos_embed, *model.vision_encoder.patch_embed.parameters()):
            p.mul_(0.03)
        shared = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    return model


@pytest.fixture(scope="module")
def params(reference):
    found = {
        original_name(name): value.numpy()
        for name, value in reference.state_dict().items()
        if not name.startswith("shared_image_embedding")
    }
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Sam(CONFIG, nnx.Rngs(0))))
    abstract = jax.tree.map(lambda v: v.get_value(), abstract, is_leaf=lambda v: isinstance(v, nnx.Variable))
    mesh = make_mesh(devices=jax.devices()[:1])
    shardings = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), abstract)
    names = {name: name for name in found}
    table = next_chat.sam_table(CONFIG)
    return graphdef, engine.load(table, abstract, shardings, Tensors.of(found), names, "transformers")


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(3)
    pixels = rng.standard_normal((2, 56, 56, 3)).astype(np.float32)
    boxes = np.sort(rng.random((2, 2, 2)), axis=1).reshape(2, 4).astype(np.float32)
    return pixels, boxes, rng.standard_normal((2, 4, CONFIG.prompt_dim)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(reference, given):
    """Stages of transformers' submodules, prompted by four tokens and a box."""
    import torch

    pixels, boxes, tokens = (torch.from_numpy(x) for x in given)
    with torch.no_grad():
        image = reference.vision_encoder(pixels.permute(0, 3, 1, 2)).last_hidden_state
        corners, dense = reference.prompt_encoder(None, None, boxes[:, None] * CONFIG.image_size_px, None)
        grid = reference.get_image_wide_positional_embeddings()
        prompts = torch.cat([tokens[:, None], corners], dim=2)
        masks, iou = reference.mask_decoder(
            image_embeddings=image, image_positional_embeddings=grid.repeat(2, 1, 1, 1),
            sparse_prompt_embeddings=prompts, dense_prompt_embeddings=dense, multimask_output=False,
        )[:2]  # fmt: skip
    grid = grid[0].permute(1, 2, 0)
    found = (image.permute(0, 2, 3, 1), corners[:, 0], grid, masks[:, 0, 0], iou[:, 0, 0])
    return dict(zip(("image", "corners", "grid", "masks", "iou"), (x.numpy() for x in found), strict=True))


def encode(model, pixels):
    return {"image": model.sam_encoder(pixels, dtype=jnp.float32)}


def decode(model, image, boxes, tokens):
    prompt = model.sam_prompt
    prompts = jnp.concatenate([tokens, prompt.corners(boxes)], axis=1)
    masks, iou = model.mask_decoder(image + prompt.no_mask[...], prompt.grid(), prompts)
    return {"corners": prompt.corners(boxes), "grid": prompt.grid(), "masks": masks, "iou": iou}


jitted = {"encode": jax.jit(encode), "decode": jax.jit(decode)}


def differences(ours, theirs) -> dict[str, float]:
    return {
        name: float(np.abs(np.asarray(value) - theirs[name]).max() / max(1, np.abs(theirs[name]).max()))
        for name, value in ours.items()
    }


def test_every_stage(params, given, expected):
    model, (pixels, *prompts) = nnx.merge(*params), given
    ours = jitted["encode"](model, pixels)
    ours |= jitted["decode"](model, ours["image"], *prompts)
    found = differences(ours, expected)
    assert set(found) == set(expected)
    assert {name: value for name, value in found.items() if not value < TOLERANCE} == {}
    assert 1 < np.abs(expected["masks"]).max() < 100


def test_gradients_of_the_masks(reference, params, given, expected):
    """Of the mean square of the masks, to what stage 3 trains and to the prompt tokens."""
    import torch

    _, boxes, tokens = (torch.from_numpy(x) for x in given)
    image = torch.from_numpy(expected["image"]).permute(0, 3, 1, 2)
    tokens.requires_grad_(True)
    reference.zero_grad()
    with torch.no_grad():
        corners, dense = reference.prompt_encoder(None, None, boxes[:, None] * CONFIG.image_size_px, None)
        grid = reference.get_image_wide_positional_embeddings().repeat(2, 1, 1, 1)
    prompts = torch.cat([tokens[:, None], corners], dim=2)
    rest = dict(sparse_prompt_embeddings=prompts, dense_prompt_embeddings=dense, multimask_output=False)
    reference.mask_decoder(image_embeddings=image, image_positional_embeddings=grid, **rest)[
        0
    ].square().mean().backward()
    graphdef, state = params

    @jax.jit
    def gradients(decoder, tokens):
        def loss(decoder, tokens):
            model = nnx.merge(graphdef, nnx.State({**state.raw_mapping, "mask_decoder": decoder}))
            return jnp.square(decode(model, expected["image"], given[1], tokens)["masks"]).mean()

        return jax.grad(loss, argnums=(0, 1))(decoder, tokens)

    ours, of_tokens = gradients(state.raw_mapping["mask_decoder"], given[2])
    assert np.abs(np.asarray(of_tokens) - tokens.grad.numpy()).max() < TOLERANCE * float(tokens.grad.abs().max())
    table = [entry for entry in next_chat.sam_table(CONFIG) if entry.path[0] == "mask_decoder"]
    named = dict(engine.store(table, nnx.State({"mask_decoder": ours}))[1])
    theirs = {
        original_name(name): p.grad for name, p in reference.named_parameters() if name.startswith("mask_decoder")
    }
    assert set(theirs) == set(named)
    for name, grad in theirs.items():
        grad = np.zeros_like(named[name]) if grad is None else grad.numpy()
        # Keys moved alike change no attention: their bias has no gradient but rounding.
        scale = np.abs(theirs[name.replace("k_proj.bias", "k_proj.weight")] if "k_proj" in name else grad).max()
        assert np.abs(named[name] - grad).max() <= 1e-4 * max(float(scale), 1e-9), name


def no_relative(params):
    params["sam_encoder"]["windowed"]["rows"] = params["sam_encoder"]["windowed"]["rows"] * 0


def rows_for_columns(params):
    block = params["sam_encoder"]["whole"]
    block["rows"], block["columns"] = block["columns"], block["rows"]


def corners_swapped(params):
    params["sam_prompt"]["points"] = params["sam_prompt"]["points"][np.array([0, 1, 3, 2])]


def other_mask(params):
    tokens = params["mask_decoder"]["mask_tokens"]
    params["mask_decoder"]["mask_tokens"] = tokens[np.array([1, 0, 2, 3])]


def no_half_pixel(boxes):
    return boxes - 0.5 / CONFIG.image_size_px


def encoder_eps(model):
    for stack in (model.sam_encoder.windowed, model.sam_encoder.whole):
        stack.norm1.eps = stack.norm2.eps = 1e-5


def decoder_eps(model):
    for i in range(1, 5):
        getattr(model.mask_decoder.blocks, f"norm{i}").eps = 1e-3


def out_of_order(encoder):
    return [(encoder.whole, 0, 2), (encoder.windowed, 0, 2)]


# name -> (part, change of params, of boxes, of the model, (object, name, replacement) in the code)
FAULTS = {
    "no relative positions": ("encode", no_relative, None, None, None),
    "rows and columns exchanged": ("encode", rows_for_columns, None, None, None),
    "encoder eps": ("encode", None, None, encoder_eps, None),
    "layers out of order": ("encode", None, None, None, (SamEncoder, "runs", out_of_order)),
    "tanh gelu": ("encode", None, None, None, (sam_lib, "gelu", jax.nn.gelu)),
    "corners exchanged": ("decode", corners_swapped, None, None, None),
    "another mask": ("decode", other_mask, None, None, None),
    "no half pixel": ("decode", None, no_half_pixel, None, None),
    "decoder eps": ("decode", None, None, decoder_eps, None),
    "tanh gelu above": ("decode", None, None, None, (sam_decoder, "gelu", jax.nn.gelu)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, params, given, expected, monkeypatch):
    part, edit, move, tune, patch = FAULTS[fault]
    graphdef, state = params
    state = jax.tree.map(lambda w: w, state)
    if edit:
        edit(state)
    model = nnx.merge(graphdef, state)
    if tune:
        tune(model)
    if patch:
        monkeypatch.setattr(*patch)
    pixels, boxes, tokens = given
    args = (pixels,) if part == "encode" else (expected["image"], move(boxes) if move else boxes, tokens)
    function = {"encode": encode, "decode": decode}[part]
    # A new function where code changed: what is traced already would hide it.
    run = jax.jit(lambda *args: function(*args)) if patch else jitted[part]
    assert max(differences(run(model, *args), expected).values()) > 2 * TOLERANCE


def test_the_order_of_prompt_tokens_changes_nothing(params, given, expected):
    """The decoder has no positions of tokens: box before or after the others gives the same masks."""
    model, image = nnx.merge(*params), expected["image"]
    _, boxes, tokens = given
    corners = model.sam_prompt.corners(boxes)
    run = jax.jit(lambda model, prompts: model.mask_decoder(image, model.sam_prompt.grid(), prompts)[0])
    parts = ([tokens, corners], [corners, tokens], [tokens, corners[:, ::-1]], [tokens * 1.1, corners])
    usual, *exchanged, other = (np.asarray(run(model, jnp.concatenate(part, axis=1))) for part in parts)
    assert all(np.abs(usual - x).max() < 1e-4 for x in exchanged)
    assert np.abs(usual - other).max() > 1e-2


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image_size_px=50 is no multiple of patch_size_px=8"):
        sam_lib.sam_tiny(image_size_px=50)
    with pytest.raises(ValueError, match=r"global_layers=\(1, 9\); expected ascending numbers below 3"):
        sam_lib.sam_tiny(global_layers=(1, 9))
    with pytest.raises(ValueError, match="prompt_dim=36"):
        sam_lib.sam_tiny(prompt_dim=36)
    encoder = nnx.eval_shape(lambda: SamEncoder(CONFIG, rngs=nnx.Rngs(0), unroll=1, remat="none"))
    with pytest.raises(ValueError, match=r"sam_pixels \(1, 50, 56, 3\); expected \[batch, 56, 56, 3\]"):
        encoder(jnp.zeros((1, 50, 56, 3)), dtype=jnp.float32)
