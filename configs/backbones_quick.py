"""Tiny models of every backbone on the same cells, side by side on one page, in minutes on two cores.

    medcg reproduce --config=configs/backbones_quick.py --workdir=runs/backbones               phantoms
    medcg reproduce --config=configs/backbones_quick.py:mini --config.data.root=TREE --workdir=runs/backbones_mini

Each model is made from nothing: a short base, then one fine-tune on all subsets but those held out, tested on what it
was trained on and on these. MiniGPT-v2 and NExT-Chat are also trained on boxes, beside questions for one target and by
themselves, and asked for boxes. Sizes are about the same; what differs is the architecture, the prompt and the images.
The recipe is `phantom.py`'s with shorter fine-tunes; where a base stops before it matches words to option letters, no
fine-tune answers with them.

`mini` takes real images, the small Med-MAT tree that `medmat_mini.py` takes, and the same bases where they lie beside
the workdir: it shows that every model trains on real images and boxes, and nothing about medicine.
"""

import phantom

from medcg_jax.config import RunConfig, replace
from medcg_jax.config_file import from_config_dict, to_config_dict

ARGS = {"phantom": "phantoms", "mini": "a small Med-MAT tree, at data.root"}
STATE_SUBSETS = ("64", "65", "66", "67", "68", "69")
# In an order in which two processes end together.
MODELS = ("minigpt_v2_tiny", "qwen2_vl_tiny", "llama32_vision_tiny", "next_chat_tiny", "llava15_tiny")
# What a model's rows need beyond LLaVA's: three boxes as text are as long as three rows.
MODEL_FLAGS = {
    "minigpt_v2_tiny": ("data.max_box_text_tokens=98", "data.max_box_target_tokens=78", "eval.max_box_tokens=78")
}


def with_whole_decoder(run: RunConfig) -> RunConfig:
    """`phantom.py`'s run with fine-tunes of projector and decoder in place of the words that phantoms alone have."""
    parts = ("projector", "decoder", *(part for part in run.model.trainable if part != "embedding"))
    return replace(
        run, model__trainable=parts, model__trainable_words=(), train__epochs=8, train__batch_size=32,
        train__learning_rate=1e-3, train__weight_decay=0.01, study__parts=(), study__targets=phantom.QUICK_TARGETS,
    )  # fmt: skip


def get_config(arg: str = "phantom"):
    run = with_whole_decoder(from_config_dict(phantom.get_config("quick")))
    run = replace(
        run,
        name="backbones_quick",
        # What the longest question needs in any of the prompts.
        data__max_text_tokens=30,
        data__max_target_tokens=8,
        data__test_records_per_subset=100,
        eval__max_box_tokens=12,
        train__epochs=2,
        # Each model trains those of these that it has; the tower too, without which boxes are hardly learnt so soon.
        model__trainable=("vision", "projector", "decoder", "boxes"),
        train__learning_rate=2e-3,
        study__tables=("multi_task", "detection_pairs", "detection"),
        study__targets_of={"detection_pairs": phantom.QUICK_TARGETS[:1]},
        study__epochs_of={"detection": 4.0},
        study__arms=("baseline", "multi_task", "trained"),
        study__models=MODELS,
        study__model_flags={
            **MODEL_FLAGS,
            # Regression comes slowly, and costs a third of such a row.
            "next_chat_tiny": ("study.epochs_of={'detection': 10.0}",),
        },
        study__jobs=2,
    )
    if arg == "mini":
        run = replace(
            run,
            name="backbones_mini",
            data__source="release",
            data__max_text_tokens=58,
            data__max_target_tokens=12,
            data__train_records_per_subset=3000,
            data__test_records_per_subset=0,
            study__targets=STATE_SUBSETS[:2],
            study__targets_of={},
            # Of the tree's detection subsets one has up to 30 boxes an image, which as text is ten times a row.
            study__box_subsets=("38", "43", "47"),
            study__epochs_of={"detection": 30.0},
            study__model_flags={k: v for k, v in run.study.model_flags.items() if k != "next_chat_tiny"},
            study__tables=("multi_task", "detection"),
        )
    return to_config_dict(run)
