"""What right-sized and packed rows save: in FLOPs at LLaVA-1.5-7B's shapes, and in CPU time of a small model here.

    python -m benchmarks.packing [--root=TREE] [--json=FILE]

Rows have one image and a text as long as a record's of the tree (a Med-MAT tree; without one as long as drawn around 85
tokens), or a part of them no image. Tokens of a text are estimated, since no Llama tokenizer is at hand: see
`estimated_tokens`. The small model's steps are of the same records in rows of both kinds, in turns.
"""

import argparse
import json
import re
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from medcg_jax.bench.steps import about_here
from medcg_jax.config import DataConfig, TrainConfig
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.packing import Packer, RowShape, Sizes, choose, sizes
from medcg_jax.data.records import Record, RecordSet, Turn
from medcg_jax.data.release import ReleaseSource
from medcg_jax.families import build, prompts
from medcg_jax.families.flops import forward, training
from medcg_jax.families.formats import llava
from medcg_jax.families.llava import LlavaConfig, llava15_7b, llava15_bench
from medcg_jax.files import write_whole
from medcg_jax.host import keep_freed_memory
from medcg_jax.mesh import make_mesh, put_batch
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.step import make_step

BATCH, BATCHES, TARGETS, LIMIT = 32, 200, 2, 192
MULTIPLES = (1, 16, 64, 128)
# Of the records in a batch, those without an image.
TEXT_SHARES = (0.0, 0.1, 0.25, 0.5)
MEASURED_SHARES = (0.0, 0.5)
TRAINABLE = ("projector", "decoder")


