"""The toy family of docs/families.md: LLaVA with one dense layer as projector, and prompts of its own."""

from medcg_jax.families.registry import Family

FAMILY = Family(
    name="toy",
    package=__name__,
    config="ToyConfig",
    module="Toy",
    tiny=("toy_tiny",),
    tokenizer="tokenizer",
    title="Toy",
)
