"""LLaVA-1.5."""

from medcg_jax.families.registry import Family

FAMILY = Family(
    name="llava",
    package=__name__,
    config="LlavaConfig",
    module="Llava",
    # The second is for comparisons of speed.
    tiny=("llava15_tiny", "llava15_bench"),
    released={"llava15_7b": "llava-hf/llava-1.5-7b-hf", "llava15_13b": "llava-hf/llava-1.5-13b-hf"},
    tokenizer="tokenizer",
    weights="medcg_jax.families.weights.llava",
    model_types=("llava", "llava_llama"),
    parity="medcg_jax.parity.llava",
    title="LLaVA-1.5-7B",
    tables={"pairs": (3, "table3_classification_pairs"), "triples": (4, "table4_three_datasets")},
    recipes=("llava15_7b", "llava15_13b"),
)
