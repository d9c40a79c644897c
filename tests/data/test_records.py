"""Record sets: choosing and joining keep records and images together, and decode nothing."""

import numpy as np
import pytest
from record_sets import CountedImage, choice, choices

from medcg_jax.data.records import RecordSet, concat


def lazy(count, offset=0, decoded=None):
    images = [CountedImage(offset + i, [] if decoded is None else decoded, (2, 3)) for i in range(count)]
    return RecordSet([choice(offset + i) for i in range(count)], images)


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


def test_sizes_and_joining_decode_nothing():
    decoded = []
    joined = concat([lazy(3, 10, decoded), choices(2), lazy(2, 20, decoded).select([1]), choices(2, size_px=6)])
    assert [joined.image_size(i) for i in range(8)] == [(2, 3)] * 3 + [(4, 4)] * 2 + [(2, 3)] + [(6, 6)] * 2
    assert not decoded
    assert together(joined) == [10, 11, 12, 0, 1, 21, 0, 1]
    assert together(joined.select([7, 0]).select([1])) == [10]
    assert joined.image(7).shape == (6, 6, 3)
    assert decoded == [10, 11, 12, 21, 10]


def test_concat_of_nothing_is_empty():
    assert len(concat([])) == 0 and len(concat([choices(0), choices(0)])) == 0


def test_records_and_images_must_match():
    with pytest.raises(ValueError, match="1 records with 2 images"):
        RecordSet([choice(0)], np.zeros((2, 1, 1, 3), np.uint8))


def test_label_is_the_text_of_the_letter():
    assert [choice(i).label for i in range(2)] == ["benign", "normal"]
