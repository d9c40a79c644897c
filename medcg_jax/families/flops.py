"""Analytic FLOPs of every family: a multiply-add counts 2, an embedding lookup 0.

XLA's own count does not serve: it counts the body of a scan once, and a fused attention kernel not at all.
The formulas agree with PyTorch's FlopCounterMode on CLIP and Llama (tests/families/test_flops.py), and with the numbers
of parameters of every family's parts. Left out: norms, activations, NExT-Chat's heads for boxes (under 0.1 %) and SAM.
"""

import math
from dataclasses import dataclass, fields

from medcg_jax.config import EMBEDDING
from medcg_jax.families.common import FamilyConfig
from medcg_jax.nn.lora import LoraConfig, target_axes


@dataclass(frozen=True)
class Flops:
    """FLOPs of the parts of one forward pass; attention scores and sums are separate from the other products."""

    vision: float = 0.0
    projector: float = 0.0
    decoder: float = 0.0
    attention: float = 0.0  # of the decoder, every query against every key
    head: float = 0.0
    adapters: float = 0.0  # LoRA's, on the decoder

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def forward(config: FamilyConfig, *, length: int, num_images: int = 1, num_logits: int | None = None) -> Flops:
    """FLOPs of a forward pass over one row of `length` tokens, image tokens included.

    num_images: images that the tower encodes for the row, each of the most tokens that one can have.
    num_logits: positions whose logits are computed; None: all.
    """
    text, num_logits = config.text, length if num_logits is None else num_logits
    vision, projector = config.image_flops(vit)
    num_layers, width = text.num_layers, text.num_heads * text.head_dim
    decoder = length * num_layers * decoder_products(text)
    attention = 4.0 * num_layers * length**2 * width
    adapters, crossed = 0.0, _num_cross_layers(text)
    if crossed:
        # The keys and values of cross-attention are the image's tokens.
        seen = num_images * config.vision.num_tokens
        decoder += crossed * (seen - length) * 4.0 * text.embed_dim * text.head_dim * text.num_kv_heads
        attention += 4.0 * crossed * length * (seen - length) * width
    if config.lora is not None:
        adapters = length * num_layers * adapter_products(text, config.lora)
        if crossed:
            sides = sum(_sides(text, name) for name in config.lora.targets if name in "kv")
            adapters += crossed * (seen - length) * 2.0 * config.lora.rank * sides
    return Flops(
        vision=num_images * vision,
        projector=num_images * projector,
        decoder=decoder,
        attention=attention,
        head=2.0 * num_logits * text.embed_dim * text.vocab_size,
        adapters=adapters,
    )


def generation(config: FamilyConfig, *, seen: int) -> float:
    """FLOPs of one more token, logits included, of a row whose cache then holds `seen` tokens."""
    token, text = forward(config, length=1, num_images=0, num_logits=1), config.text
    crossed = _num_cross_layers(text)
    keys = (text.num_layers - crossed) * seen
    if crossed:
        # Keys and values of the image are in the cache.
        keys += crossed * config.vision.num_tokens
    return token.total - token.attention + 4.0 * keys * text.num_heads * text.head_dim


def _num_cross_layers(text) -> int:
    """Cross-attention layers of a decoder, which attend to images and not to text."""
    return len(getattr(text, "cross_layers", ()))


def vit(num_layers: int, width: int, mlp_width: int, num_tokens: int) -> float:
    """FLOPs of encoder blocks over one image of `num_tokens` tokens: projections, MLP, attention."""
    return 4.0 * num_layers * num_tokens * width * (2 * width + mlp_width + num_tokens)


def decoder_products(text) -> float:
    """FLOPs of one token in one decoder block, without attention's scores and sums."""
    attention = 4.0 * text.embed_dim * text.head_dim * (text.num_heads + text.num_kv_heads)
    return attention + 6.0 * text.embed_dim * text.mlp_dim


def adapter_products(text, lora: LoraConfig) -> float:
    """FLOPs of one token in the adapters of one decoder block."""
    return 2.0 * lora.rank * sum(_sides(text, name) for name in lora.targets)


def _sides(text, target: str) -> int:
    """Inputs plus outputs of a product of a decoder block, for one token."""
    return sum(math.prod(size for _, size in axes) for axes in target_axes(text, target))


def training(row: Flops, *, trainable: tuple[str, ...], causal: bool = False, remat: str = "none") -> float:
    """FLOPs of forward and backward, from those of a row's forward pass.

    A trained part counts three times, a frozen part that gradients pass through twice (its attention scores and sums
    three times, because both sides of each product have a gradient), a frozen part below every trained part once.
    causal: the decoder's attention counts half, as in a kernel that skips masked blocks; else the full square.
    remat: as `ModelConfig.remat`, to count what is executed: "full" runs every block with a backward pass once more,
      "dots" only its attention; "none" counts what the model needs.
    """
    attention = row.attention / 2 if causal else row.attention
    total, reached = 0.0, False  # reached: a part below trains, so gradients pass through this one
    for name, flops in (("vision", row.vision), ("projector", row.projector)):
        trains = name in trainable
        total += flops * (3 if trains else 2 if reached else 1)
        reached = reached or trains
    reached = reached or "lora" in trainable or EMBEDDING in trainable
    for name, flops in (("decoder", row.decoder + attention + row.head), ("lora", row.adapters)):
        total += flops * (3 if name in trainable else 2 if reached else 1)
    if reached and "decoder" not in trainable:
        total += attention
    reached = reached or "decoder" in trainable
    if remat != "none" and reached:
        total += attention
    if remat == "full" and reached:
        total += row.decoder + (row.vision if "vision" in trainable else 0.0)
    return total


# ------------------------------------------------------------------ a step, and a batch of tests


def step(config: FamilyConfig, lengths, *, padded_length: int, num_images: int, num_logits: int, trainable) -> dict:
    """FLOPs of one training step by each convention: {"full", "causal", "executed"}.

    full: what the model needs for the real tokens, attention as the full square (arXiv 2204.02311, appendix B).
    causal: the same with attention halved. executed: rows at their padded length, rematerialisation included; a
      utilisation made of it is HFU, not MFU.
    lengths: real tokens of each row. num_logits: positions of a row at which the head runs.
    """
    counts = {"num_images": num_images, "num_logits": num_logits}
    rows = [forward(config, length=int(length), **counts) for length in lengths]
    padded = forward(config, length=padded_length, **counts)
    return {
        "full": sum(training(row, trainable=trainable) for row in rows),
        "causal": sum(training(row, trainable=trainable, causal=True) for row in rows),
        "executed": len(rows) * training(padded, trainable=trainable, remat=config.remat),
    }


def evaluation(config: FamilyConfig, *, num_rows: int, length: int, num_new: int) -> float:
    """FLOPs of one batch of tests: prompts of `length` tokens, then `num_new` tokens of every row, one at a time."""
    prompt = forward(config, length=length, num_logits=1).total
    return num_rows * (prompt + sum(generation(config, seen=length + i) for i in range(1, num_new)))
