"""A tiny random MiniGPT-v2 state dict, its port, and the same function composed of transformers' parts.

The tower is BLIP-2's vision model with the bias of the keys at zero and the last norm's epsilon at 1e-5, the decoder
Llama with the adapters merged into its weights; grouping and assembly are written out here. Residual streams are
small, so that a wrong epsilon is not lost in rounding; biases and norms are random, sizes odd, and heads * head width is
not the decoder's width.
"""

import dataclasses

import jax
import numpy as np

from medcg_jax.families import build
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.minigpt_v2.eva import EvaConfig
from medcg_jax.families.minigpt_v2.model import MiniGPTv2Config
from medcg_jax.families.weights import engine, llava, minigpt_v2
from medcg_jax.families.weights.files import Tensors
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.lora import LoraConfig

PAD, IMAGE = 7, 200
CONFIG = MiniGPTv2Config(
    vision=EvaConfig(image_size_px=30, patch_size_px=5, num_layers=3, embed_dim=36, num_heads=3, mlp_dim=52),
    text=DecoderConfig(
        vocab_size=101, num_layers=3, embed_dim=40, num_heads=4, num_kv_heads=2, head_dim=12, mlp_dim=72,
        rope_theta=500.0, max_positions=128,
    ),
    lora=LoraConfig(rank=3, alpha=1.5),
    image_token_id=IMAGE,
    pad_token_id=PAD,
    # Rolled: it compiles sooner; `test_blocks` has that it is the same unrolled.
    scan_unroll=1,
)  # fmt: skip


