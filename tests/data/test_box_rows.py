"""Detection records as training rows of the two models that take boxes; every other model refuses them."""

import numpy as np
import pytest

from medcg_jax.data import formats
from medcg_jax.data.boxes import corners
from medcg_jax.data.encoding import concat_encoded, encode, encode_eval
from medcg_jax.data.phantom_boxes import PhantomBoxSource
from medcg_jax.data.records import DataError
from medcg_jax.data.text_boxes import parse_boxes
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.run_config import DataConfig

SOURCE = PhantomBoxSource(3, 6, 4)
DATA = DataConfig(system_prompt="", max_text_tokens=100, max_target_tokens=70)
RECORDS = SOURCE.records("ct-liver-det", "train")


def small(family: str):
    return load_tokenizer("", formats.SMALL_TOKENIZERS[family])


def test_minigpts_answer_is_the_boxes_as_text():
    tokenizer, fmt = small("minigpt_v2"), formats.minigpt_v2(32, 16)
    row = encode(RECORDS, tokenizer, DATA, fmt)
    for i, record in enumerate(RECORDS.records):
        targets = row.arrays["targets"][i][row.arrays["target_weights"][i] > 0]
        assert targets[-1] == tokenizer.eos_id
        found = parse_boxes(tokenizer.decode(targets), record.size_px)
        # Hundredths of the side, floored.
        assert found.shape == (len(record.boxes), 4)
        assert np.abs(found - corners(record.boxes)).max() <= max(record.size_px) / 100


def test_next_chats_boxes_stand_at_their_places():
    tokenizer, fmt = small("next_chat"), formats.next_chat(32, 16)
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
    tokenizer, fmt = small("next_chat"), formats.next_chat(32, 16)
    choice = SOURCE.records("ct-liver-state", "train")
    both = concat_encoded([encode(part, tokenizer, DATA, fmt) for part in (RECORDS, choice)])
    batch, _ = both.rows(np.array([0, len(RECORDS)]))
    assert batch["boxes"].shape == (2, formats.MAX_BOXES, 4)
    assert batch["box_weights"][1].sum() == batch["at_weights"][1].sum() == 0
    assert "boxes" not in encode_eval(choice, tokenizer, DATA, fmt).arrays


@pytest.mark.parametrize(("family", "fmt"), [("llava", formats.llava(32, 16)), ("mllama", formats.mllama(32))])
def test_other_models_refuse_boxes(family, fmt):
    with pytest.raises(DataError, match=r"^record ct-liver-det/train/1: it has boxes; MiniGPT-v2 and NExT-Chat take them"):
        encode(RECORDS, small(family), DATA, fmt)
