"""MiniGPT-v2: EVA's patch features, four neighbours to a token, through one dense layer into Llama-2-chat with LoRA.

Source: Vision-CAIR/MiniGPT-4:minigpt4/models/minigpt_v2.py and minigpt_base.py at d94738a; arXiv 2310.09478.
"""

from dataclasses import dataclass

import jax

from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, bench, tiny
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.families.minigpt_v2.eva import EvaConfig, EvaVision
from medcg_jax.nn.layers import Dense
from medcg_jax.nn.lora import LoraConfig


@dataclass(frozen=True)
class MiniGPTv2Config(FamilyConfig):
    """The defaults are MiniGPT-v2 on Llama-2-7b-chat."""

    family = "minigpt_v2"

    vision: EvaConfig = EvaConfig()
    text: DecoderConfig = DecoderConfig()
    lora: LoraConfig = LoraConfig()
    # Neighbouring patches of an image row (strips of 1 x 4) that make one token.
    patches_per_token: int = 4

    def __post_init__(self):
        if self.vision.num_patches % self.patches_per_token:
            raise ValueError(
                f"{self.vision.num_patches} patches are no multiple of patches_per_token={self.patches_per_token}"
            )

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_patches // self.patches_per_token

    def image_flops(self, vit):
        vision, tokens = self.vision, self.vision.num_patches
        tower = 2.0 * tokens * 3 * vision.patch_size_px**2 * vision.embed_dim
        tower += vit(vision.num_layers, vision.embed_dim, vision.mlp_dim, tokens + 1)
        return tower, 2.0 * tokens * vision.embed_dim * self.text.embed_dim


def minigpt_v2_7b(**fields) -> MiniGPTv2Config:
    """MiniGPT-v2: 7,782,021,504 parameters, of which 56,627,200 are trained (`projector`, `lora`).

    Layouts that store the keys' bias, always zero, count 54,912 more. fields: of MiniGPTv2Config.
    """
    return MiniGPTv2Config(**fields)


def minigpt_v2_tiny(
    vocab_size: int,
    image_token_id: int,
    *,
    patch_size_px: int = 4,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    **fields,
) -> MiniGPTv2Config:
    """As `common.tiny`."""
    fields = {"lora": LoraConfig(lora_rank, lora_alpha), "patch_size_px": patch_size_px, **fields}
    return tiny(MiniGPTv2Config, vocab_size, image_token_id, **fields)


def minigpt_v2_bench(vocab_size: int, image_token_id: int, **fields) -> MiniGPTv2Config:
    """As `common.bench`: 256 patches, which are 64 tokens; adapters of rank 16."""
    fields = {"lora": LoraConfig(16), **fields}
    vision = {"image_size_px": 128, "num_layers": 4}
    return bench(MiniGPTv2Config, vocab_size, image_token_id, vision=vision, text={}, **fields)


class MiniGPTv2(VisionLanguageModel):
    """`vision` includes the norm behind the tower; `lora` is always present."""

    config: MiniGPTv2Config

    def make_vision(self, **options) -> EvaVision:
        return EvaVision(self.config.vision, **options)

    def make_projector(self, **init) -> Dense:
        grouped = self.config.patches_per_token * self.config.vision.embed_dim
        shape = (grouped, self.config.text.embed_dim)
        return Dense("bpe,ed->bpd", shape, ("vision_mlp", "embed"), use_bias=True, **init)

    def project(self, features: jax.Array) -> jax.Array:
        return self.projector(group(features, self.config.patches_per_token))


def group(x: jax.Array, num: int) -> jax.Array:
    """float[B, P / num, num * E] of x[B, P, E]: every `num` patches in raster order, concatenated."""
    rows, patches, width = x.shape
    return x.reshape(rows, patches // num, num * width)
