"""What one machine with a GPU does with LLaVA-1.5-7B and random weights, in under 10 minutes.

    bash launch/bench_gpu.sh [OUT.json] [flags of python -m medcg_jax.bench]

A file for `medcg bench` too; names of `medcg_jax` that need packages beside jax are imported when they are needed.
"""

from medcg_jax.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig

RUN = RunConfig(
    name="bench_gpu",
    model=ModelConfig(name="llava15_7b", compute_dtype="bfloat16", trainable=("projector", "decoder")),
    # Text tokens of Med-MAT's questions with LLaVA's system prompt: rows of 704 tokens.
    data=DataConfig(max_text_tokens=128, max_target_tokens=8),
    train=TrainConfig(steps=100, batch_size=8),
    base=TrainConfig(steps=0, epochs=0),
    eval=EvalConfig(batch_size=8),
)
# In order of what a reader wants first; a stage that ends early leaves its time to the later ones. Each ends at its own
# limit (`bench.run.STAGES`) or when the time of all is over: those down to the trace may take 450 s together.
STAGES = ("machine", "train_bf16", "torch", "letters", "trace", "train_fp32", "lora", "attention", "numerics",
          "torch_fp32", "parity")  # fmt: skip
TIME_S = 570.0


def get_config():
    from medcg_jax.config_file import to_config_dict

    return to_config_dict(RUN)
