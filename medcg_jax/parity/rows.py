"""Tools of every parity check: comparisons and their report, the layers of a stack, example token ids."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from medcg_jax.families.weights.files import WeightsError

# Largest allowed difference, as a share of the reference's largest value.
TOLERANCE = 1e-4
# The tolerance may grow to this many times the reference's own change when its weights are rounded differently, up to a
# maximum that still shows faults.
NOISE_FACTOR, MAX_TOLERANCE = 8.0, 1e-2
# Prefix of the stages that run with other weights (`weights.telling`).
TELLING = "telling weights: "
# Notes printed at most; a large model may have one for each layer.
MOST_NOTES = 2


@dataclass(frozen=True)
class Row:
    """One comparison: `difference` is the largest difference, `scale` the reference's largest value.

    floor: the least scale for the allowed difference. 0: the difference is always relative to the scale, so that numbers
      of order 0.01, which random weights give, hide no fault.
    """

    stage: str
    difference: float
    scale: float
    tolerance: float = TOLERANCE
    floor: float = 0.0

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance * max(self.floor, self.scale)

    @property
    def share(self) -> float:
        """The difference as a share of the scale."""
        scale = max(self.floor, self.scale)
        return self.difference / scale if scale else math.inf if self.difference else 0.0


def compared(stage: str, ours, theirs, *, floor: float = 0.0) -> Row:
    """The comparison of two arrays.

    Raises:
      WeightsError: they have different shapes.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise WeightsError(f"{stage}: shape {ours.shape} here, {theirs.shape} in the reference")
    difference = float(np.abs(ours - theirs).max()) if ours.size else 0.0
    # A NaN on either side is an infinite difference.
    scale = float(np.abs(theirs).max()) if theirs.size else 0.0
    return Row(stage, math.inf if math.isnan(difference) else difference, scale, floor=floor)


def judged(rows: list[Row], noise: dict[str, Row]) -> list[Row]:
    """`rows`, where those that differ get the tolerance that the reference's rounding needs.

    noise: stage -> the reference compared with itself under weights rounded differently.
    """

    def widened(row: Row) -> Row:
        moved = noise.get(row.stage)
        if row.ok or moved is None or not moved.scale:
            return row
        return replace(
            row, tolerance=max(row.tolerance, min(MAX_TOLERANCE, NOISE_FACTOR * moved.difference / moved.scale))
        )

    return [widened(row) for row in rows]


def exactly(stage: str, ours, theirs) -> Row:
    """A row whose difference is 1 where any number differs, else 0."""
    return Row(stage, float(not np.array_equal(ours, theirs)), 1.0)


def report(src: Path, rows: list[Row], notes: list[str]) -> dict:
    """{"ok", "src", "rows", "notes", "first", "exit_status"} of `rows`, printed part by part.

    first: the first stage that differs, in the order of the computation. exit_status: 1 where a row differs.
    """
    wrong = [row for row in in_order(rows) if not row.ok]
    parts: dict[str, list[Row]] = {}
    for row in in_order(rows):
        parts.setdefault(part_of(row.stage), []).append(row)
    width = max(map(len, parts))
    print(f"{'part':<{width}}  arrays  difference  where it is largest")
    for name, of_part in parts.items():
        worst = max(of_part, key=lambda row: (not row.ok, row.share / row.tolerance))
        verdict = "ok" if all(row.ok for row in of_part) else f"{sum(not row.ok for row in of_part)} DIFFER"
        print(f"{name:<{width}}  {len(of_part):6}  {worst.share:10.1e}  {worst.stage.removeprefix(TELLING)}: {verdict}")
    print("difference: the largest between two numbers, as a share of the largest number of the reference's array")
    if any(row.stage.startswith(TELLING) for row in rows):
        print("telling weights: those above hide faults where biases are 0, norms 1 or gates shut; these hide none")
    for note in notes[:MOST_NOTES]:
        print(note)
    if len(notes) > MOST_NOTES:
        print(f"and {len(notes) - MOST_NOTES} notes more, which --json=FILE writes with every array")
    tolerance = max(row.tolerance for row in rows)
    if wrong:
        tensors = [row.stage.removeprefix("weight ") for row in wrong if row.stage.startswith("weight ")]
        if tensors:
            more = f" and {len(tensors) - 16} more" if len(tensors) > 16 else ""
            print(f"tensors that differ: {', '.join(tensors[:16])}{more}")
        print(
            f"NOT equal within {tolerance:g}: {len(wrong)} of {len(rows)} arrays differ; the first: {wrong[0].stage}, "
            f"{wrong[0].difference:.2e} of {wrong[0].scale:.3g}"
        )
    else:
        worst = max(rows, key=lambda row: row.share / row.tolerance)
        print(
            f"equal within {tolerance:g}: {len(rows)} arrays; the largest difference: {worst.stage}, {worst.share:.1e}"
        )
    return {
        "ok": not wrong,
        "src": str(src),
        "rows": [{**vars(row), "ok": row.ok} for row in rows],
        "notes": notes,
        "first": wrong[0].stage if wrong else None,
        "exit_status": 1 if wrong else 0,
    }


