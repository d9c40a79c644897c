"""LLaVA-1.5-7B on the released Med-MAT data: the paper's base model, recipe and pairs.

    medcg reproduce --config=configs/llava15_7b.py --config.data.root=MED_MAT --workdir=runs/llava15_7b
    medcg reproduce --config=configs/llava15_7b.py:qlora --config.data.root=MED_MAT --workdir=runs/llava15_7b_qlora

`model.checkpoint` names the weights: llava-hf/llava-1.5-7b-hf as a folder or by this name, or what `medcg convert`
made of it. The mesh is for one pod slice or 8 GPUs with 80 GB; every device count that `fsdp` divides will do.
"""

from medcg_jax.config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
    replace,
)
from medcg_jax.config_file import to_config_dict

ARGS = {
    "7b": "projector and decoder of the 7B",
    "13b": "projector and decoder of the 13B",
    "lora": "adapters on the 7B in bfloat16, for four chips of 16 GB",
    "qlora": "adapters on the 7B in 4 bits, for one GPU of 24 GB or such chips",
}
# LLaVA-1.5's own LoRA recipe (scripts/v1_5/finetune_lora.sh at c121f04): rank 128, alpha 256, all products of the
# decoder, and the projector with them. Its rate is 2e-4, and 2e-5 for the projector; here one rate is for both.
LORA = dict(trainable=("projector", "lora"), lora_rank=128, lora_alpha=256.0)
BASE_DTYPES = {"lora": "bfloat16", "qlora": "nf4"}


def get_config(arg: str = "7b"):
    size, adapters = (arg, {}) if arg not in BASE_DTYPES else ("7b", LORA | {"base_dtype": BASE_DTYPES[arg]})
    run = RunConfig(
        name=f"llava15_{size}_{arg}" if adapters else f"llava15_{size}",
        mesh=MeshConfig(data=1, fsdp=-1) if adapters else MeshConfig(data=-1, fsdp=8),
        model=ModelConfig(
            name=f"llava15_{size}",
            checkpoint=f"checkpoints/llava-1.5-{size}-hf",
            compute_dtype="bfloat16",
            remat="full",
            **adapters,
        ),
        data=DataConfig(source="release", root="Med-MAT", max_text_tokens=192, row_multiple=16),
        # The digest of the published version gives epochs, batch and learning rate; the warm-up is LLaVA-1.5's.
        train=TrainConfig(epochs=5, batch_size=32, learning_rate=5e-6, warmup_frac=0.03, checkpoint_every_steps=200),
        base=TrainConfig(steps=0, epochs=0),
        eval=EvalConfig(batch_size=64),
        study=StudyConfig(tables=("pairs",)),
    )
    if adapters:
        # Half of the activations at a time; neither changes a result.
        run = replace(run, train__learning_rate=2e-4, train__accumulation_steps=2, eval__batch_size=8)
    return to_config_dict(run)
