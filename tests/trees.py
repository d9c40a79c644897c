"""Med-MAT trees written by hand for tests."""

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from medcg_jax.config import DataConfig
from medcg_jax.data.records import Record
from medcg_jax.data.release import checked_records
from medcg_jax.data.tree import Contents, SubsetFile, Tree


def raw_record(number: int, *, label="Benign", options=("Benign", "Normal"), image: str | None = None, **changes):
    """A record of the release's eight keys; `changes` replaces their values."""
    letter = "ABCDEFGH"[options.index(label)]
    lines = [f"{'ABCDEFGH'[place]}: {text}" for place, text in enumerate(options)]
    record = {
        "id": number,
        "caption": label,
        "image": image or f"med-mat/a b/{number} [1]%.png",
        "Question": "Which one is it?",
        "Answer": label,
        "Question-choice": "\n".join(["Which one is it?", *lines, "Answer with the option's letter."]),
        "Answer-choice": letter,
        "data-no": "5",
    }
    return record | changes


def write_image(root: Path, relative: str, seed: int | None = None) -> None:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(relative.encode()) if seed is None else seed
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_subset(root: Path, name: str, raws: list, *, folder: str = "Aggregated_Subsets", images: bool = True) -> None:
    """One subset file (`name` as in the release, without .json) and, with `images`, an image for each record."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / f"{name}.json").write_text(json.dumps(raws), "utf-8")
    for raw in raws if images else ():
        write_image(root, raw["image"])


def write_tree(root: Path, *, train: int = 12, test: int = 4) -> Path:
    """Subset 04 with so many records of two labels, 3:1."""
    labels = ["Benign", "Benign", "Benign", "Normal"]
    for split, first, count in (("train", 1, train), ("test", 1001, test)):
        raws = [raw_record(first + i, label=labels[i % 4]) for i in range(count)]
        write_subset(root, f"Subset--04-{split}", raws)
    return root


def write_tree_with_boxes(root: Path, *, boxes: int, train: int = 12, test: int = 4) -> Path:
    """`write_tree`, and subset 47 with so many detection records."""
    write_tree(root, train=train, test=test)
    raws = [raw_box_record(i) for i in range(1, boxes + 1)]
    write_subset(root, "Subset--47-det-train", raws, images=False)
    for number, raw in enumerate(raws, 1):
        write_image(root, raw["image"], seed=number)
    return root


def read_file(path: Path, root: Path, *, detection: bool = False) -> list[Record]:
    """The records of one file, taken as training records of subset 64; raises at the first thing that is wrong."""
    contents = Contents(SubsetFile(path, "64", "train", detection), Tree(root).image)
    return checked_records(contents, DataConfig().max_pixels)


def raw_box_record(number: int, *, label="Skin lesion", **changes):
    """A detection record of an image as `write_image` makes it."""
    record = {
        "id": number,
        "image": f"med-mat/boxes/{number}.png",
        "width": 12,
        "height": 8,
        "boxes": [{"label": label, "bbox": [1, 2, 5, 6]}],
        "data-no": "71",
    }
    return record | changes
