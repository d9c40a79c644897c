"""The families in PyTorch, for `bench.pytorch`: random weights, trained parts, a batch as a model's inputs.

LLaVA, Qwen2-VL and Llama-3.2-Vision are transformers' own classes. transformers has none of MiniGPT-v2 and NExT-Chat:
`bench.pytorch_models` builds them of its towers and its Llama.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from medcg_jax.bench.pytorch_models import MiniGPTv2, NextChat
from medcg_jax.config import ConfigError
from medcg_jax.families import registry
from medcg_jax.families.common import FamilyConfig
from medcg_jax.families.flops import forward, training, vit
from medcg_jax.families.mllama.text import EXTRA_ROWS
from medcg_jax.families.mllama.vit import MULTIPLE, NUM_TILES
from medcg_jax.parity import mllama as parity

Batch = dict[str, np.ndarray]
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Side:
    """One family in PyTorch.

    make: (config, dtype, attention) -> the model with random weights; attention: transformers' name of one.
    images: (config, batch, tokens) -> arguments of the model's forward for images, and what else it needs beside text;
      `batch` has the pipeline's keys, `tokens` int[B, T] its rows as the model gets them (cut, or padded at the left).
    parts: part of the port's model -> beginnings of its parameters' names.
    unneeded: (config) -> FLOPs of one row's forward pass that the model executes and does not need.
    about: what the model is, for the report.
    no_generation: why its generation is not compared; "" where it is.
    """

    make: Callable[[Any, "torch.dtype", str], "torch.nn.Module"]
    images: Callable[[Any, Batch, np.ndarray], Tensors]
    parts: dict[str, tuple[str, ...]]
    about: str
    no_generation: str = ""
    unneeded: Callable[[Any], float] = field(default=lambda config: 0.0)

    def trained(self, model, config: FamilyConfig, trainable: tuple[str, ...]) -> None:
        """Sets which parameters of `model` train: those of the parts `trainable`.

        Raises:
          ConfigError: a part that this side does not have.
        """
        accepted = {*self.parts, *(("lora",) if config.lora else ())}
        if unknown := sorted(set(trainable) - accepted):
            raise ConfigError(
                f"--against=torch with model.trainable={','.join(unknown)}: expected some of "
                f"{', '.join(sorted(accepted))}"
            )
        names = tuple(name for part in trainable for name in self.parts.get(part, ()))
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.requires_grad_("lora" in trainable)
            else:
                weight.requires_grad_(name.startswith(names) and not never_run(name, config))


def never_run(name: str, config: FamilyConfig) -> bool:
    """Whether a parameter belongs to the layers of CLIP above the one whose features are taken."""
    tower = "model.vision_tower."
    if not name.startswith(tower):
        return False
    layer = name.removeprefix(f"{tower}encoder.layers.").partition(".")[0]
    return name.startswith(f"{tower}post_layernorm.") or layer.isdigit() and int(layer) >= config.vision.num_run_layers


def side_of(config: FamilyConfig) -> Side:
    return SIDES[config.family]


def new_model(config: FamilyConfig, dtype, attention: str):
    """The family's model of this architecture with random weights, with the run's adapters, on the default device."""
    model = side_of(config).make(config, dtype, attention)
    if config.lora is not None:
        import peft

        targets = [f"{'o' if name == 'out' else name}_proj" for name in config.lora.targets]
        # Dropout would be work that the port does not do.
        adapters = peft.LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=0.0, target_modules=targets
        )
        peft.inject_adapter_in_model(adapters, decoder_of(model))
        model.to(dtype)
    return model


def inside_table(config: FamilyConfig, batch: Batch) -> tuple[FamilyConfig, Batch]:
    """(config, batch) whose image token has a row in the embedding, where transformers looks it up before its features
    replace it. LLaVA-1.5's id is the first one behind the port's table."""
    rows = config.text.vocab_size + (EXTRA_ROWS if config.family == "mllama" else 0)
    if config.image_token_id < rows:
        return config, batch
    tokens = batch["tokens"]
    is_image = tokens == config.image_token_id
    moved = np.where(is_image, rows - 1, np.minimum(tokens, rows - 2))
    return dataclasses.replace(config, image_token_id=rows - 1), batch | {"tokens": moved}


def decoder_of(model):
    return model.language_model if hasattr(model, "language_model") else model.model.language_model


def executed(config: FamilyConfig, rows: int, length: int, trainable: tuple[str, ...] = ()) -> float:
    """FLOPs that the PyTorch model executes on `rows` rows of `length` tokens: a training step, or a forward pass where
    nothing trains.

    Our formulas, and what the model computes and does not need: logits at every position, `Side.unneeded`. Minus the
    gradient of the first trained product's input, which autograd skips. What `torch.utils.flop_counter` counts with
    attention "eager": exactly for LLaVA and Qwen2-VL; within 2 % for the others (tests) but NExT-Chat's heads. Fused
    kernels recompute attention's products in the backward pass, which is not counted. Images have the most tokens.
    """
    per_row, unneeded = forward(config, length=length), side_of(config).unneeded(config)
    if not trainable:
        return rows * (per_row.total + unneeded)
    spared = 0.0
    if "vision" in trainable:
        spared = first_product(config)
    elif "projector" in trainable:
        # A norm before the first product, as in Qwen2-VL's merger, needs the gradient.
        spared = 0.0 if config.family == "qwen2_vl" else first_of_projector(config)
    return rows * (training(per_row, trainable=trainable) + unneeded - spared)


def first_product(config: FamilyConfig) -> float:
    """FLOPs of a row's product of patches."""
    vision = config.vision
    frames, tiles = getattr(vision, "num_frames", 1), NUM_TILES if config.family == "mllama" else 1
    patches = config.num_image_tokens * vision.merge**2 if config.family == "qwen2_vl" else None
    patches = patches or tiles * (vision.image_size_px // vision.patch_size_px) ** 2
    return 2.0 * patches * 3 * frames * vision.patch_size_px**2 * vision.embed_dim


def first_of_projector(config: FamilyConfig) -> float:
    vision, width = config.vision, config.text.embed_dim
    if config.family == "mllama":
        return 2.0 * vision.num_tokens * vision.feature_dim * width
    return 2.0 * vision.num_patches * vision.embed_dim * width


# ------------------------------------------------------------------ the families


def described(config: FamilyConfig, kind: str):
    """transformers' configuration of the class `kind` for this architecture."""
    return getattr(transformers, kind).from_dict(registry.of(config).weight_map.config_to_json(config, "float32"))


def of_class(kind: str) -> Callable:
    """`Side.make` of the class of transformers whose configuration is of the class `kind`."""

    def make(config: FamilyConfig, dtype, attention: str):
        load = transformers.AutoModelForImageTextToText.from_config
        return load(described(config, kind), dtype=dtype, attn_implementation=attention)

    return make


def mllama(config: FamilyConfig, dtype, attention: str):
    """`Side.make`; features are the inputs of the intermediate layers, as in Meta's model, where transformers can."""
    model = of_class("MllamaConfig")(config, dtype, attention)
    if min(config.vision.intermediate_layers, default=1) >= 1:
        parity.prepare(model, config)  # type: ignore[arg-type]
    return model


def normalised(config: FamilyConfig, pixels: np.ndarray) -> np.ndarray:
    """float32[..., 3] of uint8[..., 3], as CLIP's processor has it."""
    mean, std = np.float32(config.vision.image_mean), np.float32(config.vision.image_std)
    return (pixels.astype(np.float32) / 255 - mean) / std


def square_images(config: FamilyConfig, batch: Batch, tokens: np.ndarray) -> Tensors:
    """One square image a row: pixel_values float32[B, 3, h, w]."""
    pixels = normalised(config, batch["pixels"][:, 0]).transpose(0, 3, 1, 2)
    return {"pixel_values": torch.from_numpy(pixels.copy())}


def qwen2_vl_images(config: FamilyConfig, batch: Batch, tokens: np.ndarray) -> Tensors:
    """The real patches of all images one after another, each number repeated for every frame."""
    vision, grids = config.vision, batch["grids"][:, 0]
    sizes = grids.prod(axis=-1)
    patches = np.concatenate([pixels[:size] for pixels, size in zip(batch["pixels"][:, 0], sizes, strict=True)])
    patches = patches.reshape(len(patches), 3, -1).swapaxes(1, 2)
    patches = normalised(config, patches).swapaxes(1, 2)[:, :, None]
    pixels = np.repeat(patches, vision.num_frames, axis=2).reshape(len(patches), -1)
    is_image = (tokens == config.image_token_id).astype(np.int64)
    return {
        "pixel_values": torch.from_numpy(pixels),
        "image_grid_thw": torch.from_numpy(np.insert(grids, 0, 1, axis=1).astype(np.int64)),
        "mm_token_type_ids": torch.from_numpy(is_image),
    }


def mllama_images(config: FamilyConfig, batch: Batch, tokens: np.ndarray) -> Tensors:
    """Four tiles of every image, absent ones zero, which the tokens from the image on see."""
    present = (np.arange(NUM_TILES) < batch["num_tiles"][..., None]).astype(np.int64)
    pixels = normalised(config, batch["pixels"]).transpose(0, 1, 2, 5, 3, 4) * present[..., None, None, None]
    sees = np.cumsum(tokens == config.image_token_id, axis=1) > 0
    return {
        "pixel_values": torch.from_numpy(pixels.astype(np.float32)),
        "aspect_ratio_ids": torch.from_numpy(batch["aspect_ratio_ids"].astype(np.int64)),
        "aspect_ratio_mask": torch.from_numpy(present),
        "cross_attention_mask": torch.from_numpy(sees[:, :, None, None] * present[:, None]),
    }


def next_chat_images(config: FamilyConfig, batch: Batch, tokens: np.ndarray) -> Tensors:
    """The square image, and in a training batch the boxes of the text and those of the answers with their `<at>`."""
    names = ("boxes", "box_weights", "at_positions", "at_boxes", "at_weights")
    boxes = {name: torch.from_numpy(batch[name]) for name in names if name in batch}
    return square_images(config, batch, tokens) | boxes


def clip_above(config: FamilyConfig) -> float:
    """FLOPs of CLIP's layers above the one whose features are taken, which transformers runs."""
    vision = config.vision
    return vit(vision.num_layers - vision.num_run_layers, vision.embed_dim, vision.mlp_dim, vision.num_patches + 1)


def mllama_padding(config: FamilyConfig) -> float:
    """FLOPs of the tower on the tokens that fill up each tile (the port has them too; the formulas leave them out)."""
    vision = config.vision
    tokens = vision.num_tokens + NUM_TILES * (-vision.tokens_per_tile % MULTIPLE)
    shape = vision.num_layers + vision.num_global_layers, vision.embed_dim, vision.mlp_dim
    return vit(*shape, tokens) - vit(*shape, vision.num_tokens)


DECODER = ("model.language_model.", "lm_head.")
CLIP_PARTS = {
    "vision": ("model.vision_tower.",), "projector": ("model.multi_modal_projector.",), "decoder": DECODER
}  # fmt: skip
# Family -> its side. `bench.run.COMPARED` names them for where PyTorch is not installed.
SIDES = {
    "llava": Side(
        of_class("LlavaConfig"), square_images, CLIP_PARTS, "transformers' LlavaForConditionalGeneration",
        unneeded=clip_above,
    ),
    "qwen2_vl": Side(
        of_class("Qwen2VLConfig"), qwen2_vl_images,
        {"vision": ("model.visual.patch_embed.", "model.visual.blocks."), "projector": ("model.visual.merger.",),
         "decoder": DECODER},
        "transformers' Qwen2VLForConditionalGeneration",
    ),
    "mllama": Side(
        mllama, mllama_images,
        {"vision": ("model.vision_model.",), "projector": ("model.multi_modal_projector.",), "decoder": DECODER},
        "transformers' MllamaForConditionalGeneration", unneeded=mllama_padding,
    ),
    "minigpt_v2": Side(
        MiniGPTv2.random, square_images,
        {"vision": ("vision.",), "projector": ("projector.",), "decoder": ("language_model.",)},
        "built of transformers' Blip2VisionModel (EVA) and LlamaForCausalLM, with PEFT's adapters",
    ),
    "next_chat": Side(
        NextChat.random, next_chat_images, CLIP_PARTS | {"boxes": ("loc_encoder.", "loc_decoder.")},
        "transformers' LlavaForConditionalGeneration with encoder, decoder and losses of boxes", unneeded=clip_above,
        no_generation="NExT-Chat's generation is not compared: transformers' generate cannot feed a decoded box back",
    ),
}  # fmt: skip
