"""Llama-3.2-Vision."""

from medcg_jax.families.registry import Family

FAMILY = Family(
    name="mllama",
    package=__name__,
    config="MllamaConfig",
    module="Mllama",
    tiny=("llama32_vision_tiny", "llama32_vision_bench"),
    released={
        "llama32_vision_11b": "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "llama32_vision_90b": "meta-llama/Llama-3.2-90B-Vision-Instruct",
    },
    tokenizer="llama3",
    tokens={"image_token_id": "<|image|>"},
    weights="medcg_jax.families.weights.mllama",
    model_types=("mllama",),
    parity="medcg_jax.parity.mllama",
    options=("intermediate_from", "mask_text_only_rows_attention"),
    title="Llama-3.2-Vision",
    tables={"pairs": (8, "table8_llama32_vision")},
    recipes=("llama32_vision_11b",),
)
