"""LLaVA-1.5-7B on the released Med-MAT data: the paper's base model, recipe and pairs.

    medcg reproduce --config=configs/llava15_7b.py --config.data.root=MED_MAT --workdir=runs/llava15_7b

`model.checkpoint` names a directory with the weights: llava-hf/llava-1.5-7b-hf as released, or what `medcg convert`
made of it. The mesh is for one pod slice or 8 GPUs with 80 GB; every device count that `fsdp` divides will do.
"""

from medcg_jax.config_file import to_config_dict
from medcg_jax.run_config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
)


def get_config(arg: str = "7b"):
    run = RunConfig(
        name=f"llava15_{arg}",
        mesh=MeshConfig(data=-1, fsdp=8),
        model=ModelConfig(
            name=f"llava15_{arg}",
            checkpoint=f"checkpoints/llava-1.5-{arg}-hf",
            tokenizer=f"checkpoints/llava-1.5-{arg}-hf",
            compute_dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(source="release", root="Med-MAT", max_text_tokens=192, row_multiple=16),
        # The digest of the published version gives epochs, batch and learning rate; the warm-up is LLaVA-1.5's.
        train=TrainConfig(epochs=5, batch_size=32, learning_rate=5e-6, warmup_frac=0.03, checkpoint_every_steps=200),
        base=TrainConfig(steps=0, epochs=0),
        eval=EvalConfig(batch_size=64),
        study=StudyConfig(tables=("pairs",)),
    )
    return to_config_dict(run)
