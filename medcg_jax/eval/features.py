"""Features of test images, computed once for all parameters that share the frozen parts which make them.

Which parts are frozen is told by what is trained (`frozen_parts`). That two sets of parameters share them is looked up:
they must hold the same arrays. Features are computed by one program, whether they are kept or not, so that keeping them
changes no bit of an answer.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.mesh import batch_sharding, put_batch

# The parts between an image's pixels and the decoder, in order.
PARTS = ("vision", "projector")
# Keys under which a batch holds features in place of images: `encode_images`' result, or `tower_features`'.
IMAGE_FEATURES, TOWER_FEATURES = "image_features", "tower_features"
GIB = 1 << 30


def frozen_parts(trainable: Sequence[str]) -> tuple[str, ...]:
    """Those of `PARTS` that a training leaves as they are, up to the first that it changes.

    Example: of a training of projector and decoder ("vision",); of adapters both; of the tower ().
    """
    return tuple(itertools.takewhile(lambda part: part not in trainable, PARTS))


def image_input(model, batch: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a model's `hidden`: the images of a batch, or the features that it holds in their place."""
    if IMAGE_FEATURES in batch:
        return {"image_features": batch[IMAGE_FEATURES]}
    if TOWER_FEATURES in batch:
        return {"image_features": model.project_features(batch[TOWER_FEATURES])}
    return {"images": {key: batch[key] for key in model.image_keys}}


class FeatureStore:
    """Makes the features of batches of images, and keeps them on the devices, each row where its batch has it.

    trainable: parts that the trainings change. Where the projector is among them, the tower's features are made and
      kept, and every program projects them itself; where the tower is, none are kept.
    limit_bytes: of kept features, on each device. Those that were not used for the longest time are dropped beyond it.
    """

    def __init__(self, mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, trainable: Sequence[str], limit_bytes: float):
        self._mesh, self._limit_bytes = mesh, limit_bytes
        self._parts = frozen_parts(trainable)
        of_tower = self._parts == PARTS[:1]
        self.name = TOWER_FEATURES if of_tower else IMAGE_FEATURES

        def encode(params, images):
            model = nnx.merge(graphdef, params)
            images = {key: images[key] for key in model.image_keys}
            return model.tower_features(images) if of_tower else model.encode_images(images)

        sharding = batch_sharding(mesh)
        self._encode = jax.jit(encode, in_shardings=(shardings, sharding), out_shardings=sharding)
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._made_by: list[jax.Array] = []
        self._bytes = 0

    def make(self, params, images: dict[str, np.ndarray]) -> dict[str, Any]:
        """{`name`: the features of a batch of images}, to stand in a batch in place of the images.

        images: this process's rows of a format's images.
        """
        with jax.set_mesh(self._mesh):
            return {self.name: self._encode(params, put_batch(images, batch_sharding(self._mesh)))}

    def get(self, params, key: Hashable | None, images: Callable[[], dict[str, np.ndarray]]) -> dict[str, Any]:
        """As `make`, from what is kept under `key` if there is any; `images` is called otherwise.

        key: names the images of the batch, whatever the parameters; None: nothing is kept.
        """
        if key is None or not self._parts or not self._limit_bytes:
            return self.make(params, images())
        made_by = [leaf for part in self._parts for leaf in jax.tree.leaves(params[part])]
        if len(made_by) != len(self._made_by) or any(a is not b for a, b in zip(made_by, self._made_by, strict=True)):
            self.clear()
            self._made_by = made_by
        if key not in self._kept:
            features = self.make(params, images())
            size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(features))
            self._kept[key] = features, size
            self._bytes += size
        self._kept.move_to_end(key)
        features = self._kept[key][0]
        while self._bytes > self._limit_bytes:
            self._bytes -= self._kept.popitem(last=False)[1][1]
        return features

    def clear(self) -> None:
        """Drops all features, and what they were made by."""
        self._kept.clear()
        self._made_by, self._bytes = [], 0
