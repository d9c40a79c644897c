"""MiniGPT-v2."""

from medcg_jax.families.registry import Family

FAMILY = Family(
    name="minigpt_v2",
    package=__name__,
    config="MiniGPTv2Config",
    module="MiniGPTv2",
    tiny=("minigpt_v2_tiny", "minigpt_v2_bench"),
    released={"minigpt_v2_7b": ""},
    tokenizer="minigpt_v2",
    weights="medcg_jax.families.weights.minigpt_v2",
    # "llama": the part of the release with the language model.
    model_types=("minigpt_v2", "llama"),
    # Other families have adapters where `model.lora_rank` is above 0.
    parts=("lora",),
    title="MiniGPT-v2",
    tables={"detection_pairs": (6, "table6_minigptv2_detection")},
    recipes=("minigpt_v2_7b",),
)
