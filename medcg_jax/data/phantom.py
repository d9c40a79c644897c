"""The embedded world of phantoms as a source of records, and the same as files.

A seed draws the images of all splits; training, test and pre-training come from streams of their own, and test images
from reserved poses and cells of placement and amplitude (`phantom_world`) that nothing else is drawn from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from medcg_jax.data import phantom_images, phantom_text, phantom_world
from medcg_jax.data.phantom_images import LESION_SHAPES, Scene, draw_scene, render
from medcg_jax.data.phantom_world import AREAS, MODALITIES, TASKS, TRIPLETS, Draws, Triplet
from medcg_jax.data.records import LETTERS, SPLITS, DataError, Record, RecordSet, Source, Split, Subset

# There is no end of phantoms: so many where "all" test records are wanted.
PHANTOM_TEST_RECORDS = 300


class PhantomSource:
    """The phantom world's 32 subsets, made in memory when asked for; see `records.Source`.

    Args:
      seed: of all images and texts.
      train_records, test_records: per subset, labels balanced (exactly, where the number is a multiple of theirs).
    """

    # It has none; `phantom_boxes.PhantomBoxSource` adds them.
    detection_subsets: tuple[Subset, ...] = ()

    def __init__(self, seed: int, train_records: int = 300, test_records: int = PHANTOM_TEST_RECORDS):
        self.seed, self._sizes = seed, {"train": train_records, "test": test_records}
        for split, size in self._sizes.items():
            if size < 1:
                raise DataError(f"{split}_records={size}; 1 or more is accepted")
        self.subsets = tuple(
            Subset(t.name, t.modality, t.area, t.task, TASKS[t.task], num_train=train_records, num_test=test_records)
            for t in TRIPLETS
        )
        self._made: dict[tuple[str, Split], RecordSet] = {}

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records; see `records.Source`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}; {' or '.join(SPLITS)} is accepted")
        found = [triplet for triplet in TRIPLETS if triplet.name == subset]
        if not found:
            raise DataError(
                f"subset {subset!r} is not in the phantom world; it has {', '.join(t.name for t in TRIPLETS)}"
            )
        if (subset, split) not in self._made:
            self._made[subset, split] = self._make(found[0], split)
        return self._made[subset, split]

    def scene(self, subset: str, split: Split) -> Scene:
        """The parameters that the images of these records are drawn from."""
        return self._scene(Triplet(*subset.split("-")), split, self._draws(subset, split))

    def fingerprint(self) -> str:
        """A digest of the seed, the sizes and the modules that draw and write the records."""
        return _digest(self.seed, sorted(self._sizes.items()))

    def _draws(self, subset: str, split: Split) -> Draws:
        return Draws(f"{self.seed}/{subset}/{split}", np.arange(self._sizes[split]))

    def _scene(self, triplet: Triplet, split: Split, draws: Draws) -> Scene:
        size = len(draws)
        label = np.arange(size) % len(TASKS[triplet.task])
        count, shape, lesion_size = 1 + draws.integer(3), draws.integer(2), draws.integer(2)
        if triplet.task == "state":
            count = np.where(label == 1, count, 0)
        elif triplet.task == "grade":
            count = label
        elif triplet.task == "cancer":
            shape = label
        else:
            lesion_size = label
        return draw_scene(
            draws,
            modality=np.full(size, MODALITIES.index(triplet.modality)),
            area=np.full(size, AREAS.index(triplet.area)),
            count=count,
            shape=np.asarray(LESION_SHAPES)[shape],
            size=lesion_size,
            test=split == "test",
        )

    def _make(self, triplet: Triplet, split: Split) -> RecordSet:
        draws = self._draws(triplet.name, split)
        scene = self._scene(triplet, split, draws)
        images = render(scene, draws)
        labels, templates = TASKS[triplet.task], phantom_text.TEMPLATES[triplet.task]
        orders, which = draws.order(len(labels)), draws.integer(len(templates))
        records = []
        for i, (order, place) in enumerate(zip(orders.tolist(), which.tolist(), strict=True)):
            question = templates[place].format(modality=triplet.modality, area=triplet.area)
            options = tuple(labels[k] for k in order)
            turn = phantom_text.choice_turn(question, options, labels[i % len(labels)])
            image = f"med-mat/phantom/{triplet.name}/{split}-{i + 1:05d}.png"
            records.append(
                Record(f"{triplet.name}/{split}/{i + 1}", triplet.name, (turn,), options, turn.answer, image, "phantom")
            )
        return RecordSet(records, images)


def write_release(source: Source, out: str | Path) -> dict[str, int]:
    """Writes all records of a source in the release's layout, and a manifest; {"subsets", "records"}: how many.

    `out` appears at once, when everything has been written; until then the files lie beside it.

    Raises:
      DataError: `out` exists, or its parent does not.
    """
    from PIL import Image

    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists; a folder that does not is accepted")
    if not out.parent.is_dir():
        raise DataError(f"{out}: the folder {out.parent} does not exist")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "Aggregated_Subsets").mkdir(parents=True)
    written = 0
    for subset in (*source.subsets, *source.detection_subsets):
        for split in SPLITS:
            records = source.records(subset.name, split)
            has_boxes = subset in source.detection_subsets
            keys = _detection_keys if has_boxes else _release_keys
            name = f"Subset--{subset.name}{'-det' if has_boxes else ''}-{split}.json"
            _write_json(partial / "Aggregated_Subsets" / name, [keys(record) for record in records.records])
            for i, record in enumerate(records.records):
                path = partial / record.image
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(records.image(i)).save(path)
            written += len(records)
    entries = [_entry(s, "choice") for s in source.subsets] + [_entry(s, "detection") for s in source.detection_subsets]
    _write_json(partial / "manifest.json", {"name": "phantom", "letters": LETTERS[:4], "subsets": entries})
    partial.rename(out)
    return {"subsets": len(entries), "records": written}


def _release_keys(record: Record) -> dict[str, object]:
    question = record.turns[-1].question
    return {
        "id": int(record.id.rpartition("/")[2]),
        "caption": record.label,
        "image": record.image,
        "Question": question.partition("\n")[0],
        "Answer": record.label,
        "Question-choice": question,
        "Answer-choice": record.answer,
        "data-no": record.data_no,
    }


def _detection_keys(record: Record) -> dict[str, object]:
    height, width = record.size_px
    return {
        "id": int(record.id.rpartition("/")[2]),
        "image": record.image,
        "width": width,
        "height": height,
        "boxes": [{"label": box.label, "bbox": list(box.corners)} for box in record.boxes],
        "data-no": record.data_no,
    }


def _entry(subset: Subset, kind: str) -> dict[str, object]:
    return {
        "subset": subset.name,
        "kind": kind,
        "modality": subset.modality,
        "area": subset.area,
        "task": subset.task,
        "labels": list(subset.labels),
        "train": subset.num_train,
        "test": subset.num_test,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _digest(*values: object) -> str:
    """Of the values and of the code that draws: a change of a formula is a change of the data."""
    digest = hashlib.sha256(repr(values).encode())
    for module in (phantom_world, phantom_images, phantom_text):
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]
