"""QA formatting: turns raw labels into the release's records, with six instructions a subset and up to four options.

Source of the format: FreedomIntelligence/Med-MAT README.md (six instructions, single choice, up to four options, wrong
options drawn from the subset's other labels, the closing sentence). The instructions were written for this package.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medcg_jax.config import DataConfig
from medcg_jax.data.labels import LabelledImage, LabelTable, read_labels
from medcg_jax.data.notices import box_range
from medcg_jax.data.records import LETTERS, SPLITS, DataError, Split
from medcg_jax.data.splits import rarest_labels, split_group, train_test_split
from medcg_jax.data.tree import FOLDER, MANIFEST, Tree, manifest_content
from medcg_jax.files import write_together

INSTRUCTIONS = Path(__file__).parent / "instructions.json"
MAX_OPTIONS = 4
CLOSING = "Answer with the option's letter from the given choices directly."
# Subset names that fit in a file's name (`tree.Tree.files`).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
# Words at the end of a task's name that a question leaves out.
_DONE = re.compile(r"(\s+(classification|identification|evaluation|detection|segmentation|det/seg|det|seg))+$", re.I)


def instructions(modality: str, area: str, task: str) -> tuple[str, ...]:
    """The six instructions of a subset, with its modality, area and task written out.

    Names of Med-MAT's tables have their own wording; other names stand in the sentences as they are.
    """
    words = _words()
    name = words["modalities"].get(modality, f"{modality} image")
    kind, subject = words["tasks"].get(task, ("type", _inside(_DONE.sub("", task))))
    area_name = words["areas"].get(area, _inside(area))
    return tuple(text.format(modality=name, area=area_name, subject=subject) for text in words["kinds"][kind])


def choice_record(
    image: str, label: str, others: Sequence[str], asked: Sequence[str], key: str, data_no: str = ""
) -> dict[str, Any]:
    """A question about an image with the release's keys, `id` 0.

    Instruction, wrong options and right letter are each drawn uniformly, seeded by `key`, image and label alone, so a
    record does not depend on other records.

    Args:
      others: the labels that are wrong here. asked: the subset's instructions.

    Example: `choice_record("a.png", "Benign", ["Normal"], ["Which?"], "0/04")` may ask "Which?\\nA: Normal\\nB: ..."
    """
    generator = np.random.default_rng(_seed(f"{key}\n{image}\n{label}"))
    question = asked[int(generator.integers(len(asked)))]
    options = [others[index] for index in generator.permutation(len(others))[: MAX_OPTIONS - 1]]
    right = int(generator.integers(len(options) + 1))
    options.insert(right, label)
    lines = [question, *(f"{letter}: {option}" for letter, option in zip(LETTERS, options)), CLOSING]
    return {
        "id": 0,
        "caption": label,
        "image": image,
        "Question": question,
        "Answer": label,
        "Question-choice": "\n".join(lines),
        "Answer-choice": LETTERS[right],
        "data-no": data_no,
    }


def detection_record(labelled: LabelledImage, data_no: str = "") -> dict[str, Any]:
    """A record of a detection file, `id` 0; it has no boxes if the image has no finding."""
    height, width = labelled.size_px
    boxes = [
        # Whole pixels as whole numbers, as the files have them.
        {"label": box.label, "bbox": [int(corner) if corner.is_integer() else corner for corner in box.corners]}
        for box in labelled.boxes
    ]
    return {"id": 0, "image": labelled.image, "width": width, "height": height, "boxes": boxes, "data-no": data_no}


def format_labels(
    table_path: str | Path,
    root: str | Path,
    subset: str,
    *,
    seed: int = 0,
    data_no: str = "",
    triplet: tuple[str, str, str] | None = None,
    as_choice: bool = False,
    force: bool = False,
    max_pixels: int = DataConfig().max_pixels,
) -> dict[str, Any]:
    """Writes a subset's two files below `root/Aggregated_Subsets` from a table of raw labels (`labels.read_labels`).

    Records are sorted by image path, with ids from 1. The split is the table's, else `splits.train_test_split`. An image
    with several classes gets a question for each class, without its other classes among the options.

    Args:
      seed: of instructions, options and letters; the split does not depend on it.
      data_no: for lines that name none.
      triplet: (modality, area, task), written into manifest.json; None: taken from manifest.json or Med-MAT's table.
      as_choice: makes questions, not boxes, of the images that have exactly one label.
      force: whether files of this subset may be replaced.

    Returns {"subset", "kind", "labels", "train", "test", "left_out" (images without a question), "files",
    "warnings" (lines)}.

    Raises:
      DataError: anything is wrong; then nothing is written.
    """
    table_path, root = Path(table_path), Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected the one that the paths of the table start in")
    tree, is_named = Tree(root), triplet is not None
    triplet = _triplet(tree, subset, triplet)
    table = read_labels(table_path, root, max_pixels)
    if as_choice and not table.has_boxes:
        raise DataError(f"{table_path.name}: --as=choice is for boxes and masks; classes are questions anyway")
    detection = table.has_boxes and not as_choice
    files = {split: root / FOLDER / f"Subset--{subset}{'-det' * detection}-{split}.json" for split in SPLITS}
    _check_free(tree, subset, detection, force)
    boxes = [(detection_record(labelled), labelled.size_px) for labelled in table.images] if table.in_numbers else []
    odd_boxes = box_range(table_path.name, boxes)
    # All records of an image are on the same side.
    sides = _sides(table, data_no)
    asked_of = [labelled for labelled in table.images if not as_choice or len(labelled.labels) == 1]
    asked = instructions(*triplet)
    labels = sorted({label for labelled in asked_of for label in labelled.labels})
    if detection and not labels:
        raise DataError(f"{table_path.name}: no image has a finding; expected one or more")
    if not detection and len(labels) < 2:
        raise DataError(f"{table_path.name}: the labels {labels}; expected two or more for questions")
    records: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for labelled in asked_of:
        number = labelled.data_no or data_no
        if detection:
            raws = [detection_record(labelled, number)]
        else:
            wrong = [label for label in labels if label not in labelled.labels]
            if not wrong:
                raise DataError(
                    f"{table_path.name}: image {labelled.image!r} has all labels; one that it lacks is needed"
                )
            raws = [
                choice_record(labelled.image, label, wrong, asked, f"{seed}/{subset}", number)
                for label in labelled.labels
            ]
        group = {"group": labelled.group} if labelled.group else {}
        side = records[sides[labelled.image]]
        side += [raw | group | {"id": len(side) + offset} for offset, raw in enumerate(raws, 1)]
    for split in SPLITS:
        if not records[split]:
            reason = f"no {split} record of {len(asked_of)} images; expected more, or both splits in a column `split`"
            raise DataError(f"{table_path.name}: {reason}")
    # The test file first: a training file alone would be read as a subset without a split, and be split again.
    texts = {files[split]: _as_json(records[split]) for split in reversed(SPLITS)}
    if is_named:
        entry = {"subset": subset, "kind": _kind(detection)}
        entry |= dict(zip(("modality", "area", "task"), triplet, strict=True))
        texts = {root / MANIFEST: _manifest_with(root, entry)} | texts
    write_together(texts)
    return {
        "subset": subset,
        "kind": _kind(detection),
        "labels": labels,
        **{split: len(records[split]) for split in SPLITS},
        "left_out": len(table.images) - len(asked_of),
        "files": [str(files[split]) for split in SPLITS],
        "warnings": [str(odd_boxes)] if odd_boxes else [],
    }


def _triplet(tree: Tree, subset: str, given: tuple[str, str, str] | None) -> tuple[str, str, str]:
    """(modality, area, task) of a subset: as given, else the tree's, else Med-MAT's."""
    if not _NAME.fullmatch(subset) or subset.endswith("-det"):
        raise DataError(f"subset {subset!r}: expected letters, digits and hyphens, not ending in -det")
    listed = tree.triplets
    if given:
        for name, text in zip(("modality", "area", "task"), given, strict=True):
            if not text or text != text.strip() or not text.isprintable():
                raise DataError(f"{name} {text!r} of subset {subset}: expected one line of text in all three")
        return given
    if subset not in listed:
        reason = "is neither in the tree's manifest.json nor in Med-MAT's table of 53"
        raise DataError(f"subset {subset!r} {reason}; give its modality, area and task")
    return listed[subset]


def _check_free(tree: Tree, subset: str, detection: bool, force: bool) -> None:
    """Raises DataError if a file of the subset is in the way or a file of the tree is refused."""
    for error in tree.refused:
        raise error
    for file in tree.files:
        if file.number != subset:
            continue
        name = file.path.relative_to(tree.root)
        if file.detection != detection:
            raise DataError(f"{name}: subset {subset} has {_kind(file.detection)} files; choose another subset")
        if file.path.parent == tree.root:
            raise DataError(f"{name}: subset {subset} lies at the tree's root; move that file away")
        if not force:
            raise DataError(f"{name} exists; --force replaces it")


def _kind(detection: bool) -> str:
    return "detection" if detection else "choice"


def _sides(table: LabelTable, data_no: str) -> dict[str, Split]:
    """Image -> split: the table's, or 9:1 by group and by the rarest label of each image."""
    if any(labelled.split for labelled in table.images):
        return {labelled.image: labelled.split for labelled in table.images}
    rarest = rarest_labels([labelled.labels for labelled in table.images])
    items = [
        (labelled.image, label, split_group(labelled.data_no or data_no, labelled.image, labelled.group))
        for labelled, label in zip(table.images, rarest, strict=True)
    ]
    tested = train_test_split(items)
    return {image: SPLITS[is_test] for (image, _, _), is_test in zip(items, tested, strict=True)}


def _manifest_with(root: Path, entry: dict[str, str]) -> str:
    """The text of the tree's manifest.json with this subset's entry added or updated."""
    whole = manifest_content(root) if (root / MANIFEST).exists() else {"subsets": []}
    others = [listed for listed in whole["subsets"] if listed["subset"] != entry["subset"]]
    before: dict[str, str] = next((listed for listed in whole["subsets"] if listed["subset"] == entry["subset"]), {})
    whole["subsets"] = sorted([*others, before | entry], key=lambda listed: listed["subset"])
    return _as_json(whole)


def _as_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _inside(name: str) -> str:
    """A name inside a sentence: "Whole Body" -> "whole body", "CT Contrast" -> "CT contrast"."""
    return " ".join(word if word[:2].isupper() else word[:1].lower() + word[1:] for word in name.split(" "))


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")


@functools.cache
def _words() -> dict[str, Any]:
    return json.loads(INSTRUCTIONS.read_text("utf-8"))
