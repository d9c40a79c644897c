"""LLaVA-1.5: CLIP's patch features through a two-layer projector into a Llama decoder.

Source: huggingface/transformers:models/llava/modeling_llava.py at 5.23.0, haotian-liu/LLaVA at c121f04;
arXiv 2310.03744.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families.clip import ClipUnused, ClipVisionConfig
from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, bench, tiny
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.nn.layers import ACTIVATIONS, Dense, gelu


@dataclass(frozen=True)
class LlavaConfig(FamilyConfig):
    """The defaults are LLaVA-1.5-7B."""

    family = "llava"

    vision: ClipVisionConfig = ClipVisionConfig()
    text: DecoderConfig = DecoderConfig()
    # Between the projector's layers; a name in `nn.layers.ACTIVATIONS`.
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_features


def llava15_7b(**fields) -> LlavaConfig:
    """LLaVA-1.5-7B: 7,062,902,784 parameters in the checkpoint. `fields` are LlavaConfig's own."""
    return LlavaConfig(**fields)


def llava15_13b(**fields) -> LlavaConfig:
    text = DecoderConfig(num_layers=40, embed_dim=5120, num_heads=40, num_kv_heads=40, mlp_dim=13824)
    return LlavaConfig(**{"text": text, **fields})


def llava15_tiny(vocab_size: int, image_token_id: int, **fields) -> LlavaConfig:
    """As `common.tiny`."""
    return tiny(LlavaConfig, vocab_size, image_token_id, **fields)


def llava15_bench(vocab_size: int, image_token_id: int, **fields) -> LlavaConfig:
    """As `common.bench`: 64 tokens an image."""
    vision = {"image_size_px": 64, "num_layers": 5}
    return bench(LlavaConfig, vocab_size, image_token_id, vision=vision, text={}, **fields)


class Projector(nnx.Module):
    """Image features to the decoder's width: dense, an activation, dense."""

    def __init__(
        self, config, *, use_bias: bool = True, activation: str = "gelu", rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        self.activation = activation
        width, out = config.vision.embed_dim, config.text.embed_dim
        init = dict(use_bias=use_bias, rngs=rngs, param_dtype=param_dtype)
        self.up = Dense("bpe,ef->bpf", (width, out), ("vision_embed", "mlp"), **init)
        self.down = Dense("bpf,fd->bpd", (out, out), ("mlp", "embed"), **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        act = gelu if self.activation == "gelu" else ACTIVATIONS[self.activation]
        return self.down(act(self.up(x)))


class Llava(VisionLanguageModel):
    """The common submodules, and `unused`: tensors of the checkpoint that no computation uses."""

    config: LlavaConfig

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        super().__init__(config, rngs=rngs, param_dtype=param_dtype)
        self.unused = ClipUnused(config.vision, rngs=rngs, param_dtype=param_dtype)

    def make_projector(self, **init) -> Projector:
        config = self.config
        return Projector(config, use_bias=config.projector_bias, activation=config.projector_activation, **init)
