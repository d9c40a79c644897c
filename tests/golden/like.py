"""Folders in the form of those of the original MiniGPT-v2 and NExT-Chat, of any sizes, made without the originals.

Their numbers are this port's. They prove that the reader takes every size, index and count from the folder and notices a
change in any array, not that the port is right. Shapes are written out, not taken from the port.
"""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.weights import engine, minigpt_v2, next_chat
from medcg_jax.families.weights.files import open_safetensors, write_safetensors
from medcg_jax.parity.rows import Row
from tests.golden import minigpt_v2 as golden_minigpt
from tests.golden import next_chat as golden_next

# The index of an array's first number: beyond all token ids, so that no generated row seems to end.
FIRST = 10_000


def write_json(path, value):
    path.write_text(json.dumps(value))


def weights(folder, table, config, released_name, seed):
    """Writes random weights of the config, under the original's names."""
    _, params = build.abstract(config)
    rng, tensors = np.random.default_rng(seed), {}
    for name, slot in engine.slots(table, params).items():
        shape = slot.released_shape
        noise = rng.standard_normal(shape).astype(np.float32)
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name else 1
        value = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else noise * fan_in**-0.5
        tensors[released_name(name)] = (0.2 * value if name.endswith("bias") else value).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    return {released_name(name): slot.released_shape for name, slot in engine.slots(table, params).items()}


def recorded(rows_of, files: dict, monkeypatch, *, num_pixels: int = 0, fixed=None) -> None:
    """Fills `files` (path -> {name: shape}) with what `rows_of` computes, by running it on arrays filled with indices.

    Every comparison gets the recorded numbers that it uses, so their indices show where the computed numbers belong.
    """
    held = {path: {name: indices(shape) for name, shape in shapes.items()} for path, shapes in files.items()}
    for path, arrays in held.items():
        arrays |= (fixed or {}).get(path, {})
        np.savez(path, **arrays)
    comparisons = {}

    def take(stage, ours, theirs, **_):
        comparisons[stage] = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert comparisons[stage][0].shape == comparisons[stage][1].shape, stage
        return Row(stage, 0.0, 1.0)

    for module in (golden_minigpt, golden_next):
        monkeypatch.setattr(module, "compared", take)
    monkeypatch.setattr(golden_minigpt, "exactly", take)
    rows_of()
    monkeypatch.undo()
    for path, arrays in held.items():
        given = dict(arrays)
        for name, array in given.items():
            stage = next((s for s in spellings(path.name, name) if s in comparisons), None)
            if stage is None:
                continue
            ours, theirs = comparisons[stage]
            if path.name.startswith("grads"):
                # Both were divided by the largest index, or by that of the weight beside a bias of keys.
                weight = given.get(name.replace("k_proj.bias", "k_proj.weight"), array)
                ours, theirs = ours * np.abs(weight).max(), theirs * np.abs(weight).max()
            if name == "num_logits_within_0.01_of_threshold":
                arrays[name] = np.round(ours * num_pixels)
                continue
            flat = np.zeros(array.size)
            flat[np.round(theirs).astype(int).reshape(-1) - FIRST] = ours.reshape(-1)
            arrays[name] = flat.reshape(array.shape)
        np.savez(path, **arrays)


def indices(shape) -> np.ndarray:
    return np.arange(FIRST, FIRST + int(np.prod(shape)), dtype=np.float64).reshape(shape)


def spellings(file: str, name: str):
    """Possible stages of the row of an array."""
    starts = {"expected_mask.npz": "mask/", "grads_mask.npz": "mask/", "expected_generate.npz": "generate/"}
    return (f"gradient {name}", name) if file == "grads.npz" else (starts.get(file, "") + name,)


MINIGPT = {
    "image_size": 60, "patch_size": 6, "vit_width": 52, "vit_depth": 2, "vit_heads": 4, "vit_mlp_hidden": 226,
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 68, "num_hidden_layers": 2, "num_attention_heads": 2,
    "lora_r": 6, "lora_alpha": 1.5, "lora_scale": 0.25, "lora_target_modules": ["q_proj", "v_proj"],
    "vit_layer_norm_eps": 1e-6, "ln_vision_eps": 1e-5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "tokens_per_group": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 9, "num_image_tokens": 25, "max_txt_len": 6,
}  # fmt: skip


