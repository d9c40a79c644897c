"""Greedy generation with a KV cache and static shapes, and strict parsing of the generated answer."""

import re
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from medcg_jax.eval.features import image_input

LETTERS = string.ascii_uppercase


def prefill(model, batch: dict[str, jax.Array], num_new: int):
    """(float32[B, V] logits at `last_position`, the cache with the prompts in it and room for `num_new` tokens).

    batch: tokens, segment_ids int32[B, T] right-padded, images or features (`features.image_input`), last_position
    int32[B]. Prompts may differ in length: in the cache generated tokens follow the padding, while their positions
    follow the prompt.
    """
    rows, length = batch["tokens"].shape
    options = {"cache": model.init_cache(rows, length + num_new), "at": batch["last_position"][:, None]}
    hidden, cache = model.hidden(
        batch["tokens"], **image_input(model, batch), segment_ids=batch["segment_ids"], **options
    )
    return model.logits(hidden[:, 0]), cache


def with_room(cache, num: int):
    """A model's cache with `num` more empty slots in each row."""
    slots = {"k": 2, "v": 2, "segment_ids": 1}

    def wider(array, axis: int):
        return jnp.pad(array, [(0, num if i == axis else 0) for i in range(array.ndim)])

    return {key: wider(array, slots[key]) if key in slots else array for key, array in cache.items()}


def greedy(model, logits: jax.Array, cache, *, num_new: int, eos_id: int) -> tuple[jax.Array, dict]:
    """(int32[B, num_new] greedily decoded tokens, from `prefill`'s logits and cache; the cache, with all but the last).

    After its first eos_id a row has only eos_id; decoding stops when every row has one. The config's `force_next`
    (token -> token) forces the successor of a token.
    """
    forced = getattr(model.config, "force_next", {})
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jnp.full((logits.shape[0], num_new), eos_id, jnp.int32).at[:, 0].set(first)

    def going_on(carry):
        index, tokens, _ = carry
        return (index < num_new) & (tokens[:, index - 1] != eos_id).any()

    def next_token(carry):
        index, tokens, cache = carry
        last = jax.lax.dynamic_slice_in_dim(tokens, index - 1, 1, axis=1)
        hidden, cache = model.hidden(last, cache=cache)
        best = jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
        for token, follower in forced.items():
            best = jnp.where(last[:, 0] == token, follower, best)
        best = jnp.where(last[:, 0] == eos_id, eos_id, best)
        return index + 1, jax.lax.dynamic_update_slice_in_dim(tokens, best[:, None], index, axis=1), cache

    return jax.lax.while_loop(going_on, next_token, (jnp.int32(1), tokens, cache))[1:]


def parse_answer(text: str, options: Sequence[str]) -> str:
    """The letter that a generated text names, or "" if it names none; nothing is guessed.

    Accepted, with any spaces around: "B", "B.", "(B)", "B: text" with that option's text, and an option's exact text,
    if no other option has the same.
    """
    text = text.strip()
    letters = LETTERS[: len(options)]
    match = re.fullmatch(r"([A-Z])\.?|\(([A-Z])\)", text)
    if match:
        letter = match[1] or match[2]
        return letter if letter in letters else ""
    for letter, option in zip(letters, options, strict=True):
        if re.fullmatch(rf"{letter}:\s*{re.escape(option.strip())}", text):
            return letter
    same = [letter for letter, option in zip(letters, options, strict=True) if option.strip() == text]
    return same[0] if len(same) == 1 else ""
