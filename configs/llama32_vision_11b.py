"""Llama-3.2-11B-Vision on the released Med-MAT data, for the rows of the paper's table 8; recipe and mesh of `llava15_7b.py`.

    medcg reproduce --config=configs/llama32_vision_11b.py --config.data.root=MED_MAT --workdir=runs/llama32_vision_11b

`model.checkpoint` names meta-llama/Llama-3.2-11B-Vision-Instruct, as a folder or by this name on the Hugging Face hub (gated), or
what `medcg convert` made of it.
"""

import llava15_7b


def get_config():
    config = llava15_7b.get_config()
    config.name = config.model.name = "llama32_vision_11b"
    config.model.checkpoint = "checkpoints/llama-3.2-11b-vision-instruct"
    config.data.system_prompt = ""
    return config
