"""Tiny models of every backbone on the same phantom cells, side by side on one page, in minutes on two cores.

    medcg reproduce --config=configs/backbones_quick.py --workdir=runs/backbones

Each model is made from nothing: a short base, then one fine-tune on all subsets but four, tested on what it was trained
on and on the four. MiniGPT-v2 and NExT-Chat are also trained on boxes beside questions, for one target. Sizes are about the same; what differs is the architecture, the prompt and the images. The recipe is
`phantom.py`'s, cut short, and was chosen for no model in particular.
"""

import phantom

from medcg_jax.config_file import from_config_dict, to_config_dict
from medcg_jax.run_config import replace

MODELS = ("llava15_tiny", "qwen2_vl_tiny", "llama32_vision_tiny", "minigpt_v2_tiny", "next_chat_tiny")


def get_config():
    run = from_config_dict(phantom.get_config("quick"))
    return to_config_dict(
        replace(
            run,
            name="backbones_quick",
            # What three boxes as text need; frames of other prompts are longer than Vicuna's too.
            data__max_text_tokens=100,
            data__max_target_tokens=70,
            base__steps=1500,
            train__epochs=2,
            study__tables=("multi_task", "detection_pairs"),
            study__targets_of={"detection_pairs": phantom.QUICK_TARGETS[:1]},
            study__arms=("baseline", "multi_task", "trained"),
            study__models=MODELS,
            study__jobs=2,
        )
    )
