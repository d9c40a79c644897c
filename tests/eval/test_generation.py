"""Greedy generation against the same without a cache, and the strict reading of answers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_toys import EOS, TOKENIZER, encoded, model_on
from flax import nnx

from medcg_jax.eval.generation import greedy, parse_answer, prefill
from medcg_jax.nn import blocks
from medcg_jax.nn.attention import attention

NEW = 4


@pytest.fixture(scope="module")
def model():
    _, graphdef, params = model_on()
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module")
def rows():
    batch, _ = encoded().rows(np.arange(6))
    return batch


def with_cache(model, rows, eos_id: int) -> np.ndarray:
    @nnx.jit
    def run(model, rows):
        logits, cache = prefill(model, rows, NEW - 1)
        return greedy(model, logits, cache, num_new=NEW, eos_id=eos_id)[0]

    return np.asarray(run(model, rows))


def one_by_one(model, rows, eos_id: int) -> np.ndarray:
    """Each row alone: every token from a forward pass over all that came before."""
    forward = nnx.jit(lambda m, tokens, pixels, ids: m(tokens, {"pixels": pixels}, segment_ids=ids))
    out = np.full((len(rows["tokens"]), NEW), eos_id, np.int32)
    for row in range(len(out)):
        length = int(rows["last_position"][row]) + 1
        tokens = np.zeros((1, rows["tokens"].shape[1] + NEW), np.int32)
        tokens[0, :length] = rows["tokens"][row, :length]
        for new in range(NEW):
            ids = (np.arange(tokens.shape[1]) < length)[None].astype(np.int32)
            logits = forward(model, tokens, rows["pixels"][row : row + 1], ids)
            out[row, new] = tokens[0, length] = int(np.asarray(logits)[0, length - 1].argmax())
            length += 1
            if out[row, new] == eos_id:
                break
    return out


def test_equals_generation_without_a_cache(model, rows):
    assert len(set(rows["last_position"].tolist())) > 1
    expected = one_by_one(model, rows, EOS)
    assert (with_cache(model, rows, EOS) == expected).all()
    assert len({tuple(tokens) for tokens in expected.tolist()}) > 1


def test_padding_taken_for_text_is_caught(model, rows):
    wrong = {**rows, "segment_ids": np.ones_like(rows["segment_ids"])}
    assert not (with_cache(model, wrong, EOS) == one_by_one(model, rows, EOS)).all()


def test_stops_at_the_end_token(model, rows):
    """With an end token that some rows give at once and others later, the rest of each row is that token."""
    free = one_by_one(model, rows, -1)
    end = int(free[0, 1])
    expected = one_by_one(model, rows, end)
    assert (with_cache(model, rows, end) == expected).all()
    assert (expected[0, 1:] == end).all() and not (expected == free).all()


OPTIONS = ("benign", "malignant tumour", "B")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), (" B ", "B"), ("C.", "C"), ("(A)", "A"), ("A: benign", "A"), ("A:benign", "A"), ("benign", "A"),
        ("malignant tumour", "B"), ("B: malignant tumour", "B"),
        ("B", "B"),  # a letter is a letter, also where an option's text is one
        # Nothing of this is an answer.
        ("", ""), ("D", ""), ("a", ""), ("AB", ""), ("A B", ""), ("A..", ""), ("(A", ""), ("A)", ""), ("(D)", ""),
        ("A: malignant tumour", ""), ("A: benign.", ""), ("Benign", ""), ("benign tumour", ""), ("The answer is A", ""),
        ("A, because", ""),
    ],
)  # fmt: skip
def test_answers_are_read_strictly(text, letter):
    assert parse_answer(text, OPTIONS) == letter


def test_two_options_of_one_text_are_no_answer():
    assert parse_answer("same", ("same", "same")) == "" and parse_answer("B: same", ("same", "same")) == "B"


def test_the_tokenizers_letters_are_read():
    for letter in "ABCD":
        ids = TOKENIZER.encode(f"ASSISTANT: {letter}")[-1:]
        assert parse_answer(TOKENIZER.decode([*ids, EOS, EOS]), ("a", "b", "c", "d")) == letter


class Five:
    """Always says 5; its config may say what must follow it."""

    def __init__(self, **force_next):
        self.config = SimpleNamespace(**force_next)

    def hidden(self, tokens, *, cache):
        return jnp.zeros((*tokens.shape, 1)), cache

    def logits(self, hidden):
        return jnp.broadcast_to(jax.nn.one_hot(5, 9), (*hidden.shape[:-1], 9))


def test_what_must_follow_follows():
    start = jnp.broadcast_to(jax.nn.one_hot(5, 9), (2, 9))
    assert greedy(Five(), start, None, num_new=4, eos_id=2)[0].tolist() == [[5] * 4] * 2
    assert greedy(Five(force_next={5: 7}), start, None, num_new=4, eos_id=2)[0].tolist() == [[5, 7, 5, 7]] * 2
    assert greedy(Five(force_next={5: 2}), start, None, num_new=4, eos_id=2)[0].tolist() == [[5, 2, 2, 2]] * 2


def test_a_prompt_sees_its_own_keys_and_what_follows_the_cache(model, rows, monkeypatch):
    """So that fused attention, which reads no cache, is used where a prompt begins."""
    asked = []

    def spy(*args, **named):
        asked.append((args[0].shape[1], named["implementation"], "kv_segment_ids" in named))
        return attention(*args, **named)

    monkeypatch.setattr(blocks, "attention", spy)
    with_cache(model, rows, -1)
    length = rows["tokens"].shape[1]
    # Of the tower's the lengths are others.
    assert {one for one in asked if one[0] in (1, length)} == {(length, "auto", False), (1, "plain", True)}
