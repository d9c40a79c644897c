from dataclasses import dataclass

from medcg_jax.families.clip import ClipVisionConfig
from medcg_jax.families.common import FamilyConfig, VisionLanguageModel, tiny
from medcg_jax.families.decoder import DecoderConfig
from medcg_jax.nn.layers import Dense


@dataclass(frozen=True)
class ToyConfig(FamilyConfig):
    family = "toy"

    # The types say how a checkpoint's configuration is read again.
    vision: ClipVisionConfig = ClipVisionConfig()
    text: DecoderConfig = DecoderConfig()


def toy_tiny(vocab_size: int, image_token_id: int, **fields) -> ToyConfig:
    return tiny(ToyConfig, vocab_size, image_token_id, **fields)


class Toy(VisionLanguageModel):
    def make_projector(self, **init) -> Dense:
        shape = (self.config.vision.embed_dim, self.config.text.embed_dim)
        return Dense("bpe,ed->bpd", shape, ("vision_mlp", "embed"), use_bias=True, **init)
