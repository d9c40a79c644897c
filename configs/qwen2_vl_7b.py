"""Qwen2-VL-7B on the released Med-MAT data, for the rows of the paper's table 7; recipe and mesh of `llava15_7b.py`.

    medcg reproduce --config=configs/qwen2_vl_7b.py --config.data.root=MED_MAT --workdir=runs/qwen2_vl_7b

`model.checkpoint` names Qwen/Qwen2-VL-7B-Instruct, as a folder or by this name on the Hugging Face hub, or what `medcg convert`
made of it.
"""

import llava15_7b


def get_config():
    config = llava15_7b.get_config()
    config.name = config.model.name = "qwen2_vl_7b"
    config.model.checkpoint = "checkpoints/qwen2-vl-7b-instruct"
    # 256 to 1,280 tokens an image would take most of a row; 448 x 448 pixels give 256.
    config.model.max_pixels = 200_704
    config.data.system_prompt = "qwen2"
    return config
