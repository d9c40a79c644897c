"""MiniGPT-v2 on the released Med-MAT data, for the rows of the paper's table 6; recipe and mesh of `llava15_7b.py`.

    medcg reproduce --config=configs/minigpt_v2_7b.py --config.data.root=MED_MAT --workdir=runs/minigpt_v2_7b

`model.checkpoint` names what `medcg convert` made of the released files (EVA, MiniGPT-v2's own, Llama-2-chat).
"""

import llava15_7b


def get_config():
    config = llava15_7b.get_config()
    config.name = config.model.name = "minigpt_v2_7b"
    config.model.checkpoint = "checkpoints/minigpt-v2-7b"
    with config.model.ignore_type():
        config.model.trainable = ("projector", "lora")
    config.data.system_prompt = ""
    with config.study.ignore_type():
        config.study.tables = ("detection_pairs",)
    # Warm-up and learning rate of the release's own fine-tuning; epochs and batch as for LLaVA-1.5.
    config.train.learning_rate = 1e-5
    config.train.weight_decay = 0.05
    return config
