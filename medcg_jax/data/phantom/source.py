"""The embedded world of phantoms as a source of records, and the same as files.

A seed draws the images of all splits; training, test and pre-training come from streams of their own, and test images
from reserved poses and cells of placement and amplitude (`world`) that nothing else is drawn from. For every pair of a
modality and an area that has choice subsets there is a detection subset, such as "ct-liver-det": new images from
streams of their own, with one to three lesions. Its task, "det", is no choice subset's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from medcg_jax.data import boxes
from medcg_jax.data.phantom import images, world
from medcg_jax.data.phantom.images import LESION_SHAPES, MAX_LESIONS, SIDE_PX, Scene, draw_scene, lesion_masks, render
from medcg_jax.data.phantom.world import AREAS, MODALITIES, TASKS, TEMPLATES, TRIPLETS, Draws, Triplet, choice_turn
from medcg_jax.data.records import LETTERS, SPLITS, Box, DataError, Record, RecordSet, Source, Split, Subset

# There is no end of phantoms: so many where "all" test records are wanted.
PHANTOM_TEST_RECORDS = 300
DETECTION_TASK, LESION = "det", "lesion"
DETECTION_TRIPLETS = tuple(
    Triplet(modality, area, DETECTION_TASK) for modality, area in dict.fromkeys((t.modality, t.area) for t in TRIPLETS)
)


class PhantomSource:
    """The phantom world's 32 choice and 16 detection subsets, made in memory when asked for; see `records.Source`.

    Args:
      seed: of all images and texts.
      train_records, test_records: per subset, labels balanced (exactly, where the number is a multiple of theirs).
    """

    def __init__(self, seed: int, train_records: int = 300, test_records: int = PHANTOM_TEST_RECORDS):
        self.seed, self._sizes = seed, {"train": train_records, "test": test_records}
        for split, size in self._sizes.items():
            if size < 1:
                raise DataError(f"{split}_records={size}; 1 or more is accepted")
        self.subsets = tuple(self._subset(t, TASKS[t.task]) for t in TRIPLETS)
        self.detection_subsets = tuple(self._subset(t, (LESION,)) for t in DETECTION_TRIPLETS)
        self._made: dict[tuple[str, Split], RecordSet] = {}

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records, with boxes and masks where it is a detection subset; see `records.Source`."""
        if split not in SPLITS:
            raise DataError(f"split {split!r}; {' or '.join(SPLITS)} is accepted")
        names = [triplet.name for triplet in (*TRIPLETS, *DETECTION_TRIPLETS)]
        if subset not in names:
            raise DataError(f"subset {subset!r} is not in the phantom world; it has {', '.join(names)}")
        if (subset, split) not in self._made:
            triplet = Triplet(*subset.split("-"))
            make = self._detection_records if triplet.task == DETECTION_TASK else self._choice_records
            self._made[subset, split] = make(triplet, split)
        return self._made[subset, split]

    def scene(self, subset: str, split: Split) -> Scene:
        """The parameters that the images of these records are drawn from."""
        return self._scene(Triplet(*subset.split("-")), split, self._draws(subset, split))

    def fingerprint(self) -> str:
        """A digest of the seed, the sizes and the modules that draw and write the records."""
        return self._digest()

    def detection_fingerprint(self) -> str:
        """The same of the records with boxes."""
        return self._digest(boxes.__file__)

    def _digest(self, *files: str) -> str:
        """Of the code that draws, too: a change of a formula is a change of the data."""
        digest = hashlib.sha256(repr((self.seed, sorted(self._sizes.items()))).encode())
        for file in (world.__file__, images.__file__, __file__, *files):
            digest.update(Path(file).read_bytes())
        return digest.hexdigest()[:16]

    def _subset(self, triplet: Triplet, labels: tuple[str, ...]) -> Subset:
        counts = {f"num_{split}": size for split, size in self._sizes.items()}
        return Subset(triplet.name, *triplet, labels, **counts)

    def _draws(self, subset: str, split: Split) -> Draws:
        return Draws(f"{self.seed}/{subset}/{split}", np.arange(self._sizes[split]))

    def _scene(self, triplet: Triplet, split: Split, draws: Draws) -> Scene:
        size = len(draws)
        # The order of the draws is what the images are: a scene without one of them is another scene.
        if triplet.task == DETECTION_TASK:
            count = 1 + np.arange(size) % MAX_LESIONS
            shape, lesion_size = draws.integer(len(LESION_SHAPES)), draws.integer(2)
        else:
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

    def _choice_records(self, triplet: Triplet, split: Split) -> RecordSet:
        draws = self._draws(triplet.name, split)
        pictures = render(self._scene(triplet, split, draws), draws)
        labels, templates = TASKS[triplet.task], TEMPLATES[triplet.task]
        orders, which = draws.order(len(labels)), draws.integer(len(templates))
        records = []
        for i, (order, template) in enumerate(zip(orders.tolist(), which.tolist(), strict=True)):
            question = templates[template].format(modality=triplet.modality, area=triplet.area)
            options = tuple(labels[k] for k in order)
            turn = choice_turn(question, options, labels[i % len(labels)])
            records.append(
                Record(*_names(triplet, split, i), (turn,), options, turn.answer, _image(triplet, split, i), "phantom")
            )
        return RecordSet(records, pictures)

    def _detection_records(self, triplet: Triplet, split: Split) -> RecordSet:
        draws = self._draws(triplet.name, split)
        scene = self._scene(triplet, split, draws)
        pictures, masks = render(scene, draws), lesion_masks(scene)
        records = []
        for i, lesions in enumerate(masks):
            found = tuple(Box(LESION, *boxes.of_mask(lesion)[0].tolist()) for lesion in lesions)
            size = (SIDE_PX, SIDE_PX)
            image = _image(triplet, split, i)
            records.append(
                Record(*_names(triplet, split, i), (), image=image, data_no="phantom", boxes=found, size_px=size)
            )
        return RecordSet(records, pictures, masks)


def _names(triplet: Triplet, split: Split, place: int) -> tuple[str, str]:
    """(id, subset) of a record."""
    return f"{triplet.name}/{split}/{place + 1}", triplet.name


def _image(triplet: Triplet, split: Split, place: int) -> str:
    return f"med-mat/phantom/{triplet.name}/{split}-{place + 1:05d}.png"


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
