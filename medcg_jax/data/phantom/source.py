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

from medcg_jax.config import PHANTOM_RULES
from medcg_jax.data import boxes
from medcg_jax.data.phantom import images, pretraining, world
from medcg_jax.data.phantom.images import SIDE_PX, Scene, draw_scene, object_masks, render
from medcg_jax.data.phantom.world import DETECTION_TASK, QUESTION, TASKS, TRIPLETS, Draws, Triplet, choice_turn
from medcg_jax.data.records import LETTERS, SPLITS, Box, DataError, Record, RecordSet, Source, Split, Subset

# There is no end of phantoms: so many where "all" test records are wanted.
PHANTOM_TEST_RECORDS = 300
LESION = "lesion"
DETECTION_TRIPLETS = tuple(
    Triplet(modality, area, DETECTION_TASK) for modality, area in dict.fromkeys((t.modality, t.area) for t in TRIPLETS)
)
# Kinds of images. EASY: every object has the label's value in every property. NO_AREA: all quadrants are alike, so the
# area does not matter. NO_MODALITY: the objects of the area's quadrant have the label's value in every property. HARD:
# the label is in one property of one quadrant; everything else is a decoy.
EASY, NO_AREA, NO_MODALITY, HARD = range(4)
# Of training images with decoys; such test images are all HARD.
KIND_ODDS = (0.34, 0.28, 0.28, 0.1)


class PhantomSource:
    """The phantom world's 32 choice and 16 detection subsets, made in memory when asked for; see `records.Source`.

    Args:
      seed: of all images and texts.
      train_records, test_records: per subset, labels balanced (exactly, where the number is even).
      decoys, rule: `DataConfig.phantom_decoys` and `phantom_rule`.
    """

    def __init__(
        self,
        seed: int,
        train_records: int = 300,
        test_records: int = PHANTOM_TEST_RECORDS,
        *,
        decoys: float = 1.0,
        rule: str = "shared",
    ):
        self.seed, self._sizes = seed, {"train": train_records, "test": test_records}
        self.decoys, self.rule = decoys, rule
        if rule not in PHANTOM_RULES or not 0 <= decoys <= 1:
            raise DataError(f"rule={rule!r}, decoys={decoys}: expected {' or '.join(PHANTOM_RULES)}, and 0 to 1")
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
        triplet, draws = Triplet(*subset.split("-")), self._draws(subset, split)
        if triplet.task == DETECTION_TASK:
            return self._detection_scene(triplet, split, draws)
        return self._scene(triplet, split, draws)[0]

    def fingerprint(self) -> str:
        """A digest of the seed, the sizes and the modules that draw and write the records."""
        return self._digest()

    def detection_fingerprint(self) -> str:
        """The same of the records with boxes."""
        return self._digest(boxes.__file__)

    def _digest(self, *files: str) -> str:
        """Of the code that draws, too: a change of a formula is a change of the data."""
        drawn_from = (self.seed, sorted(self._sizes.items()), self.decoys, self.rule)
        digest = hashlib.sha256(repr(drawn_from).encode())
        for file in (world.__file__, images.__file__, pretraining.__file__, __file__, *files):
            digest.update(Path(file).read_bytes())
        return digest.hexdigest()[:16]

    def _subset(self, triplet: Triplet, labels: tuple[str, ...]) -> Subset:
        counts = {f"num_{split}": size for split, size in self._sizes.items()}
        return Subset(triplet.name, *triplet, labels, **counts)

    def _draws(self, subset: str, split: Split) -> Draws:
        return Draws(f"{self.seed}/{subset}/{split}", np.arange(self._sizes[split]))

    def _scene(self, triplet: Triplet, split: Split, draws: Draws) -> tuple[Scene, np.ndarray]:
        """(scene, kind int[N] of each image); see `KIND_ODDS`."""
        size, (m, a, _) = len(draws), triplet.indices
        label = np.arange(size) % 2
        # The order of the draws is what the images are: a scene without one of them is another scene.
        values, which, has_decoys = draws.integer(2, 4, 4), draws.uniform(), draws.uniform() < self.decoys
        kind = np.searchsorted(np.cumsum(KIND_ODDS)[:-1], which, side="right") if split == "train" else HARD
        kind = np.where(has_decoys, kind, EASY)
        prop, quadrant, value = m, a, label
        if self.rule == "drawn":
            prop, quadrant, flip = Draws(f"{self.seed}/{triplet.name}/rule", np.zeros(1, int)).integer(4, 3)[0]
            value = label ^ (flip % 2)
        values[kind == EASY] = value[kind == EASY, None, None]
        values[kind == NO_AREA] = values[kind == NO_AREA, :1]
        values[kind == NO_AREA, :, prop] = value[kind == NO_AREA, None]
        values[kind == NO_MODALITY, quadrant] = value[kind == NO_MODALITY, None]
        values[kind == HARD, quadrant, prop] = value[kind == HARD]
        places = {"modality": np.full(size, m), "area": np.full(size, a)}
        return draw_scene(draws, **places, values=values, test=split == "test"), kind

    def _choice_records(self, triplet: Triplet, split: Split) -> RecordSet:
        draws = self._draws(triplet.name, split)
        scene, kind = self._scene(triplet, split, draws)
        pictures, labels = render(scene, draws), TASKS[triplet.task]
        flipped, filler, words = (draws.integer(2), draws.integer(pretraining.NUM_FILLERS), pretraining.fillers())
        records = []
        for i in range(len(draws)):
            modality = words[filler[i]] if kind[i] == NO_MODALITY else triplet.modality
            area = words[filler[i]] if kind[i] == NO_AREA else triplet.area
            question = QUESTION.format(modality=modality, area=area, task=triplet.task)
            options = labels[::-1] if flipped[i] else labels
            turn = choice_turn(question, options, labels[i % 2])
            records.append(
                Record(*_names(triplet, split, i), (turn,), options, turn.answer, _image(triplet, split, i), "phantom")
            )
        return RecordSet(records, pictures)

    def _detection_scene(self, triplet: Triplet, split: Split, draws: Draws) -> Scene:
        """Lesions are the objects of the area's quadrant, with value 1 in the modality's property."""
        size, (m, a, _) = len(draws), triplet.indices
        values = draws.integer(2, 4, 4)
        values[:, a, m] = 1
        places = {"modality": np.full(size, m), "area": np.full(size, a)}
        return draw_scene(draws, **places, values=values, test=split == "test")

    def _detection_records(self, triplet: Triplet, split: Split) -> RecordSet:
        draws = self._draws(triplet.name, split)
        scene = self._detection_scene(triplet, split, draws)
        pictures, masks = render(scene, draws), object_masks(scene, scene.area)
        records = []
        for i, lesions in enumerate(masks):
            lesion_boxes = tuple(Box(LESION, *boxes.of_mask(lesion)[0].tolist()) for lesion in lesions)
            image, size_px = _image(triplet, split, i), (SIDE_PX, SIDE_PX)
            records.append(
                Record(
                    *_names(triplet, split, i), (), image=image, data_no="phantom", boxes=lesion_boxes, size_px=size_px
                )
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
