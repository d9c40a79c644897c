"""Qwen2-VL."""

from medcg_jax.families.registry import Family

FAMILY = Family(
    name="qwen2_vl",
    package=__name__,
    config="Qwen2VLConfig",
    module="Qwen2VL",
    tiny=("qwen2_vl_tiny", "qwen2_vl_bench"),
    released={
        "qwen2_vl_2b": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2_vl_7b": "Qwen/Qwen2-VL-7B-Instruct",
        "qwen2_vl_72b": "Qwen/Qwen2-VL-72B-Instruct",
    },
    tokenizer="chatml",
    tokens={
        "image_token_id": "<|image_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    weights="medcg_jax.families.weights.qwen2_vl",
    model_types=("qwen2_vl",),
    parity="medcg_jax.parity.qwen2_vl",
    options=("min_pixels", "max_pixels"),
    title="Qwen2-VL",
    tables={"pairs": (7, "table7_qwen2_vl")},
    recipes=("qwen2_vl_7b",),
)
