"""NExT-Chat-7B-336 on the released Med-MAT data, for the rows of the paper's table 5; recipe and mesh of `llava15_7b.py`.

    medcg reproduce --config=configs/next_chat_7b.py --config.data.root=MED_MAT --workdir=runs/next_chat_7b

`model.checkpoint` names a directory with the released weights, or what `medcg convert` made of it.
"""

import llava15_7b

ARGS = {
    "boxes": "the first two stages of the release's training",
    "masks": "its third stage: masks alone, from the parameters of the first two",
}


def get_config(arg: str = "boxes"):
    config = llava15_7b.get_config()
    config.name = "next_chat_7b"
    config.model.name = "next_chat_7b_336"
    config.model.checkpoint = "checkpoints/nextchat-7b-336"
    with config.model.ignore_type():
        # As in the first two stages of the release's training: all but the vision tower and SAM.
        config.model.trainable = ("projector", "decoder", "boxes")
    with config.study.ignore_type():
        config.study.tables = ("detection_pairs",)
    if arg == "masks":
        # With the release's rate and batch.
        config.name = "next_chat_7b_masks"
        with config.model.ignore_type():
            config.model.trainable = ("mask_prompt", "mask_decoder")
        config.train.learning_rate = 2e-5
        config.train.batch_size = 64
        config.train.epochs = 3
    return config