def estimated_tokens(text: str) -> int:
    """Tokens of an English text, about as Llama's tokenizer makes them; 38 where LLaVA-1.5's system sentence has 34.

    A word counts 1, and 1 more for every five letters behind its seventh; every digit, mark and line break counts 1.
    """
    parts = re.findall(r"[A-Za-z]+|\d|\n|[^\sA-Za-z\d]", text)
    return sum(1 if len(part) <= 7 else 1 + (len(part) - 1) // 5 for part in parts)


def text_lengths(root: str) -> np.ndarray:
    """int[N] tokens of each training record's text in the tree, first token and system sentence included."""
    if not root:
        return np.clip(np.random.default_rng(0).normal(85, 8, 4000).round().astype(np.int64), 64, LIMIT)
    source = ReleaseSource(Path(root), DataConfig(source="release", root=root))
    records = [r for subset in source.subsets for r in source.records(subset.name, "train").records]
    texts = (prompts.template(r.turns, system_prompt="vicuna", has_image=True) for r in records)
    return np.asarray([1 + estimated_tokens(text.replace(prompts.IMAGE, "")) for text in texts])


def with_images(text: np.ndarray, share: float, image_tokens: int) -> Sizes:
    images = (np.random.default_rng(1).random(len(text)) >= share).astype(np.int64)
    return Sizes(text + image_tokens * images, images, np.full(len(text), TARGETS))


def some_batches(count: int) -> np.ndarray:
    """int[BATCHES, BATCH] records: epochs of them, each in an order of its own."""
    rng, epochs = np.random.default_rng(2), -(-BATCHES * BATCH // count)
    return np.concatenate([rng.permutation(count) for _ in range(epochs)])[: BATCHES * BATCH].reshape(BATCHES, BATCH)


def alone(found: Sizes, multiple: int) -> RowShape:
    """A record a row, rows as long as the longest record."""
    return RowShape(BATCH, int(-(-found.length.max() // multiple) * multiple), 1, TARGETS)


def flops_of(config: LlavaConfig, shape: RowShape, *, causal: bool = False) -> float:
    """Executed FLOPs of a step. causal: attention above the diagonal is skipped, between packed records it is not."""
    row = forward(config, length=shape.length, num_images=shape.images, num_logits=shape.targets)
    return shape.rows * training(row, trainable=TRAINABLE, causal=causal)


def cost_of_packed(config: LlavaConfig, batch_size: int, shape: RowShape) -> float:
    """`flops_of`, and without end where no row has two records."""
    return np.inf if shape.rows == batch_size else flops_of(config, shape)


def by_formula(config: LlavaConfig, text: np.ndarray) -> list[dict]:
    """For every share of text alone: the shapes, their FLOPs over those of rows of `LIMIT` text tokens, real tokens."""
    found = []
    for share in TEXT_SHARES:
        every = with_images(text, share, config.num_image_tokens)
        drawn = some_batches(len(text))
        today = RowShape(BATCH, config.num_image_tokens + LIMIT, 1, TARGETS)
        shapes = {"as the limit": today} | {f"multiple of {m}": alone(every, m) for m in MULTIPLES}
        shapes["packed if cheaper"] = choose(every, drawn, unit=1, multiple=16, cost=partial(flops_of, config))
        shapes["packed"] = choose(every, drawn, unit=1, multiple=16, cost=partial(cost_of_packed, config, BATCH))
        real = every.length[drawn].sum() / BATCHES
        for rows_are, shape in shapes.items():
            ratios = {
                name: flops_of(config, shape, causal=causal) / flops_of(config, today, causal=causal)
                for name, causal in (("flops_full", False), ("flops_causal", True))
            }
            place = {"rows": shape.rows, "length": shape.length, "images": shape.images}
            found.append({
                "text_share": share, "rows_are": rows_are, **place, **ratios, "real": real / (shape.rows * shape.length)
            })  # fmt: skip
    return found


# ------------------------------------------------------------------ measured


def random_records(config: LlavaConfig, found: Sizes) -> Encoded:
    """Random records of these sizes."""
    rng, count, longest = np.random.default_rng(3), len(found.length), int(found.length.max())
    usable = min(config.text.vocab_size, config.image_token_id)
    tokens = rng.integers(1, usable, (count, longest), dtype=np.int32)
    image = (np.arange(longest) < config.num_image_tokens) & (found.images[:, None] > 0)
    tokens[image] = config.image_token_id
    positions = (found.length[:, None] - 2 - np.arange(TARGETS)).astype(np.int32)
    side = config.image_size_px
    pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    records = [Record(str(i), "a", (Turn("q", "a"),), image="x" if has else "") for i, has in enumerate(found.images)]
    arrays = {
        "tokens": tokens, "length": found.length.astype(np.int32), "target_positions": positions,
        "targets": np.take_along_axis(tokens, positions + 1, axis=1),
        "target_weights": np.ones_like(positions, np.float32),
    }  # fmt: skip
    return Encoded(RecordSet(records, pixels), llava(side, config.num_image_tokens), arrays, {"pixels": pixels})


class Stepper:
    """A step of one model on batches of one shape; `run` makes one step of each."""

    def __init__(self, config: LlavaConfig, batches: list[dict[str, np.ndarray]]):
        train, mesh = TrainConfig(), make_mesh(devices=jax.devices()[:1])
        graphdef, params = build.create(config, mesh, seed=0)
        places = build.split_trainable(build.shardings(config, mesh), TRAINABLE)
        self._program = make_step(mesh, graphdef, *places, make_optimizer(train))
        trainable, self._frozen = build.split_trainable(params, TRAINABLE)
        self._state = self._program.start(trainable)
        self._hparams = self._program.put_hparams(hparams_from(TrainConfig(steps=10**6), 1))
        self._batches = [put_batch(batch, self._program.batch_sharding) for batch in batches]
        self.losses: list[float] = []

    def run(self) -> tuple[float, float]:
        """(seconds, CPU seconds) of a step on every batch."""
        began, metrics = (time.perf_counter(), time.process_time()), []
        for batch in self._batches:
            self._state, one = self._program(self._state, self._frozen, self._hparams, batch)
            metrics.append(one["loss"])
        self.losses = [float(loss) for loss in metrics]
        return time.perf_counter() - began[0], time.process_time() - began[1]


def measured(text: np.ndarray, *, batch: int = 16, num_batches: int = 1, rounds: int = 5) -> list[dict]:
    """CPU time of packed steps over that of a record a row, on the same records, by the share of text alone.

    Texts are as long beside this model's 64 image tokens as they are beside 576.
    """
    # Rolled layers: one shape in turns with the other, and both compile in a fraction of the time.
    config, found = llava15_bench(4096, 4095, scan_unroll=1), []
    short = np.maximum(text * config.num_image_tokens // llava15_7b().num_image_tokens, TARGETS + 2)
    for share in MEASURED_SHARES:
        own = with_images(short, share, config.num_image_tokens).of(np.arange(batch * num_batches) * 7 % len(short))
        encoded = random_records(config, own)
        drawn = np.arange(batch * num_batches).reshape(num_batches, batch)
        cost = partial(cost_of_packed, config, batch)
        shape = choose(sizes(encoded), drawn, unit=1, multiple=0, cost=cost)
        packer = Packer(encoded, shape)
        both = {
            "alone": Stepper(config, [encoded.rows(indices)[0] for indices in drawn]),
            "packed": Stepper(config, [packer.rows(indices, np.arange(shape.rows))[0] for indices in drawn]),
        }
        first = {name: (stepper.run(), stepper.losses)[1] for name, stepper in both.items()}
        np.testing.assert_allclose(first["packed"], first["alone"], rtol=1e-4)  # of like with like
        taken = {name: [] for name in both}
        for _ in range(rounds):
            for name, stepper in both.items():
                taken[name].append(stepper.run())
        ratios = {
            kind: [p[place] / a[place] for p, a in zip(taken["packed"], taken["alone"], strict=True)]
            for place, kind in enumerate(("wall", "cpu"))
        }
        longest = RowShape(batch, int(own.length.max()), 1, TARGETS)
        formula = flops_of(config, shape) / flops_of(config, longest)
        found.append({
            "text_share": share, "batch": batch, "alone": [longest.rows, longest.length],
            "packed": [shape.rows, shape.length, shape.images], "flops": formula,
            **{kind: {"median": statistics.median(r), "min": min(r), "max": max(r)} for kind, r in ratios.items()},
        })  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", default="", metavar="TREE")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    keep_freed_memory()
    text = text_lengths(args.root)
    quantiles = np.percentile(text, (0, 5, 50, 95, 100)).astype(int).tolist()
    print(f"{len(text)} records, text tokens (estimated): least, 5 %, median, 95 %, most: {quantiles}")
    print(f"LLaVA-1.5-7B, batch {BATCH}, {LIMIT} text tokens as the limit: executed FLOPs of a step")
    formula = by_formula(llava15_7b(), text)
    for one in formula:
        shape = f"{one['rows']:2} x {one['length']:4}, {one['images']} images"
        print(f"  text alone {one['text_share']:4.0%} {one['rows_are']:18} {shape}: {one['real']:6.1%} real, "
              f"{one['flops_full']:.3f} (causal {one['flops_causal']:.3f})")  # fmt: skip
    print("here, packed over a record a row, the same records:")
    steps = measured(text)
    for one in steps:
        cpu = "{median:.2f} of the CPU time ({min:.2f} to {max:.2f})".format(**one["cpu"])
        shapes = f"{one['alone']} -> {one['packed']}"
        print(f"  text alone {one['text_share']:4.0%} {shapes}: {cpu}, {one['flops']:.2f} of the FLOPs")
    if args.json:
        here = about_here()
        about = {"date": here["date"], "versions": here["versions"], "device": here["device"]}
        result = about | {"text_tokens": quantiles, "formula_7b": formula, "measured": steps}
        write_whole(Path(args.json), json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
