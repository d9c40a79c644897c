"""A model small enough to compile in seconds, batches of random tokens, and streams of them, for tests of training."""

import functools

import jax
import numpy as np
import pytest

from medcg_jax.config import MeshConfig, TrainConfig
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh
from medcg_jax.train.optim import make_optimizer, stack_hparams
from medcg_jax.train.step import make_step

IMAGE_ID, VOCAB = 39, 40
CONFIG = llava15_tiny(
    VOCAB, IMAGE_ID, image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=32,
    scan_unroll=1,
)  # fmt: skip
ROWS, LENGTH, TARGETS = 8, 16, 3
TRAINABLE = ("projector", "decoder")
TRAIN = TrainConfig(learning_rate=1e-2, steps=10, batch_size=ROWS, weight_decay=0.1)


def batch(seed: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows of different lengths with one image and one to three supervised positions."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, LENGTH + 1, rows)
    segment_ids = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(3, IMAGE_ID, (rows, LENGTH)).astype(np.int32) * segment_ids
    tokens[:, 1 : 1 + CONFIG.num_image_tokens] = IMAGE_ID
    counts = rng.integers(1, TARGETS + 1, rows)
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "pixels": rng.integers(0, 256, (rows, 1, 16, 16, 3)).astype(np.uint8),
        "target_positions": (lengths[:, None] - 2 - np.arange(TARGETS)).astype(np.int32),
        "targets": rng.integers(3, IMAGE_ID, (rows, TARGETS)).astype(np.int32),
        "target_weights": (np.arange(TARGETS) < counts[:, None]).astype(np.float32),
    }


def others_long(names) -> list:
    """Parameters of a test: the first name in every run, the others where long tests are run."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.long) for name in others)]


class Stream:
    """Endless batches: number n is `batch(seed + n)`, of the records "n/0", "n/1", ..."""

    def __init__(self, position: int, seed: int = 0, change=lambda position, batch: batch):
        self.position, self._seed, self._change = position, seed, change
        self.closed = False

    def __next__(self):
        drawn = self._change(self.position, batch(self._seed + self.position))
        self.position += 1
        return drawn, [f"{self.position - 1}/{row}" for row in range(ROWS)]

    def close(self):
        self.closed = True


@functools.cache
def setup(
    mesh_config: MeshConfig | None = None,
    *,
    config=CONFIG,
    num_cells=1,
    train=TRAIN,
    trainable=TRAINABLE,
    rows=(),
    **fields,
):
    """(program, trainable, frozen) on one device, or on a mesh of all eight; made once for all tests of a process.

    rows: as of `make_optimizer`.
    """
    devices = jax.devices()[:1] if mesh_config is None else None
    mesh = make_mesh(mesh_config or MeshConfig(), devices)
    graphdef, params = build.create(config, mesh, seed=0)
    places = build.split_trainable(build.shardings(config, mesh), trainable)
    program = make_step(mesh, graphdef, *places, make_optimizer(train, rows), num_cells=num_cells, **fields)
    return program, *build.split_trainable(params, trainable)


def run(program, trainable, frozen, all_hparams, steps: int, *, seeds=None, state=None):
    """(state, metrics of every step as numpy) after so many steps; cell i has the batches of seeds[i]."""
    many = program.num_cells > 1
    seeds = seeds or [100 * i for i in range(len(all_hparams))]
    hparams = program.put_hparams(stack_hparams(all_hparams) if many else all_hparams[0])
    state = program.start(trainable) if state is None else state
    metrics = []
    for step in range(steps):
        rows = [batch(seed + step) for seed in seeds]
        whole = {key: np.stack([b[key] for b in rows]) for key in rows[0]} if many else rows[0]
        state, found = program(state, frozen, hparams, jax.device_put(whole, program.batch_sharding))
        metrics.append(jax.device_get(found))
    return state, {key: np.stack([m[key] for m in metrics]) for key in metrics[0]}


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
