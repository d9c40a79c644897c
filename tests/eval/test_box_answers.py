"""Answers about boxes: their file, what they are worth against other images, and masks laid back over the image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.eval.box_answers import BoxAnswer, read_answers, rounded, summary, write_answers
from medcg_jax.eval.locate import masks_in_image
from medcg_jax.families.next_chat.rows import preprocess_masks

number = st.floats(-1e4, 1e4)
box = st.tuples(number, number, number, number).map(lambda b: rounded(np.array([b]))[0])
answers = st.builds(
    BoxAnswer,
    st.text(min_size=1), st.text(min_size=1), st.text(), st.lists(box, min_size=1, max_size=3).map(tuple),
    st.none() | st.lists(box, max_size=3).map(tuple), st.text(), st.none() | st.floats(0, 1),
)  # fmt: skip


@given(st.lists(answers, max_size=4, unique_by=lambda one: (one.id, one.subset, one.label)))
@settings(deadline=None)
def test_the_file_gives_back_what_was_written(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("boxes") / "cell.jsonl"
    write_answers(path, found)
    assert read_answers(path) == found
    assert [p.name for p in path.parent.iterdir()] == ["cell.jsonl"]


def answer(i: int, predicted, dice=None, subset="a", label="lesion") -> BoxAnswer:
    truth = (float(10 * i), 0.0, float(10 * i + 8), 8.0)
    return BoxAnswer(f"{subset}/{i}", subset, label, (truth,), predicted, "", dice)


def test_right_answers_are_worth_more_than_the_usual_place():
    """Boxes that lie elsewhere in each image; boxes that lie at one place in all."""
    right = [answer(i, ((10.0 * i, 0.0, 10.0 * i + 8, 8.0),)) for i in range(5)]
    scores = summary(right)
    assert (scores["correct"], scores["accuracy"], scores["by_chance"], scores["dice"]) == (5, 1.0, 0.0, None)
    same = [BoxAnswer(f"a/{i}", "a", "lesion", ((0.0, 0.0, 8.0, 8.0),), ((0.0, 0.0, 8.0, 8.0),), "") for i in range(5)]
    assert summary(same)["by_chance"] == 1.0
    # One image alone, and labels and subsets that are not mixed.
    assert summary(right[:1])["by_chance"] is None
    mixed = [*right[:1], answer(0, right[0].predicted, subset="b"), answer(0, right[0].predicted, label="cell")]
    assert summary(mixed)["by_chance"] is None


def test_dice_is_the_mean_of_the_questions_that_have_one():
    scores = summary([answer(0, None, 0.5), answer(1, None, 1.0), answer(2, None)])
    assert scores["dice"] == 0.75 and scores["dice_low"] <= 0.75 <= scores["dice_high"]
    assert (scores["unparsed_rate"], scores["accuracy"]) == (1.0, 0.0)


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 40), (7, 90)])
def test_masks_come_back_to_where_they_were(size):
    mask = np.zeros((1, *size), bool)
    mask[0, size[0] // 4 : size[0] // 2 + 1, size[1] // 4 : size[1] // 2 + 3] = True
    laid = preprocess_masks(mask, 256)[0]
    # A quarter of SAM's size, as it gives logits.
    logits = np.where(laid[2::4, 2::4], 5.0, -5.0).astype(np.float32)
    found = masks_in_image(logits[None], size)
    assert found.shape == (1, *size)
    overlap = (found & mask).sum() / (found | mask).sum()
    assert overlap > 0.75
    # Read from the corner in place of the middle of the square, it would lie elsewhere.
    if size[0] != size[1]:
        shifted = np.roll(found[0], 5, axis=0 if size[0] > size[1] else 1)
        assert (shifted & mask[0]).sum() / (shifted | mask[0]).sum() < overlap
    assert masks_in_image(np.zeros((0, 16, 16)), size).shape == (0, *size)
