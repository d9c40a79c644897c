from dataclasses import dataclass

from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, tiny
from medcg_jax.nn.layers import Dense


@dataclass(frozen=True)
class ToyConfig(FamilyConfig):
    """CLIP's tower and Llama's decoder, as `FamilyConfig` has them."""

    family = "toy"


def toy_tiny(vocab_size: int, image_token_id: int, **fields) -> ToyConfig:
    return tiny(ToyConfig, vocab_size, image_token_id, **fields)


class Toy(VisionLanguageModel):
    def make_projector(self, **init) -> Dense:
        shape = (self.config.vision.embed_dim, self.config.text.embed_dim)
        return Dense("bpe,ed->bpd", shape, ("vision_mlp", "embed"), use_bias=True, **init)
