import numpy as np

from medcg_jax.data.images import resize
from medcg_jax.data.row_format import Format
from medcg_jax.families.prompts import BOS, IMAGE, Prompts, Text


class Questions(Prompts):
    """<s><image>USER: {question} ASSISTANT: {answer}</s>"""

    def pieces(self, turn, *, first, system_prompt, has_image, training):
        opening = [BOS] * first + [IMAGE] * has_image
        return [*opening, Text(f"USER: {turn.question} ASSISTANT:", start=False)]


def row_format(config) -> Format:
    def preprocess(image: np.ndarray) -> dict[str, np.ndarray]:
        return {"pixels": resize(image, config.image_size_px)}

    return Format(Questions(), preprocess, config.num_image_tokens)