def state(config: MiniGPTv2Config = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical name -> tensor of a whole state dict."""
    _, params = build.abstract(config)
    rng = np.random.default_rng(seed)
    found = {}
    for name, slot in engine.slots(minigpt_v2.table(config), params).items():
        noise = rng.standard_normal(slot.released_shape).astype(np.float32)
        small = 0.03 if name.startswith("visual_encoder") else 0.3
        if "norm" in name or name == "ln_vision.weight":
            value = noise * 0.2 + (0 if name.endswith("bias") else 1)
        elif name.endswith("bias"):
            value = noise * 0.2 * (small if ".proj." in name or ".fc2." in name else 1)
        elif "lm_head" in name:
            value = noise * 3 * noise.shape[1] ** -0.5
        elif "lora" in name:
            value = noise * noise.shape[1] ** -0.5
        elif name.endswith(("cls_token", "pos_embed", "embed_tokens.weight")):
            value = noise * small
        else:
            out = name.endswith(
                (".proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight", "llama_proj.weight")
            )
            value = noise * 1.3 * (small if out else 1) * noise[0].size ** -0.5
        found[name] = value.astype(np.float32)
    return found


def port(tensors: dict[str, np.ndarray], config: MiniGPTv2Config = CONFIG):
    """(graphdef, params) of this port with these tensors (canonical names)."""
    graphdef, abstract = build.abstract(config)
    places = build.shardings(config, make_mesh(devices=jax.devices()[:1]))
    source = Tensors.of(tensors)
    names = {name: name for name in tensors}
    return graphdef, engine.load(minigpt_v2.table(config), abstract, places, source, names, "memory")


class Composed:
    """The model of transformers' parts, with the tensors of `state` (torch; needs transformers)."""

    def __init__(self, tensors: dict[str, np.ndarray], config: MiniGPTv2Config = CONFIG):
        import torch
        from transformers import Blip2VisionConfig, Blip2VisionModel, LlamaConfig, LlamaForCausalLM

        self.torch, self.config = torch, config
        self.tensors = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
        vision = config.vision
        described = Blip2VisionConfig(
            hidden_size=vision.embed_dim, intermediate_size=vision.mlp_dim, num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads, image_size=vision.image_size_px, patch_size=vision.patch_size_px,
            layer_norm_eps=vision.norm_eps, hidden_act="gelu", attn_implementation="eager",
        )  # fmt: skip
        self.vision = Blip2VisionModel(described).eval()
        # transformers gives it the blocks' epsilon.
        self.vision.post_layernorm.eps = vision.out_norm_eps
        self.vision.load_state_dict({self._vision_name(n): x for n, x in self._vision_tensors().items()}, strict=True)
        llama = LlamaConfig(**llava.text_to_json(config.text))
        llama._attn_implementation = "eager"
        self.llama = LlamaForCausalLM(llama).eval()
        merged = {n.removeprefix("llama_model."): x for n, x in self.tensors.items() if n.startswith("llama_model.")}
        for name in [n for n in merged if n.endswith("lora_A.weight")]:
            a, b = merged.pop(name), merged.pop(name.replace("lora_A", "lora_B"))
            merged[name.replace("lora_A.", "")] += config.lora.scale * b @ a
        self.llama.load_state_dict(merged, strict=True)

    def _vision_tensors(self) -> dict:
        found = {}
        for name, value in self.tensors.items():
            if name.endswith("q_bias"):
                v_bias = self.tensors[name.replace("q_bias", "v_bias")]
                found[name.replace("q_bias", "qkv.bias")] = self.torch.cat([value, 0 * value, v_bias])
            elif name.startswith(("visual_encoder", "ln_vision")) and not name.endswith("v_bias"):
                found[name] = value
        return found

    @staticmethod
    def _vision_name(name: str) -> str:
        pairs = (
            ("visual_encoder.", ""), ("blocks.", "encoder.layers."), (".attn.", ".self_attn."),
            (".proj.", ".projection."), ("patch_embed.projection", "embeddings.patch_embedding"),
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
            ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
            ("ln_vision", "post_layernorm"),
        )  # fmt: skip
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    def encode_images(self, pixels: np.ndarray):
        """torch [I, P, D] of normalised pixels [I, 3, h, w]."""
        x = self.vision(self.torch.from_numpy(pixels)).last_hidden_state[:, 1:]
        x = x.reshape(len(x), -1, self.config.patches_per_token * x.shape[2])
        return x @ self.tensors["llama_proj.weight"].T + self.tensors["llama_proj.bias"]

    def logits(self, tokens: np.ndarray, mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """float32[B, T, V]; one image a row."""
        torch = self.torch
        with torch.no_grad():
            is_image = torch.from_numpy(tokens == self.config.image_token_id)
            embedded = self.llama.model.embed_tokens(torch.from_numpy(tokens).masked_fill(is_image, 0))
            embedded[is_image] = self.encode_images(pixels).reshape(-1, embedded.shape[2])
            return self.llama(inputs_embeds=embedded, attention_mask=torch.from_numpy(mask)).logits.numpy()


def inputs(config: MiniGPTv2Config = CONFIG, *, side: str = "right", seed: int = 1) -> dict[str, np.ndarray]:
    """tokens, segment_ids int64[3, T] padded on `side`, and normalised pixels float32[3, 3, h, w], one image a row."""
    rng = np.random.default_rng(seed)
    num, size = config.num_image_tokens, config.image_size_px
    texts = [rng.integers(10, 100, length) for length in (14, 9, 11)]
    rows = [np.concatenate([[1], text[:2], [config.image_token_id] * num, text[2:]]) for text in texts]
    length = max(map(len, rows))
    tokens, segments = np.full((3, length), PAD), np.zeros((3, length), int)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, place], segments[i, place] = row, 1
    return {
        "tokens": tokens, "segment_ids": segments,
        "pixels": rng.standard_normal((3, 3, size, size)).astype(np.float32),
    }  # fmt: skip


def given(inputs: dict[str, np.ndarray]) -> dict:
    """What `MiniGPTv2.hidden` takes of `inputs`."""
    pixels = np.ascontiguousarray(inputs["pixels"].transpose(0, 2, 3, 1))[:, None]
    return {
        "tokens": inputs["tokens"].astype(np.int32), "segment_ids": inputs["segment_ids"].astype(np.int32),
        "images": {"pixels": pixels},
    }  # fmt: skip


def with_fields(part: str, **fields) -> MiniGPTv2Config:
    """`CONFIG` with fields of one part changed."""
    return dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **fields)})
