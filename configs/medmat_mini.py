"""Real images on two cores: the State subsets (64 to 69) of a small Med-MAT tree, over six modalities.

    medcg reproduce --config=configs/medmat_mini.py --config.data.root=TREE --workdir=runs/medmat_mini

The tree is in the release's layout. A small model, pre-trained on phantoms alone, is far too weak for a medical claim:
what this grid shows is that the whole path works on real images, and how wide the intervals are at such sizes.
"""

from medcg_jax.config_file import to_config_dict
from medcg_jax.run_config import DataConfig, EvalConfig, ModelConfig, RunConfig, StudyConfig, TrainConfig


def get_config():
    run = RunConfig(
        name="medmat_mini",
        model=ModelConfig(name="llava15_tiny"),
        data=DataConfig(source="release", root="", max_text_tokens=80, system_prompt=""),
        base=TrainConfig(steps=2400, epochs=0, learning_rate=1.5e-3, b2=0.98, weight_decay=0.01, warmup_frac=0.06),
        train=TrainConfig(epochs=8, learning_rate=1e-3, b2=0.98, weight_decay=0.01, warmup_frac=0.06),
        eval=EvalConfig(batch_size=64),
        study=StudyConfig(
            tables=("pairs",),
            targets=("64", "65", "66", "67", "68", "69"),
            seeds=(1,),
            jobs=2,
        ),
    )
    return to_config_dict(run)
