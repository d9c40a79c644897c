"""The tiny model's tokenizer: the file is what the builder makes, phantom rows are short, other text has no unknowns."""

import pytest

from benchmarks import build_tokenizers
from medcg_jax.data.phantom import world
from medcg_jax.data.phantom.pretraining import MAX_TARGET_TOKENS, MAX_TEXT_TOKENS, pretraining_records
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.phantom.world import AREAS, MODALITIES, TASKS
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families.llava.rows import PROMPTS as prompts


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.mark.parametrize("kind", build_tokenizers.KINDS)
def test_the_file_is_what_the_builder_makes(tmp_path, kind):
    build_tokenizers.write(tmp_path / "made.json", kind)
    assert (tmp_path / "made.json").read_bytes() == SMALL.with_stem(kind).read_bytes()


def test_every_kind_has_its_special_tokens_and_one_token_letters():
    for kind, (special, frame) in build_tokenizers.KINDS.items():
        small = load_tokenizer(SMALL.with_stem(kind))
        assert [small.special(name) for name in special] == list(range(len(special)))
        assert small.pad_id == 0
        assert [len(small.encode(piece)) for piece in frame] == [1] * len(frame)
        assert len({small.encode(letter)[0] for letter in "ABCD"}) == 4


def test_special_tokens_and_size(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id) == (0, 1, 2, 3)
    assert 500 <= tokenizer.vocab_size <= 1000


def test_words_of_the_phantom_world_are_one_token_each(tokenizer):
    labels = [label for labels in TASKS.values() for label in labels]
    for word in [*MODALITIES, *AREAS, *TASKS, *labels, *world.COUNT_WORDS, *world.SIZE_WORDS, *world.SHAPES]:
        assert len(tokenizer.encode(word)) == 1, word
    assert len(tokenizer.encode("USER:")) == len(tokenizer.encode(" ASSISTANT:")) == 1


def test_a_letter_is_the_same_token_everywhere(tokenizer):
    (letter,) = tokenizer.encode("A")
    question = world.choice("Which state?", ("normal", "abnormal"))
    # The option's colon is dropped, so the letter stands right before the option; other colons stay.
    assert [tokenizer.decode([i]) for i in tokenizer.encode(question)] == [
        "Which",
        "state",
        "?",
        "A",
        "normal",
        "B",
        "abnormal",
    ]
    assert tokenizer.decode(tokenizer.encode("ratio: 1")) == "ratio : 1"
    assert tokenizer.encode(question)[3] == letter == tokenizer.encode("ASSISTANT: A")[-1]
    assert tokenizer.encode("A B C D") == [letter + k for k in range(4)]
    assert tokenizer.encode("A", start=False) == [letter]
    assert tokenizer.encode("a") != [letter]


@pytest.mark.parametrize(
    "text",
    [
        "état des poumons",
        "漢字 🙂",
        "12.5 mg/dL (±3 %)",
        "Which of these?\n\tA: <b>",
        "Ω-3 ﬁ \u200b x",
        "adenocarcinomatosis",
    ],
)
def test_any_text_is_encoded_without_unknowns_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids and tokenizer.pad_id not in ids
    assert "".join(tokenizer.decode(ids).split()) == "".join(text.replace("A:", "A").split())


def test_words_come_back_with_spaces(tokenizer):
    assert tokenizer.decode(tokenizer.encode("two large star")) == "two large star"
    assert tokenizer.decode(tokenizer.encode(" B")) == "B"


def test_rows_are_short(tokenizer):
    source = PhantomSource(0, 24, 12)
    fine_tuning = [r for s in source.subsets for r in source.records(s.name, "train").records]
    sizes = [
        prompts.conversation(tokenizer, record.turns, system_prompt="", num_image_tokens=int(bool(record.image)))
        for record in [*fine_tuning, *pretraining_records(0, 4000).records]
    ]
    with_image = [len(tokens.ids) - 1 for tokens in sizes if tokenizer.image_id in tokens.ids]
    without = [len(tokens.ids) for tokens in sizes if tokenizer.image_id not in tokens.ids]
    assert max(with_image[: len(fine_tuning)]) <= 26 and max(with_image) == MAX_TEXT_TOKENS
    # A row without an image has the places of the 16 image tokens too.
    assert MAX_TEXT_TOKENS < max(without) <= MAX_TEXT_TOKENS + 16
    assert max(sum(tokens.supervised) for tokens in sizes) == MAX_TARGET_TOKENS
