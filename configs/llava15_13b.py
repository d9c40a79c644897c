"""LLaVA-1.5-13B with the recipe of `llava15_7b.py`; its full state needs 16 GPUs of 80 GB or a v5p-32 slice."""

import importlib.util
from pathlib import Path


def get_config():
    spec = importlib.util.spec_from_file_location("llava15_7b", Path(__file__).with_name("llava15_7b.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("13b")
    config.mesh.fsdp = 16
    return config