def minigpt(folder, monkeypatch, seed: int = 0):
    """A folder of the sizes of the original's second variant; the second answer is cut and has lost its </s>."""
    config = minigpt_v2.config_from_json(MINIGPT)
    shapes = weights(folder, minigpt_v2.table(config), config, minigpt_v2.released_name, seed)
    write_json(folder / "config.json", MINIGPT)
    rng = np.random.default_rng(seed)

    def ids(num):
        return rng.integers(10, 97, num).tolist()

    train = [
        {"before_image": [5, 7], "after_image": [8, *ids(3), 6], "answer_used": [*ids(2), 2]},
        {"before_image": [5, 7], "after_image": [8, *ids(4), 6], "answer_used": ids(6)},
    ]
    asked = [{"before_image": [1, 1, 5, 7], "after_image": [8, *ids(num), 6]} for num in (3, 6)]
    write_json(folder / "inputs.json", {"train": train, "generate": asked})
    np.savez(
        folder / "inputs.npz", image=rng.standard_normal((2, 3, 60, 60)).astype(np.float32),
        pos_embed_small=rng.standard_normal((1, 26, 52)).astype(np.float32),
    )  # fmt: skip
    expected = {
        "vit_patch_embed": (2, 100, 52), "vit_embeddings": (2, 101, 52), "vit_block_0": (2, 101, 52),
        "vit_block_1": (2, 101, 52), "ln_vision": (2, 101, 52), "grouped_tokens": (2, 25, 208),
        "image_tokens": (2, 25, 40), "inputs_embeds": (2, 40, 40), "attention_mask": (2, 40),
        "llm_layer_0": (2, 40, 40),
        "llm_layer_1": (2, 40, 40), "llm_final_norm": (2, 40, 40), "logits": (2, 40, 97), "labels": (2, 40), "loss": (),
        "loss_per_sample": (2,), "gen_sequences": (2, 6), "gen_step_logits": (2, 5, 97),
        "gen_inputs_embeds": (2, 37, 40),
        "gen_attention_mask": (2, 37), "gen_margin": (2, 5), "pos_embed_interpolated": (1, 101, 52),
    }  # fmt: skip

    def trained(name):
        return "lora_" in name or name.startswith("llama_proj")

    grads = {f"grad/{n}" if trained(n) else f"norm/{n}": s if trained(n) else () for n, s in shapes.items()}
    files = {folder / "expected.npz": expected, folder / "grads.npz": grads}
    recorded(lambda: golden_minigpt.golden_rows(folder), files, monkeypatch)
    return folder