def part_of(stage: str) -> str:
    """The part of a model that a stage belongs to, in words."""
    under = "telling weights: " if stage.startswith(TELLING) else ""
    stage = stage.removeprefix(TELLING)
    if stage.startswith("weight"):
        return "weights"
    if stage.startswith("gradient "):
        return f"{under}gradients"
    if stage.startswith("loss before"):
        return "loss along a curve"
    head = re.sub(r"[_ ]?\d+$", "", stage.partition(".")[0])
    return under + {"vision": "vision tower", "embed": "decoder"}.get(head, head)


def in_order(rows: list[Row]) -> list[Row]:
    """`rows` in the order of the computation: outputs, outputs under other weights, gradients and curve, weights."""

    def rank(row: Row) -> int:
        if row.stage.startswith("weight"):
            return 3
        stage = row.stage.removeprefix(TELLING)
        return 2 if stage.startswith(("gradient", "loss before")) else int(stage != row.stage)

    return sorted(rows, key=rank)


# ------------------------------------------------------------------ layers and example inputs


def layers(blocks: nnx.Module):
    """Yields the modules of a stack."""
    graphdef, params = nnx.split(blocks)
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        yield nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], params))


def text_ids(rng: np.random.Generator, shape, num: int, special: set[int]) -> np.ndarray:
    """int64[shape] random ids from 0 to `num` - 1 without `special`."""
    return rng.choice([i for i in range(num) if i not in special], shape).astype(np.int64)


def placed(ids: dict[str, int], num: int) -> dict[str, int]:
    """New ids for those of `ids` that are beyond a table of `num` rows or occur twice: free rows from the table's end.

    The config of a tiny model often has the released ids, which its small table lacks.
    """
    taken = {i for i in ids.values() if 0 <= i < num}
    free = (i for i in reversed(range(num)) if i not in taken)
    seen, moved = set(), {}
    for name, i in ids.items():
        if not 0 <= i < num or i in seen:
            moved[name] = next(free)
        seen.add(i)
    return moved


def example_text(
    rng: np.random.Generator, *, num_text: int, num_rows: int, pad_id: int, inserted: list[tuple[int, slice]],
    special: set[int],
) -> dict[str, np.ndarray]:  # fmt: skip
    """input_ids, attention_mask and labels, int64[2, T], of `num_text` random tokens and the `inserted` ones.

    The second row ends in padding. Labels begin after the first third of the text behind the inserted tokens.
    num_rows: of the embedding. inserted: (id, slice of every row), in order.
    special: ids that are no text. Nor is `pad_id`: torch gives its row of the embedding no gradient.
    """
    lengths = [span.stop - span.start for _, span in inserted]
    ids = text_ids(rng, (2, num_text + sum(lengths)), num_rows, special | {pad_id})
    for token_id, span in inserted:
        ids[:, span] = token_id
    mask = np.ones_like(ids)
    mask[1, -num_text // 3 :] = 0
    ids[mask == 0] = pad_id if 0 <= pad_id < num_rows and pad_id not in special else ids[0, 0]
    labels = np.where(mask == 1, ids, -100)
    labels[:, : inserted[-1][1].stop + num_text // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def moved_ids(ids: dict[str, int], num: int) -> tuple[dict[str, Any], list[str]]:
    """(`placed`, a note for each new id)."""
    moved: dict[str, Any] = dict(placed(ids, num))
    return moved, [
        f"{name}={ids[name]} is no row of its own in the embedding: {i} is used" for name, i in moved.items()
    ]


def run_layers(stages: dict, name: str, blocks, step, x):
    """The stack's output for `x`; every layer's output goes to `stages` as f"{name}{i}". step: jitted (block, x) -> x."""
    for i, block in enumerate(layers(blocks)):
        x = stages[f"{name}{i}"] = step(block, x)
    return x


def norm_and_logits(model: nnx.Module, given: dict) -> tuple[jax.Array, jax.Array]:
    """(the decoder's normed output, logits) by the model's own path, traced again in every call."""

    def whole(model, given):
        hidden, _ = model.hidden(**given)
        return hidden, model.logits(hidden)

    return jax.jit(whole)(model, given)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises:
      WeightsError: it is missing, or no .npz file of arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is no readable .npz file: {error}") from error


def check_arrays(path: Path, stored: Iterable[str], expected: Iterable[str]) -> None:
    """Raises WeightsError where the file `path` lacks an array, or has one that is compared with nothing."""
    stored, expected = set(stored), set(expected)
    if stored != expected:
        raise WeightsError(
            f"{path} lacks {sorted(expected - stored)[:8]}; nothing is compared with {sorted(stored - expected)[:8]}"
        )
