"""A folder of arrays recorded from the original NExT-Chat: its model, and batches of this port from its inputs.

It holds `weights.safetensors`, `config.json`, `inputs.npz`, `expected_{base,mask,generate}.npz` and
`grads_{base,mask}.npz`, of a tiny random model of any sizes.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.families import build
from medcg_jax.families.clip import ClipVisionConfig
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.next_chat.sam import SamConfig
from medcg_jax.families.weights import engine, next_chat
from medcg_jax.families.weights.fields import expect, refused
from medcg_jax.families.weights.files import WeightsError, open_safetensors, read_json
from medcg_jax.mesh import make_mesh
from medcg_jax.parity.rows import Row, compared

# Above the rounding between two machines, below what any usual mistake changes.
TOLERANCE = 2e-5
IGNORED = -100
Arrays = dict[str, np.ndarray]


def load(folder: Path, *, change=None):
    """(config, graphdef, params) of a folder on one device; `change` alters the config first."""
    config = read_config(folder) if change is None else change(read_config(folder))
    graphdef, abstract = build.abstract(config)
    tensors = open_safetensors(folder / "weights.safetensors")
    names = engine.canonical_names(tensors.shapes, next_chat.canonical, str(folder))
    places = build.shardings(config, make_mesh(devices=jax.devices()[:1]))
    return config, graphdef, engine.load(next_chat.table(config), abstract, places, tensors, names, str(folder))


def read_config(folder: Path) -> NextChatConfig:
    """The architecture that a folder's config.json states (its own form, not a release's).

    Raises:
      WeightsError: a size is missing, or it differs from what this port computes.
    """
    found = read_json(folder / "config.json")
    expect(found, "", attention_downsample_rate=2, mm_projector_depth=2, tie_word_embeddings=False)
    # The norms of SAM's neck and upscaler, which have one epsilon with the encoder's blocks.
    expect(found, "", sam_layer_norm_2d_eps=1e-6, sam_encoder_layer_norm_eps=1e-6)
    try:
        return _config(found)
    except KeyError as error:
        raise WeightsError(f"{folder / 'config.json'} lacks {error}") from error
    except ValueError as error:
        raise refused(error, "") from error


def _config(found: dict) -> NextChatConfig:
    clip, sam, width = found["clip"], found["sam"], found["hidden_size"]
    heads = found["num_attention_heads"]
    return NextChatConfig(
        vision=ClipVisionConfig(
            clip["image_size"], clip["patch_size"], clip["num_hidden_layers"], found["mm_vision_select_layer"],
            clip["hidden_size"], clip["num_attention_heads"], clip["intermediate_size"], found["clip_layer_norm_eps"],
            activation=found["clip_hidden_act"],
        ),
        text=DecoderConfig(
            found["vocab_size"], found["num_hidden_layers"], width, heads, heads, width // heads,
            found["intermediate_size"], found["rope_theta"], found["rms_norm_eps"], found["max_position_embeddings"],
        ),
        sam=SamConfig(
            found["sam_image_size"], sam["patch_size"], sam["depth"], sam["embed_dim"], sam["num_heads"],
            sam["embed_dim"] * sam["mlp_ratio"], sam["window_size"], tuple(sam["global_attn_indexes"]),
            found["sam_encoder_layer_norm_eps"], sam["prompt_dim"], sam["mask_in_chans"], sam["decoder_depth"],
            sam["decoder_heads"], sam["decoder_mlp_dim"], found["sam_decoder_layer_norm_eps"],
            found["num_multimask_outputs"] + 1, sam["iou_head_hidden_dim"], sam["iou_head_depth"],
        ),
        num_mask_prompts=found["prompt_tokens"],
        image_token_id=found["im_patch_token"],
        at_token_id=found["at_token"],
        box_token_id=found["box_token"],
        pad_token_id=found["pad_token_id"],
        eos_token_id=found["eos_token_id"],
        scan_unroll=1,
    )  # fmt: skip


def batch_of(config: NextChatConfig, inputs: Arrays, *prefixes: str) -> dict[str, jax.Array]:
    """A batch of this port from the arrays `{prefix}input_ids`, ... of the original's calls, rows one behind the other.

    Boxes come in one list for all rows there; here each row has its own, in reading order.
    """

    def joined(name: str) -> np.ndarray:
        return np.concatenate([inputs[prefix + name] for prefix in prefixes])

    ids, labels = joined("input_ids"), joined("labels")
    answered = [np.flatnonzero(row) for row in (ids == config.at_token_id) & (labels > 0)]
    ahead = np.where(labels == config.box_token_id, IGNORED, labels)[:, 1:]
    supervised = [np.flatnonzero(row != IGNORED) for row in ahead]
    given, target = iter(joined("loc_inputs")), iter(joined("loc_targets"))
    boxes = [[next(given) for _ in range(num)] for num in (ids == config.box_token_id).sum(axis=1)]
    at_boxes = [[next(target) for _ in row] for row in answered]
    found = {
        "tokens": ids.astype(np.int32),
        "segment_ids": joined("attention_mask").astype(np.int32),
        "pixels": joined("images").transpose(0, 2, 3, 1)[:, None],
        "target_positions": _packed(supervised, np.int32),
        "targets": _packed([row[at] for row, at in zip(ahead, supervised, strict=True)], np.int32),
        "target_weights": _packed([np.ones(len(row)) for row in supervised], np.float32),
        "boxes": _packed(boxes, np.float32, 4),
        "box_weights": _packed([np.ones(len(row)) for row in boxes], np.float32),
        "at_positions": _packed(answered, np.int32),
        "at_boxes": _packed(at_boxes, np.float32, 4),
        "at_weights": _packed([np.ones(len(row)) for row in answered], np.float32),
    }
    return jax.tree.map(jnp.asarray, found)


def _packed(rows: list, dtype, *inner: int) -> np.ndarray:
    """[B, most, *inner] of rows of different lengths, zeros behind them."""
    out = np.zeros((len(rows), max(map(len, rows)), *inner), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = np.reshape(row, (len(row), *inner))
    return out


def mask_batch(config: NextChatConfig, inputs: Arrays) -> dict[str, jax.Array]:
    size = config.sam.image_size_px
    tile = inputs["sam_image_tile"]
    times = -(-size // tile.shape[2])
    pixels = np.tile(tile, (1, 1, times, times))[:, :, :size, :size].transpose(0, 2, 3, 1)[:, None]
    masks = np.unpackbits(inputs["seg_masks_packed"], axis=1).reshape(-1, 1, size, size)
    own = {"sam_pixels": jnp.asarray(pixels), "at_masks": jnp.asarray(masks, bool)}
    return batch_of(config, inputs, "seg_") | own


def golden_row(stage: str, ours, theirs, tolerance: float = TOLERANCE) -> Row:
    return dataclasses.replace(compared(stage, ours, theirs, floor=1.0), tolerance=tolerance)
