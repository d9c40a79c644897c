"""Analytic FLOPs of LLaVA-1.5, and MFU: a multiply-add counts 2, an embedding lookup 0.

XLA's own count is of no use here: it counts the body of a scan once, and a fused attention kernel not at all.
The formulas agree with PyTorch's FlopCounterMode on CLIP and Llama (tests/scale/test_flops.py).
"""

from dataclasses import dataclass, fields

from medcg_jax.models.llava import LlavaConfig

# Dense bf16 FLOP/s of one device, by what `jax.Device.device_kind` begins with; the longest match counts.
PEAK_BF16 = {
    "NVIDIA A100": 312e12,  # NVIDIA A100 datasheet, BF16 tensor core
    "NVIDIA H100 80GB HBM3": 989.5e12,  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity
    "NVIDIA H100 PCIe": 756.5e12,  # the same, PCIe: 1,513 with sparsity
    "NVIDIA H100 NVL": 835.5e12,  # the same, NVL: 1,671 with sparsity
    "NVIDIA H200": 989.5e12,  # NVIDIA H200 datasheet, SXM: 1,979 with sparsity
    "NVIDIA H200 NVL": 835.5e12,  # the same, NVL: 1,671 with sparsity
    "TPU v5 lite": 197e12,  # Google Cloud TPU documentation, v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of the parts of one forward pass; attention scores and sums stand apart from the other products."""

    vision: float = 0.0
    projector: float = 0.0
    decoder: float = 0.0
    attention: float = 0.0  # of the decoder, every query against every key
    head: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def forward(config: LlavaConfig, *, length: int, num_images: int = 1, num_logits: int | None = None) -> Flops:
    """FLOPs of a forward pass over one row of `length` tokens, image tokens included.

    num_images: images that the tower encodes for the row.
    num_logits: positions whose logits are computed; None: all.
    """
    vision, text = config.vision, config.text
    tokens = vision.num_patches
    patch_embedding = 2.0 * tokens * 3 * vision.patch_size_px**2 * vision.embed_dim
    tower = vit(vision.num_run_layers, vision.embed_dim, vision.mlp_dim, tokens + 1)
    projector = 2.0 * tokens * (vision.embed_dim * text.embed_dim + text.embed_dim**2)
    return Flops(
        vision=num_images * (patch_embedding + tower),
        projector=num_images * projector,
        decoder=length * text.num_layers * decoder_products(text),
        attention=4.0 * text.num_layers * length**2 * text.num_heads * text.head_dim,
        head=2.0 * (length if num_logits is None else num_logits) * text.embed_dim * text.vocab_size,
    )


def vit(num_layers: int, width: int, mlp_width: int, num_tokens: int) -> float:
    """FLOPs of encoder blocks over one image of `num_tokens` tokens: projections, MLP, attention."""
    return 4.0 * num_layers * num_tokens * width * (2 * width + mlp_width + num_tokens)


def decoder_products(text) -> float:
    """FLOPs of one token in one decoder block, without attention's scores and sums."""
    attention = 4.0 * text.embed_dim * text.head_dim * (text.num_heads + text.num_kv_heads)
    return attention + 6.0 * text.embed_dim * text.mlp_dim


def training(one: Flops, *, trainable: tuple[str, ...], causal: bool = False, remat: str = "none") -> float:
    """FLOPs of forward and backward, from those of the forward pass.

    A part that trains counts three times, a frozen one that gradients pass through twice, a frozen one below every
    trained part once.
    causal: the decoder's attention counts half, as a kernel that skips masked blocks executes it; else the full square.
    remat: as `ModelConfig.remat`, to count what is executed; "none" counts what the model needs.
      "full" runs every block with a backward pass once more; "dots" only its attention.
    """
    attention = one.attention / 2 if causal else one.attention
    order = (("vision", one.vision), ("projector", one.projector), ("decoder", one.decoder + attention + one.head))
    total, reached = 0.0, False  # reached: a part below trains, so gradients pass through
    for name, flops in order:
        trains = name in trainable
        total += flops * (3 if trains else 2 if reached else 1)
        reached = reached or trains
    if remat != "none" and reached:
        total += attention
    if remat == "full" and reached:
        total += one.decoder + (one.vision if "vision" in trainable else 0.0)
    return total


def step(config: LlavaConfig, lengths, *, padded_length: int, num_images: int, num_logits: int, trainable) -> dict:
    """FLOPs of one training step by each convention: {"full", "causal", "executed"}.

    full: what the model needs for the real tokens, attention as the full square (arXiv 2204.02311, appendix B).
    causal: the same with attention halved. executed: rows at their padded length, and what rematerialisation computes
      again; the utilisation that comes of it is HFU and no MFU.
    lengths: real tokens of each row. num_logits: positions of a row at which the head runs.
    """
    rest = dict(num_images=num_images, num_logits=num_logits)
    rows = [forward(config, length=int(length), **rest) for length in lengths]
    padded = forward(config, length=padded_length, **rest)
    return {
        "full": sum(training(row, trainable=trainable) for row in rows),
        "causal": sum(training(row, trainable=trainable, causal=True) for row in rows),
        "executed": len(rows) * training(padded, trainable=trainable, remat=config.remat),
    }


def peak_bf16(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its `device_kind`; None where the table has none (a CPU, say)."""
    known = [name for name in PEAK_BF16 if device_kind.startswith(name)]
    return PEAK_BF16[max(known, key=len)] if known else None


def utilisation(flops: dict, seconds: float, device_kind: str, num_devices: int) -> dict:
    """{"mfu", "mfu_causal", "hfu"} in 0-1 of the bf16 peak for `step`'s FLOPs in `seconds`; None without a peak."""
    peak = peak_bf16(device_kind)
    names = {"mfu": "full", "mfu_causal": "causal", "hfu": "executed"}
    return {name: peak and flops[key] / seconds / (peak * num_devices) for name, key in names.items()}