SAM = {
    "depth": 2, "embed_dim": 12, "num_heads": 3, "window_size": 5, "global_attn_indexes": [0], "mlp_ratio": 3,
    "prompt_dim": 40, "mask_in_chans": 4, "decoder_heads": 5, "decoder_mlp_dim": 36, "decoder_depth": 3,
    "iou_head_depth": 2, "iou_head_hidden_dim": 24,
}  # fmt: skip
NEXT = {
    "vocab_size": 98, "hidden_size": 40, "intermediate_size": 68, "num_hidden_layers": 2, "num_attention_heads": 2,
    "clip": {"hidden_size": 40, "intermediate_size": 62, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 40, "patch_size": 8},
    "im_patch_token": 93, "im_start_token": 94, "im_end_token": 95, "at_token": 96, "box_token": 97,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "mm_vision_select_layer": -2, "mm_projector_depth": 2, "clip_hidden_act": "quick_gelu", "clip_layer_norm_eps": 1e-5,
    "sam_encoder_layer_norm_eps": 1e-6, "sam_layer_norm_2d_eps": 1e-6, "sam_decoder_layer_norm_eps": 1e-5,
    "num_multimask_outputs": 2, "attention_downsample_rate": 2, "prompt_tokens": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
AT, BOX, PATCH = 96, 97, 93


def row_of(length: int, asked: int, answered: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) [length]: an image of 25 tokens, so many boxes in the question and in the answer, padding."""
    rng = np.random.default_rng(seed)
    pair = [AT, BOX]
    question = [1, 94, *[PATCH] * 25, 95, *rng.integers(5, 90, 2).tolist(), *pair * asked]
    answer = [*rng.integers(5, 90, 2).tolist(), *pair * answered, 2]
    labels = [-100] * len(question) + answer
    free = length - len(labels)
    return np.array(question + answer + [0] * free), np.array(labels + [-100] * free)


def next_chat_folder(folder, monkeypatch, *, sam_px: int = 256, seed: int = 0):
    """A folder of the sizes of the original's second variant, with SAM's image of `sam_px` and its grid of 16 x 16."""
    fields = {**NEXT, "sam": {**SAM, "patch_size": sam_px // 16}, "sam_image_size": sam_px}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    config = golden_next.read_config(folder)
    shapes = weights(folder, next_chat.table(config), config, next_chat.released_name, seed)
    rng, inputs = np.random.default_rng(seed), {}

    def box(num):
        return np.sort(rng.random((num, 2, 2)), axis=1).reshape(num, 4).astype(np.float32)

    def picture(num):
        return rng.standard_normal((num, 3, 40, 40)).astype(np.float32)

    # Of every row: boxes in the question, boxes in the answer.
    plans = {"": ((1, 1), (1, 2), (0, 0)), "seg_": ((1, 1), (0, 1))}
    plans |= {"mock_valid_": ((0, 1),), "mock_invalid_": ((0, 1),)}
    for prefix, plan in plans.items():
        length = 39 if prefix == "seg_" else 43
        rows = [row_of(length, *counts, seed=i + len(prefix)) for i, counts in enumerate(plan)]
        ids, labels = (np.stack(parts) for parts in zip(*rows, strict=True))
        arrays = {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).astype(int),
                  "images": picture(len(plan)),
                  "loc_inputs": box(sum(map(sum, plan))),
                  "loc_targets": box(sum(answered for _, answered in plan))}  # fmt: skip
        inputs |= {prefix + name: value for name, value in arrays.items()}
    inputs |= {
        "sam_image_tile": rng.standard_normal((2, 3, 100, 100)).astype(np.float32),
        "seg_masks_packed": np.packbits(rng.random((2, sam_px**2)) > 0.6, axis=1), "rec_prompt_len": np.array(37),
        "gen_input_ids": row_of(37, 1, 0, 9)[0][None, :37], "gen_images": picture(1), "gen_loc_inputs": box(1),
    }  # fmt: skip
    np.savez(folder / "inputs.npz", **inputs)
    generate_at(folder, inputs)
    base, mask, generate = next_shapes(sam_px)
    stages = golden_next.STAGES
    names = {key: {name for name in shapes if stage_of(name) in stages[key]} for key in stages}
    mask_names = names["mask"]
    clip = {name for name in shapes if name.startswith("model.vision_tower")}
    other_names = set(shapes) - mask_names - clip - {n for n in shapes if "positional_encoding" in n}

    def whole(prefix, names):
        return {f"{prefix}/{n}": shapes[n] for n in names}

    grads = {}
    for prefix in ("mock_valid/original", "mock_invalid/original", "clean"):
        grads |= whole(prefix, names["base"])
    grads |= {f"clean_norm/{term}/{n}": () for term in ("ce", "l1", "giou", "cycle1", "cycle2") for n in names["base"]}
    masks = {**whole("original", mask_names), **whole("fixed", mask_names)}
    masks |= {f"{kind}_norm/{n}": () for kind in ("original", "fixed") for n in other_names}
    files = {
        folder / "expected_base.npz": base, folder / "expected_mask.npz": mask,
        folder / "expected_generate.npz": generate, folder / "grads_base.npz": grads, folder / "grads_mask.npz": masks,
    }  # fmt: skip
    fixed = {folder / "expected_base.npz": {"rec/input_ids": row_of(43, 1, 1, 3)[0][None]}}

    def rows_of():
        return golden_next.golden_rows(folder)

    recorded(rows_of, files, monkeypatch, num_pixels=sam_px**2, fixed=fixed)
    return folder


def generate_at(folder, inputs) -> None:
    """Changes the head so that the model generates `<at>` first and again after the box: two boxes for one image."""
    _, graphdef, params = golden_next.load(folder)
    model = nnx.merge(graphdef, params)
    cache, states = model.init_cache(1, 60), []
    pixels = inputs["gen_images"].transpose(0, 2, 3, 1)[:, None]
    prompt = {"images": {"pixels": pixels}, "boxes": inputs["gen_loc_inputs"][None]}
    for tokens, arguments in ((inputs["gen_input_ids"], prompt), ([[AT]], {}), ([[BOX]], {})):
        hidden, cache = model.hidden(jnp.asarray(tokens, jnp.int32), cache=cache, **arguments)
        states.append(np.asarray(hidden[0, -1], np.float64))
    opened = open_safetensors(folder / "weights.safetensors")
    tensors = {name: np.array(opened.read(name)) for name in opened.shapes}
    # The row of least norm that gives both states a logit above every other's.
    tensors["lm_head.weight"][AT] = np.linalg.pinv(np.stack([states[0], states[2]])) @ np.full(2, 20.0)
    write_safetensors(folder, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def stage_of(name: str) -> str:
    """The submodule that a tensor of the original belongs to."""
    starts = {"model.vision_tower": "vision", "model.mm_projector": "projector", "loc_": "boxes",
              "seg_prompt": "mask_prompt",
              "sam.model.mask_decoder": "mask_decoder", "sam.": "sam", "": "decoder"}  # fmt: skip
    return next(stage for start, stage in starts.items() if name.startswith(start))


def next_shapes(sam_px: int) -> tuple[dict, dict, dict]:
    """Shapes of the arrays of expected_base, expected_mask and expected_generate."""
    terms = ("ce", "l1", "giou", "cycle1", "cycle2", "total")
    base = {f"mock_valid/clip_hidden_{i}": (4, 26, 40) for i in range(4)}
    per_token = ("inputs_embeds", "llm_layer_0", "llm_layer_1", "llm_final_norm")
    base |= {f"mock_valid/{name}": (4, 43, 40) for name in per_token}
    base |= {"mock_valid/image_features": (4, 25, 40), "mock_valid/projected_tokens": (4, 25, 40),
             "mock_valid/loc_embeds": (6, 40), "mock_valid/cycle2_boxes": (6, 4), "mock_valid/cycle1_encoded": (4, 40),
             "rec/pred_boxes": (2, 4), "rec/input_ids": (1, 43)}  # fmt: skip
    for mock in ("mock_valid", "mock_invalid"):
        base |= {f"{mock}/logits": (4, 43, 98), f"{mock}/hidden_at": (4, 40), f"{mock}/pred_boxes": (4, 4),
                 f"{mock}/pred_valid": (4,), f"{mock}/at_positions": (4,)}  # fmt: skip
        base |= {f"{mock}/loss_{kind}/{term}": () for kind in ("original", "clean") for term in terms}
    rows, columns = len(range(5, sam_px, 37)), len(range(3, sam_px, 41))
    mask = {
        "pred_boxes": (2, 4), "hidden_at": (2, 40), "seg_prompt": (2, 160), "sam_patch_embed": (2, 16, 16, 12),
        "sam_block_0": (2, 16, 16, 12), "sam_block_1": (2, 16, 16, 12), "sam_image_embedding": (2, 40, 16, 16),
        "box_embeddings": (2, 2, 40), "dense_embeddings": (2, 40, 1, 1), "low_res_masks": (2, 1, 64, 64),
        "iou_predictions": (2, 1), "full_masks_sampled": (2, 1, rows, columns), "full_masks_mean": (2,),
        "full_masks_norm": (2,), "logits": (2, 39, 98), "fraction_at_or_above_threshold": (2,),
        "num_logits_within_0.01_of_threshold": (2,), "loss/num_masks": (), "loss/mask_iou": (2,), "loss/iou": (2,),
    }  # fmt: skip
    mask |= {f"loss/{kind}/{name}": () if name == "total" else (2,)
             for kind in ("original", "fixed") for name in ("focal", "dice", "total")}  # fmt: skip
    generate = {
        "sequences": (1, 5), "step_logits": (1, 4, 98), "margin": (1, 4), "pred_boxes": (2, 4),
        "low_res_masks": (2, 1, 64, 64), "iou_predictions": (2, 1), "beam5/sequences": (1, 8),
        "beam5/pred_boxes": (1, 4),
    }  # fmt: skip
    return base, mask, generate
