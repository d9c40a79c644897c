"""Detection records as training rows of the two models that take boxes; every other model refuses them."""

import numpy as np
import pytest
from row_formats import row_format

from medcg_jax.config import DataConfig, ModelConfig
from medcg_jax.data.boxes import ask, corners
from medcg_jax.data.encoding import concat_encoded, encode, encode_boxes, encode_eval
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.records import Box, DataError, Record, RecordSet, Turn
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import registry
from medcg_jax.families.build import architecture
from medcg_jax.families.minigpt_v2.boxes import parse_boxes
from medcg_jax.families.next_chat.rows import preprocess_masks

SOURCE = PhantomSource(3, 6, 4)
DATA = DataConfig(system_prompt="", max_text_tokens=100, max_target_tokens=70)
RECORDS = SOURCE.records("ct-liver-det", "train")


def small(family: str):
    return load_tokenizer("", registry.family(family).tokenizer)


def test_minigpts_answer_is_the_boxes_as_text():
    tokenizer, fmt = small("minigpt_v2"), row_format("minigpt_v2", 32, 16)
    row = encode(RECORDS, tokenizer, DATA, fmt)
    for i, record in enumerate(RECORDS.records):
        targets = row.arrays["targets"][i][row.arrays["target_weights"][i] > 0]
        assert targets[-1] == tokenizer.eos_id
        found = parse_boxes(tokenizer.decode(targets), record.size_px)
        # Hundredths of the side, floored.
        assert found.shape == (len(record.boxes), 4)
        assert np.abs(found - corners(record.boxes)).max() <= max(record.size_px) / 100


def test_next_chats_boxes_stand_at_their_places():
    tokenizer, fmt = small("next_chat"), row_format("next_chat", 32, 16)
    row = encode(RECORDS, tokenizer, DATA, fmt)
    at, box = tokenizer.special("<at>"), tokenizer.special("<boxes>")
    for i, record in enumerate(RECORDS.records):
        count = len(record.boxes)
        assert row.arrays["box_weights"][i].sum() == row.arrays["at_weights"][i].sum() == count
        places = row.arrays["at_positions"][i, :count]
        assert (row.arrays["tokens"][i, places] == at).all() and (row.arrays["tokens"][i, places + 1] == box).all()
        height, width = record.size_px
        expected = corners(record.boxes) / (width, height, width, height)
        np.testing.assert_allclose(row.arrays["at_boxes"][i, :count], expected, atol=1e-6)
        # `<boxes>` is never to be predicted.
        assert box not in row.arrays["targets"][i][row.arrays["target_weights"][i] > 0]


def test_rows_with_and_without_boxes_make_one_batch():
    tokenizer, fmt = small("next_chat"), row_format("next_chat", 32, 16)
    choice = SOURCE.records("ct-liver-state", "train")
    both = concat_encoded([encode(part, tokenizer, DATA, fmt) for part in (RECORDS, choice)])
    batch, _ = both.rows(np.array([0, len(RECORDS)]))
    assert batch["boxes"].shape == (2, 8, 4)
    assert batch["box_weights"][1].sum() == batch["at_weights"][1].sum() == 0
    assert "boxes" not in encode_eval(choice, tokenizer, DATA, fmt).arrays


