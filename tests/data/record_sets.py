"""Small sets of choice records that the data tests share."""

import numpy as np

from medcg_jax.data.records import Record, RecordSet, Turn


def choice(index: int, *, subset: str = "04", split: str = "train", image: bool = True) -> Record:
    letter = "AB"[index % 2]
    return Record(
        id=f"{subset}/{split}/{index}",
        subset=subset,
        turns=(Turn("what is this ?\nA: benign\nB: normal", letter),),
        options=("benign", "normal"),
        answer=letter,
        image=f"{index}.png" if image else "",
        data_no="1",
    )


def choices(count: int, *, subset: str = "04", size_px: int = 4) -> RecordSet:
    """Choice records whose image is filled with the record's index."""
    pixels = np.empty((count, size_px, size_px, 3), np.uint8)
    pixels[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return RecordSet([choice(i, subset=subset) for i in range(count)], pixels)
