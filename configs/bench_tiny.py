"""LLaVA-1.5's architecture at a size for two CPU cores: what `medcg bench` compares with the PyTorch reference.

    medcg bench --config=configs/bench_tiny.py --against=torch

Width 256, 6 layers, 64 image and 64 text tokens a row, float32; `--config.train.batch_size=32` for the larger
batch.
"""

from medcg_jax.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from medcg_jax.config_file import to_config_dict
from medcg_jax.families.prompts import VICUNA

# LLaVA-1.5's, and two sentences that make a phantom's question 64 tokens.
SYSTEM_PROMPT = (
    f"{VICUNA} The assistant gives polite and detailed answers to them. The assistant gives answers to the questions of "
    "the user."
)


def get_config():
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
    return to_config_dict(run)