def cells() -> RecordSet:
    """A record with two labels whose boxes take turns, and a choice record."""
    found = [Box("Red cell", 1, 1, 5, 5), Box("Platelet", 8, 2, 12, 6), Box("Red cell", 20, 20, 30, 28)]
    masks = np.zeros((3, 32, 48), bool)
    for mask, box in zip(masks, found, strict=True):
        mask[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = True
    records = [
        Record("63/train/1", "63", (), image="a.png", boxes=tuple(found), size_px=(32, 48)),
        Record("20/train/2", "20", (Turn("Which?\nA: x\nB: y", "A"),), ("x", "y"), "A", image="b.png"),
    ]
    return RecordSet(records, np.zeros((2, 32, 48, 3), np.uint8), [masks, None])


@pytest.mark.parametrize("family", ["minigpt_v2", "next_chat"])
def test_every_question_is_a_row_that_ends_where_the_answer_begins(family):
    tokenizer = small(family)
    fmt = row_format(family, 32, 16)
    found = encode_boxes(cells(), tokenizer, DATA, fmt)
    asked = ask(cells().records[0])
    assert found.asked == asked and [r.id for r in found.records.records] == ["63/train/1"] * 2
    for i, one in enumerate(asked):
        turn = fmt.box_turn(found.records.records[i], one)
        length = found.arrays["last_position"][i] + 1
        prompt = fmt.prompts.evaluation_prompt(tokenizer, (turn,), system_prompt="", num_image_tokens=16)
        assert found.arrays["tokens"][i, :length].tolist() == prompt
        # As a row of training begins (MiniGPT-v2's evaluation has a start token and a space of its own).
        whole = fmt.prompts.conversation(tokenizer, (turn,), system_prompt="", num_image_tokens=16)
        first = int(np.argmax(whole.supervised))
        assert family == "minigpt_v2" or whole.ids[:first] == prompt
    # The answer is not in the prompt: another answer gives the same rows.
    moved = [Box(box.label, box.x1, box.y1, box.x2 + 1, box.y2) for box in cells().records[0].boxes]
    other = RecordSet(
        [Record("63/train/1", "63", (), image="a.png", boxes=tuple(moved), size_px=(32, 48))], cells().images[:1]
    )
    assert (encode_boxes(other, tokenizer, DATA, fmt).arrays["tokens"] == found.arrays["tokens"]).all()


def test_a_model_without_boxes_is_asked_for_none():
    with pytest.raises(DataError, match="a model that gives no boxes is asked for some"):
        encode_boxes(RECORDS, small("llava"), DATA, row_format("llava", 32, 16))


def with_masks():
    tokenizer = small("next_chat")
    model = architecture(
        ModelConfig("next_chat_tiny_sam", max_boxes=4), vocab_size=tokenizer.vocab_size,
        **registry.family("next_chat").token_ids(tokenizer),
    )  # fmt: skip
    return tokenizer, registry.of(model).row_format(model, with_masks=True)


def test_masks_stand_in_the_order_of_the_answers_boxes():
    tokenizer, fmt = with_masks()
    records = cells()
    row, _ = encode(records, tokenizer, DATA, fmt).rows(np.array([0, 1]))
    assert row["sam_pixels"].shape == (2, 1, 64, 64, 3) and row["sam_extent"][0, 0].tolist() == [43, 64]
    assert row["at_masks"].shape == (2, 4, 64, 64) and row["at_weights"].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    laid = preprocess_masks(records.mask(0), 64)
    for place, box in enumerate(row["at_boxes"][0, :3]):
        here = row["at_masks"][0, place]
        # The mask's own box is the answer's, within the pixels that resizing moves.
        ys, xs = np.nonzero(here)
        np.testing.assert_allclose(box * 64, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), atol=1.5)
        assert any((here == one).all() for one in laid)
    assert not row["at_masks"][:, 3].any() and not row["at_masks"][1].any()


def test_masks_that_cannot_be_learnt_are_refused_by_name():
    tokenizer, fmt = with_masks()
    records = cells()
    with pytest.raises(DataError, match=r"record 63/train/1: it has boxes and no masks"):
        encode(RecordSet(records.records, records.images), tokenizer, DATA, fmt)
    many = Record("63/train/3", "63", (), image="c.png", boxes=records.records[0].boxes * 2, size_px=(32, 48))
    six = RecordSet([many], records.images[:1], [np.repeat(records.mask(0), 2, axis=0)])
    with pytest.raises(DataError, match=r"record 63/train/3: 6 boxes; at most 4 fit"):
        encode(six, tokenizer, DATA, fmt)
    with pytest.raises(DataError, match="without SAM draws no masks"):
        ids = registry.family("next_chat").token_ids(tokenizer)
        model = architecture(ModelConfig("next_chat_tiny"), vocab_size=tokenizer.vocab_size, **ids)
        registry.of(model).row_format(model, with_masks=True)


@pytest.mark.parametrize(
    ("family", "fmt"), [("llava", row_format("llava", 32, 16)), ("mllama", row_format("mllama", 32))]
)
def test_other_models_refuse_boxes(family, fmt):
    with pytest.raises(
        DataError, match=r"^record ct-liver-det/train/1: it has boxes; MiniGPT-v2 and NExT-Chat take them"
    ):
        encode(RECORDS, small(family), DATA, fmt)
