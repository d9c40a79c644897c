"""Rows for training and evaluation: what is refused, by record, and what stands where."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_sets import CountedImage, choice
from row_formats import llava

from medcg_jax.config import DataConfig
from medcg_jax.data.encoding import concat_encoded, cut_rows, encode, encode_eval, longest_row, row_length
from medcg_jax.data.images import preprocess
from medcg_jax.data.records import DataError, Record, RecordSet, Turn, concat
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import registry

FORMAT = llava(4, 2)


def one(*turns: Turn, options=(), answer="", image="x") -> RecordSet:
    record = Record("04/train/7", "04", turns, options, answer, image)
    return RecordSet([record], np.zeros((1, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((), "no token is supervised"),
        ((Turn("what ?", ""),), "the answer of turn 1 is empty"),
        ((Turn("what ?", "mild"), Turn("is it ?", "  ")), "the answer of turn 2 is empty"),
        ((Turn("what is <image> ?", "A"),), "special or unknown tokens"),
        ((Turn("what is " * 20, "A"),), "data.max_text_tokens=40"),
        ((Turn("what ?", "A B C D A B"),), "7 supervised tokens; data.max_target_tokens=6"),
    ],
)
def test_a_record_that_cannot_be_learnt_from_is_named(word_tokenizer, plain_config, turns, reason):
    with pytest.raises(DataError, match=rf"^record 04/train/7: .*{reason}"):
        encode(one(*turns), word_tokenizer, plain_config, FORMAT)


def test_longest_record_fits_exactly(word_tokenizer, plain_config):
    words = 40 - len("<s> USER : \n ASSISTANT : A </s>".split(" "))
    row = encode(one(Turn(("what " * words).strip(), "A")), word_tokenizer, plain_config, FORMAT)
    assert row.arrays["length"].tolist() == [42] and row.arrays["tokens"][0, -1] == word_tokenizer.eos_id
    with pytest.raises(DataError, match="41 text tokens"):
        encode(one(Turn(("what " * (words + 1)).strip(), "A")), word_tokenizer, plain_config, FORMAT)


def test_image_tokens_do_not_count_as_text(word_tokenizer, plain_config):
    records = one(Turn("what ?", "A"))
    few = encode(records, word_tokenizer, plain_config, llava(4, 1))
    many = encode(records, word_tokenizer, plain_config, llava(4, 100))
    assert few.arrays["tokens"].shape == (1, 41) and many.arrays["tokens"].shape == (1, 140)
    assert (many.arrays["tokens"] == word_tokenizer.image_id).sum() == 100
    assert many.arrays["length"] - few.arrays["length"] == 99


def test_a_record_without_image_has_no_placeholder_and_black_pixels(word_tokenizer, plain_config):
    records = RecordSet(one(Turn("what ?", "A"), image="").records, np.full((1, 4, 4, 3), 9, np.uint8))
    row = encode(records, word_tokenizer, plain_config, FORMAT)
    assert word_tokenizer.image_id not in row.arrays["tokens"]
    assert not row.images["pixels"].any()


def test_pixels_are_preprocessed_once_whatever_their_size(word_tokenizer, plain_config):
    records = one(Turn("what ?", "A"))
    image = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    row = encode(RecordSet(records.records, [image]), word_tokenizer, plain_config, FORMAT)
    np.testing.assert_array_equal(row.images["pixels"][0], preprocess(image, 4))


def test_evaluation_rows(word_tokenizer, plain_config):
    turn = Turn("what ?\nA: benign\nB: normal\nC: mild", "C")
    records = one(turn, options=("benign", "normal", "mild"), answer="C")
    row = encode_eval(records, word_tokenizer, plain_config, FORMAT)
    letters = [word_tokenizer.encode(letter)[0] for letter in "ABC"]
    assert row.arrays["option_ids"].tolist() == [[*letters, -1]]
    last = int(row.arrays["last_position"][0])
    assert row.arrays["tokens"][0, last] == word_tokenizer.encode(":")[0]
    assert (row.arrays["tokens"][0, last + 1 :] == word_tokenizer.pad_id).all()
    trained = encode(records, word_tokenizer, plain_config, FORMAT)
    # The letter is predicted at the same position in both.
    assert trained.arrays["target_positions"][0, 0] == last and trained.arrays["targets"][0, 0] == letters[2]
    np.testing.assert_array_equal(trained.arrays["tokens"][0, : last + 1], row.arrays["tokens"][0, : last + 1])


@pytest.mark.parametrize("options", [(), ("benign",), tuple("ABCDEFGHIJK")])
def test_what_is_no_choice_cannot_be_scored(word_tokenizer, plain_config, options):
    records = one(Turn("what ?", "A"), options=options, answer="A")
    most = 10 if len(options) > 4 else 4
    with pytest.raises(DataError, match=rf"^record 04/train/7: {len(options)} options; 2 to {most} can be scored"):
        encode_eval(records, word_tokenizer, plain_config, FORMAT)


def test_questions_of_five_options_have_all_letters_scored(plain_config):
    tokenizer = load_tokenizer("")
    five = one(Turn("Which?", "E"), options=tuple("VWXYZ"), answer="E")
    three = one(Turn("Which?", "A"), options=tuple("VWX"))
    row = encode_eval(five, tokenizer, plain_config, FORMAT)
    letters = [tokenizer.encode(letter)[0] for letter in "ABCDE"]
    assert row.arrays["option_ids"].tolist() == [letters + [-1] * 5]
    # The usual shape stays where no question has more.
    assert encode_eval(three, tokenizer, plain_config, FORMAT).arrays["option_ids"].shape == (1, 4)
    mixed = encode_eval(concat([five, three]), tokenizer, plain_config, FORMAT)
    assert mixed.arrays["option_ids"].tolist() == [letters + [-1] * 5, letters[:3] + [-1] * 7]
    assert encode_eval(three, tokenizer, plain_config, FORMAT, columns=10).arrays["option_ids"].shape == (1, 10)


def test_rows_of_other_shapes_are_not_joined(word_tokenizer, plain_config):
    records = one(Turn("what ?", "A"))
    parts = [
        encode(records, word_tokenizer, DataConfig(system_prompt="", max_text_tokens=length), FORMAT)
        for length in (20, 21)
    ]
    with pytest.raises(ValueError, match="2 shapes"):
        concat_encoded(parts)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.integers(1, 45), min_size=1, max_size=8), multiple=st.integers(0, 70), image=st.booleans())
def test_rows_end_at_the_longest_record(word_tokenizer, plain_config, words, multiple, image):
    records = [one(Turn(("what " * count).strip(), "A"), image="x" * image).records[0] for count in words]
    records = RecordSet(records, np.zeros((len(words), 4, 4, 3), np.uint8))
    data = replace(plain_config, row_multiple=multiple)
    # A row has 8 tokens beside its words, 7 without an image, and of 42 places 2 are the image's.
    fits = [count for count in words if count <= (32 if image else 35)]
    longest = longest_row(records, word_tokenizer, data, FORMAT)
    assert longest == (max(fits) + (10 if image else 7) if fits else 0)
    length = row_length(longest, data, FORMAT)
    assert longest <= length <= 42 and (length == 42 or multiple and length % multiple == 0)
    if not multiple:
        assert length == 42
    elif fits:
        assert length - longest < multiple
    if len(fits) < len(words):
        return
    whole = encode(records, word_tokenizer, data, FORMAT)
    cut = cut_rows(whole, length)
    assert cut.arrays["tokens"].shape[1] == length and int(whole.arrays["length"].max()) == longest
    (batch, ids), (long, same) = (rows.rows(np.arange(len(words))) for rows in (cut, whole))
    assert ids == same
    for key, array in batch.items():
        behind = length if key in ("tokens", "segment_ids") else None
        np.testing.assert_array_equal(array, long[key][:, :behind])
    with pytest.raises(ValueError, match=f"length={longest - 1}: expected {longest} to 42"):
        cut_rows(whole, longest - 1)


def test_rows_of_images_of_any_size_are_made_without_decoding_one(plain_config):
    """Qwen2-VL's images take as many tokens as they are large: their sizes are read, and no pixel."""
    decoded: list[int] = []
    sizes = [(28, 28), (56, 84), (84, 28)]
    records = RecordSet([choice(i) for i in range(3)], [CountedImage(i, decoded, size) for i, size in enumerate(sizes)])
    tokenizer = load_tokenizer("", registry.family("qwen2_vl").tokenizer)
    vision = SimpleNamespace(patch_size_px=14, merge=2)
    fmt = registry.family("qwen2_vl").row_format(SimpleNamespace(vision=vision, min_pixels=28 * 28, max_pixels=84 * 84))
    rows = encode(records, tokenizer, plain_config, fmt, memory_limit_bytes=0)
    assert longest_row(records, tokenizer, plain_config, fmt) == rows.arrays["length"].max() and not decoded
    counts = (rows.arrays["tokens"] == tokenizer.image_id).sum(axis=1)
    assert counts.tolist() == [1, 6, 3]
    batch, _ = rows.rows(np.array([1]))
    assert decoded == [1] and batch["tokens"].shape[0] == 1
