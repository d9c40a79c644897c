"""The tiny model's tokenizer: the file is what the builder makes, phantom rows are short, other text has no unknowns."""

import pytest

from benchmarks import build_tokenizers
from medcg_jax.data.phantom import world
from medcg_jax.data.phantom.pretraining import MAX_TARGET_TOKENS, MAX_TEXT_TOKENS, fillers, pretraining_records
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.records import Turn
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families import registry
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


@pytest.mark.parametrize("family", registry.families(), ids=lambda family: family.name)
def test_words_of_the_phantom_world_are_one_token_each(family):
    own, words = load_tokenizer("", family.tokenizer), [*world.study_words(), *world.base_words(), *fillers()]
    tokens = {word: own.encode(word) for word in words}
    assert {word for word, ids in tokens.items() if len(ids) != 1} == set()
    # No two words share a token, so that one can be trained and the others stay.
    assert len({ids[0] for ids in tokens.values()}) == len(words)


def test_roles_are_one_token_each(tokenizer):
    assert len(tokenizer.encode("USER:")) == len(tokenizer.encode(" ASSISTANT:")) == 1


def test_a_letter_is_the_same_token_everywhere(tokenizer):
    (letter,) = tokenizer.encode("A")
    question = world.choice("ct brain state?", ("normal", "abnormal"))
    # The option's colon is dropped, so the letter stands right before the option; other colons stay.
    assert [tokenizer.decode([i]) for i in tokenizer.encode(question)] == [
        "ct",
        "brain",
        "state",
        "?",
        "A",
        "normal",
        "B",
        "abnormal",
    ]
    assert tokenizer.decode(tokenizer.encode("ratio: 1")) == "ratio : 1"
    assert tokenizer.encode(question)[4] == letter == tokenizer.encode("ASSISTANT: A")[-1]
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
    assert tokenizer.decode(tokenizer.encode("dark large star")) == "dark large star"
    assert tokenizer.decode(tokenizer.encode(" B")) == "B"


def test_rows_are_short(tokenizer):
    def tokens_of(turns):
        return prompts.conversation(tokenizer, turns, system_prompt="", num_image_tokens=1)

    source = PhantomSource(0, 24, 12)
    questions = [r for s in source.subsets for r in source.records(s.name, "train").records]
    # All questions are as long, since every word is one token.
    assert {len(tokens_of(record.turns).ids) - 1 for record in questions} == {13}
    assert {sum(tokens_of(record.turns).supervised) for record in questions} == {2}
    records = pretraining_records(0, 4000).records
    rows = [tokens_of(record.turns) for record in records]
    # Beside as many turns of a letter each.
    frames = [len(tokens_of((Turn("A", "B"),) * len(record.turns)).ids) - 2 * len(record.turns) for record in records]
    words = [len(row.ids) - frame for row, frame in zip(rows, frames, strict=True)]
    assert max(words) <= MAX_TEXT_TOKENS < max(words) + 5
    assert max(sum(row.supervised) for row in rows) == MAX_TARGET_TOKENS
