"""TensorFlow Datasets' `med_mat`: the records of a prepared folder for users of TFDS. Needs no TensorFlow.

    from medcg_jax.data.tfds_builder import build
    train = build(prepared, "04", data_dir).as_data_source("train")     # random access; feeds grain.MapDataset.source
    record, image = record_of(train[0])

One configuration per subset, and `all`. Files are ArrayRecord, in the order of the prepared records. Images are bytes
of PNG: TFDS's own `Image` feature imports TensorFlow when it writes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from medcg_jax.config import DataConfig
from medcg_jax.data.prepared import PreparedSource
from medcg_jax.data.records import SPLITS, Box, DataError, Record, Split, Turn
from medcg_jax.data.tree import subset_table

ALL = "all"
_PNG = "PNG of the prepared image, 8 bits, RGB or grey"


class MedMat(tfds.core.GeneratorBasedBuilder):
    """Med-MAT: multiple-choice questions and boxes on medical images of 53 modality-area-task triplets."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "the records of a folder prepared by medcg"}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=number, description=", ".join(triplet))
        for number, triplet in sorted(subset_table().items())
    ] + [tfds.core.BuilderConfig(name=ALL, description="every subset of the prepared folder")]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the folder that `medcg data prepare ROOT OUT` wrote."

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="https://huggingface.co/datasets/FreedomIntelligence/Med-MAT",
            features=tfds.features.FeaturesDict(
                {
                    **dict.fromkeys(("id", "subset", "data_no", "group", "modality", "area", "task"), text),
                    "image": tfds.features.Text(doc=_PNG),
                    "image_path": text,
                    "turns": tfds.features.Sequence({"question": text, "answer": text}),
                    "options": tfds.features.Sequence(text),
                    "answer": text,
                    "boxes": tfds.features.Sequence(
                        {"label": text, "corners_px": tfds.features.Tensor(shape=(4,), dtype=np.float64)}
                    ),
                    "size_px": tfds.features.Tensor(shape=(2,), dtype=np.int32),
                }
            ),
            # The order of the records is the study's own.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[Split, Iterator]:
        source = PreparedSource(dl_manager.manual_dir, DataConfig(train_records_per_subset=2**40))
        subsets = (*source.subsets, *source.detection_subsets)
        name = self.builder_config.name
        chosen = [subset for subset in subsets if name in (subset.name, ALL)]
        if not chosen:
            raise DataError(f"config {name!r}; expected {', '.join(s.name for s in subsets)} or {ALL} of this folder")
        return {split: self._generate_examples(source, chosen, split) for split in SPLITS}

    def _generate_examples(self, source: PreparedSource, subsets, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for subset in subsets:
            records = source.records(subset.name, split)
            for index, record in enumerate(records.records):
                yield number, _example(record, subset, records.image(index) if record.image else None)
                number += 1


def build(prepared: str | Path, config: str, data_dir: str | Path) -> MedMat:
    """The builder of one subset, or of "all"; writes its files below `data_dir` if they do not exist.

    Raises:
      DataError: the folder is not prepared, or lacks the subset.
    """
    known = {builder_config.name for builder_config in MedMat.BUILDER_CONFIGS}
    builder_config = (
        config if config in known else tfds.core.BuilderConfig(name=config, description="a subset of the user's own")
    )
    builder = MedMat(config=builder_config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(manual_dir=prepared)
    )
    return builder


def record_of(example: dict[str, Any]) -> tuple[Record, np.ndarray | None]:
    """The record and its image, uint8[h, w, 3] (None without one), of an example of `as_data_source`."""
    turns, boxes = example["turns"], example["boxes"]
    record = Record(
        id=example["id"].decode(),
        subset=example["subset"].decode(),
        turns=tuple(Turn(q.decode(), a.decode()) for q, a in zip(turns["question"], turns["answer"], strict=True)),
        options=tuple(option.decode() for option in example["options"]),
        answer=example["answer"].decode(),
        image=example["image_path"].decode(),
        data_no=example["data_no"].decode(),
        group=example["group"].decode(),
        boxes=tuple(
            Box(label.decode(), *corners.tolist())
            for label, corners in zip(boxes["label"], boxes["corners_px"], strict=True)
        ),
        size_px=tuple(example["size_px"].tolist()),
    )
    if not example["image"]:
        return record, None
    with Image.open(io.BytesIO(example["image"])) as image:
        return record, np.asarray(image.convert("RGB"))


def _example(record: Record, subset, image: np.ndarray | None) -> dict[str, Any]:
    encoded = io.BytesIO()
    if image is not None:
        Image.fromarray(image).save(encoded, "PNG")
    return {
        "id": record.id,
        "subset": record.subset,
        "data_no": record.data_no,
        "group": record.group,
        "modality": subset.modality,
        "area": subset.area,
        "task": subset.task,
        "image": encoded.getvalue(),
        "image_path": record.image,
        "turns": [{"question": turn.question, "answer": turn.answer} for turn in record.turns],
        "options": list(record.options),
        "answer": record.answer,
        "boxes": [{"label": box.label, "corners_px": np.array(box.corners, np.float64)} for box in record.boxes],
        "size_px": np.array(record.size_px, np.int32),
    }
