"""Detection subsets of the phantom world: where each lesion of a phantom lies, as boxes and as masks.

For every pair of a modality and an area that has choice subsets there is one, such as "ct-liver-det": new images from
streams of their own, with one to three lesions, whose test images have the poses and cells that the choice subsets
reserve. Its task, "det", is no choice subset's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from medcg_jax.data import boxes
from medcg_jax.data.phantom import PhantomSource
from medcg_jax.data.phantom_images import (
    _STAMPS,
    LESION_SHAPES,
    MAX_LESIONS,
    SIDE_PX,
    SITE_PX,
    Scene,
    draw_scene,
    render,
)
from medcg_jax.data.phantom_world import AREAS, MODALITIES, TRIPLETS, Draws, Triplet
from medcg_jax.data.records import SPLITS, Box, DataError, Record, RecordSet, Split, Subset

TASK, LABEL = "det", "lesion"
DETECTION_TRIPLETS = tuple(Triplet(m, a, TASK) for m, a in dict.fromkeys((t.modality, t.area) for t in TRIPLETS))

# bool[shape, size, placement, 8, 8]: which pixels of an object have at least half its brightness.
_SOLID = _STAMPS >= 0.5


class PhantomBoxSource:
    """The phantom world with its 16 detection subsets; see `records.Source`.

    The choice subsets, their records and `fingerprint` are those of the `PhantomSource` of the same arguments.

    Args:
      seed: of all images and texts.
      train_records, test_records: per subset.
    """

    def __init__(self, seed: int, train_records: int, test_records: int):
        self.choice = PhantomSource(seed, train_records, test_records)
        self.seed, self._sizes = seed, {"train": train_records, "test": test_records}
        self.subsets = self.choice.subsets
        self.detection_subsets = tuple(
            Subset(t.name, t.modality, t.area, t.task, (LABEL,), num_train=train_records, num_test=test_records)
            for t in DETECTION_TRIPLETS
        )
        self._made: dict[tuple[str, Split], RecordSet] = {}

    def records(self, subset: str, split: Split) -> RecordSet:
        """The subset's records, with boxes and masks where it is a detection subset."""
        if subset not in {t.name for t in DETECTION_TRIPLETS}:
            return self.choice.records(subset, split)
        if split not in SPLITS:
            raise DataError(f"split {split!r}; {' or '.join(SPLITS)} is accepted")
        if (subset, split) not in self._made:
            self._made[subset, split] = self._make(Triplet(*subset.split("-")), split)
        return self._made[subset, split]

    def scene(self, subset: str, split: Split) -> Scene:
        """The parameters that the images of these records are drawn from."""
        triplet = Triplet(*subset.split("-"))
        if triplet not in DETECTION_TRIPLETS:
            return self.choice.scene(subset, split)
        return self._scene(triplet, split, self._draws(subset, split))

    def fingerprint(self) -> str:
        """That of the choice subsets."""
        return self.choice.fingerprint()

    def detection_fingerprint(self) -> str:
        """A digest of the choice subsets' one and of the modules that draw and measure boxes."""
        digest = hashlib.sha256(self.fingerprint().encode())
        for path in (__file__, boxes.__file__):
            digest.update(Path(path).read_bytes())
        return digest.hexdigest()[:16]

    def _draws(self, subset: str, split: Split) -> Draws:
        return Draws(f"{self.seed}/{subset}/{split}", np.arange(self._sizes[split]))

    def _scene(self, triplet: Triplet, split: Split, draws: Draws) -> Scene:
        size = len(draws)
        return draw_scene(
            draws,
            modality=np.full(size, MODALITIES.index(triplet.modality)),
            area=np.full(size, AREAS.index(triplet.area)),
            count=1 + np.arange(size) % MAX_LESIONS,
            shape=np.asarray(LESION_SHAPES)[draws.integer(len(LESION_SHAPES))],
            size=draws.integer(2),
            test=split == "test",
        )

    def _make(self, triplet: Triplet, split: Split) -> RecordSet:
        draws = self._draws(triplet.name, split)
        scene = self._scene(triplet, split, draws)
        images = render(scene, draws)
        masks = lesion_masks(scene)
        records = []
        for i, own in enumerate(masks):
            found = tuple(Box(LABEL, *boxes.of_mask(lesion)[0].tolist()) for lesion in own)
            image = f"med-mat/phantom/{triplet.name}/{split}-{i + 1:05d}.png"
            records.append(
                Record(f"{triplet.name}/{split}/{i + 1}", triplet.name, (), image=image, data_no="phantom",
                       boxes=found, size_px=(SIDE_PX, SIDE_PX))
            )  # fmt: skip
        return RecordSet(records, images, masks)


def lesion_masks(scene: Scene) -> list[np.ndarray]:
    """bool[count, 32, 32] per phantom of a scene, any task's: the pixels of each lesion, in reading order of the sites.

    A pixel belongs to a lesion when it has at least half of its brightness.
    """
    side = SIDE_PX // SITE_PX
    found = []
    for i, count in enumerate(scene.count):
        masks = np.zeros((count, SIDE_PX, SIDE_PX), bool)
        for mask, column in zip(masks, np.argsort(scene.site[i, :count]), strict=True):
            row, left = divmod(int(scene.site[i, column]), side)
            stamp = _SOLID[scene.shape[i], scene.size[i], scene.placement[i, column]]
            mask[row * SITE_PX : (row + 1) * SITE_PX, left * SITE_PX : (left + 1) * SITE_PX] = stamp
        found.append(masks)
    return found
