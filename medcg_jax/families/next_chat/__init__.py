"""NExT-Chat."""

from medcg_jax.families.registry import Family

FAMILY = Family(
    name="next_chat",
    package=__name__,
    config="NextChatConfig",
    module="NextChat",
    # The second has a small SAM, for masks.
    tiny=("next_chat_tiny", "next_chat_tiny_sam", "next_chat_bench"),
    released={"next_chat_7b_336": ""},
    tokenizer="next_chat",
    tokens={"image_token_id": "<im_patch>", "at_token_id": "<at>", "box_token_id": "<boxes>"},
    weights="medcg_jax.families.weights.next_chat",
    model_types=("nextchat",),
    loss="medcg_jax.train.losses:box_loss",
    parts=("boxes", "mask_prompt", "mask_decoder", "sam_encoder"),
    options=("max_boxes",),
    title="NExT-Chat",
    tables={"detection_pairs": (5, "table5_nextchat_detection")},
    recipes=("next_chat_7b",),
)
