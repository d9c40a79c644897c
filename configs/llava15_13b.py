"""LLaVA-1.5-13B with the recipe of `llava15_7b.py`; its full state needs 16 GPUs of 80 GB or a v5p-32 slice."""

import llava15_7b


def get_config():
    config = llava15_7b.get_config("13b")
    config.mesh.fsdp = 16
    return config
