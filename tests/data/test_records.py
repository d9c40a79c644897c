"""Record sets: choosing and joining keep records and images together, and decode nothing."""

import numpy as np
import pytest
from record_sets import choice, choices

from medcg_jax.data.records import RecordSet, concat


class Lazy:
    """Images that fill themselves with their index and remember being asked."""

    def __init__(self, count, offset=0):
        self.count, self.offset, self.asked = count, offset, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(index)
        return np.full((2, 3, 3), self.offset + index, np.uint8)


def lazy(count, offset=0):
    return RecordSet([choice(offset + i) for i in range(count)], Lazy(count, offset))


def together(found: RecordSet) -> list[int]:
    indices = [int(record.id.split("/")[-1]) for record in found.records]
    assert [int(found.image(i)[0, 0, 0]) for i in range(len(found))] == indices
    return indices


@pytest.mark.parametrize("make", [choices, lazy])
def test_select_keeps_order_and_images(make):
    found = make(8).select([5, 2, 2, 7])
    assert together(found) == [5, 2, 2, 7]
    assert together(found.select([3, 0])) == [7, 5]
    assert len(found.select([])) == 0


def test_concat_of_arrays_is_an_array():
    joined = concat([choices(3), choices(2)])
    assert isinstance(joined.images, np.ndarray) and together(joined) == [0, 1, 2, 0, 1]


def test_concat_of_mixed_sets_decodes_nothing_until_asked():
    parts = [lazy(3, 10), choices(2), lazy(2, 20).select([1]), choices(2, size_px=6)]
    joined = concat(parts)
    assert not parts[0].images.asked
    assert together(joined) == [10, 11, 12, 0, 1, 21, 0, 1]
    assert together(joined.select([7, 0]).select([1])) == [10]
    assert joined.image(7).shape == (6, 6, 3)
    assert parts[0].images.asked == [0, 1, 2, 0]


def test_concat_of_nothing_is_empty():
    assert len(concat([])) == 0 and len(concat([choices(0), choices(0)])) == 0


def test_records_and_images_must_match():
    with pytest.raises(ValueError, match="1 records with 2 images"):
        RecordSet([choice(0)], np.zeros((2, 1, 1, 3), np.uint8))


def test_label_is_the_text_of_the_letter():
    assert [choice(i).label for i in range(2)] == ["benign", "normal"]
