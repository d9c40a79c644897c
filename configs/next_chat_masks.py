"""A tiny NExT-Chat that learns where the lesions of phantoms are, first as boxes and then as masks, on two cores.

    medcg train --config=configs/next_chat_masks.py:boxes --workdir=runs/next_chat/boxes
    medcg eval --config=configs/next_chat_masks.py:boxes --workdir=runs/next_chat/boxes
    medcg train --config=configs/next_chat_masks.py:masks --workdir=runs/next_chat/masks
    medcg eval --config=configs/next_chat_masks.py:masks --workdir=runs/next_chat/masks

The stages of the release: the language model learns boxes, then it is frozen and SAM's mask decoder learns masks from
the hidden states where boxes are. A released SAM's encoder is frozen too (`next_chat_7b.py:masks`); this small one
starts from nothing, so it is trained. `masks` takes the parameters that `boxes` left in runs/next_chat/boxes;
--config.model.checkpoint=DIR/params names others.
"""

import backbones_quick
import phantom

from medcg_jax.config import replace
from medcg_jax.config_file import from_config_dict, to_config_dict
from medcg_jax.data.phantom.source import DETECTION_TRIPLETS

ARGS = {
    "boxes": "the language model learns boxes",
    "masks": "the mask decoder learns masks, from what `boxes` left in runs/next_chat/boxes",
}
HELD_OUT = ("ct-liver-det", "oct-skin-det")
TRAINED = tuple(t.name for t in DETECTION_TRIPLETS if t.name not in HELD_OUT)


def get_config(arg: str = "boxes"):
    run = replace(
        backbones_quick.with_whole_decoder(from_config_dict(phantom.get_config("quick"))),
        name=f"next_chat_{arg}",
        model__name="next_chat_tiny_sam",
        model__trainable=("vision", "projector", "decoder", "boxes"),
        data__subsets=TRAINED,
        data__max_text_tokens=40,
        data__max_target_tokens=20,
        data__train_records_per_subset=300,
        data__test_records_per_subset=60,
        eval__max_box_tokens=20,
        base__steps=0,
        train__epochs=20,
        train__learning_rate=2e-3,
    )
    if arg == "masks":
        run = replace(
            run,
            model__checkpoint="runs/next_chat/boxes/params",
            model__trainable=("mask_prompt", "mask_decoder", "sam_encoder"),
            train__epochs=4,
        )
    return to_config_dict(run)
