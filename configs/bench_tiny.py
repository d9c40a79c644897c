"""The families' architectures at a size for two CPU cores: what `medcg bench` compares with PyTorch.

    medcg bench --config=configs/bench_tiny.py --against=torch              LLaVA-1.5
    medcg bench --config=configs/bench_tiny.py:qwen2_vl --against=torch     mllama, minigpt_v2, next_chat

Decoders of width 256 and 6 layers (Llama-3.2-Vision's has 8), float32; rows as long as the longest question of the
phantoms in the family's prompt, image tokens beside: for LLaVA 64 and 64. `--config.train.batch_size=32` for the larger
batch.
"""

from medcg_jax.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, replace
from medcg_jax.config_file import to_config_dict
from medcg_jax.families.prompts import VICUNA

# LLaVA-1.5's, and two sentences that make a phantom's question 64 tokens.
SYSTEM_PROMPT = (
    f"{VICUNA} The assistant gives polite and detailed answers to them. The assistant gives answers to the questions of "
    "the user."
)
ARGS = {
    "llava": "LLaVA-1.5",
    "qwen2_vl": "Qwen2-VL",
    "mllama": "Llama-3.2-Vision",
    "minigpt_v2": "MiniGPT-v2; adapters are trained, as in the release, and there is no system prompt",
    "next_chat": "NExT-Chat; trained on boxes, as in the release's first two stages",
}
# Family -> what differs from LLaVA's run.
FLAGS: dict[str, dict] = {
    "llava": {},
    "qwen2_vl": {"model__name": "qwen2_vl_bench", "data__max_text_tokens": 71},
    "mllama": {"model__name": "llama32_vision_bench", "data__max_text_tokens": 73},
    "minigpt_v2": {
        "model__name": "minigpt_v2_bench",
        "model__trainable": ("projector", "lora"),
        "data__max_text_tokens": 16,
        "data__system_prompt": "",
    },
    "next_chat": {
        "model__name": "next_chat_bench",
        "model__trainable": ("projector", "decoder", "boxes"),
        "data__max_text_tokens": 80,
        "data__subsets": ("ct-brain-det",),
    },
}


def get_config(arg: str = "llava"):
    run = RunConfig(
        name="bench_tiny",
        model=ModelConfig(name="llava15_bench"),
        data=DataConfig(
            system_prompt=SYSTEM_PROMPT,
            max_text_tokens=64,
            max_target_tokens=8,
            train_records_per_subset=256,
            test_records_per_subset=64,
        ),
        train=TrainConfig(steps=100, batch_size=8, learning_rate=1e-4),
        base=TrainConfig(steps=0, epochs=0),
        eval=EvalConfig(batch_size=8),
    )
    return to_config_dict(replace(run, **FLAGS[arg]))
