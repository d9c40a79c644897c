"""Answers with boxes and masks: generation and parsing.

An answer is greedily generated text. MiniGPT-v2's boxes are in the text. NExT-Chat's boxes are decoded from the hidden
state at each generated `<at>`, and so are its masks, if its mask parts were trained.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from medcg_jax.data.boxes import corners
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import eval_order
from medcg_jax.data.tokenizer import Tokenizer
from medcg_jax.eval.boxes import DICE_DECIMALS, BoxAnswer, dice, rounded
from medcg_jax.eval.generation import greedy, prefill
from medcg_jax.eval.letters import on_devices
from medcg_jax.mesh import batch_sharding, replicated

# A pixel belongs to a mask if its logit is above this: NExT-ChatV/NExT-Chat:mllm/demo/demo_util.py:de_transform_mask at
# 1e6c20f.
MASK_THRESHOLD = 0.0


def make_locator(
    mesh: Mesh, graphdef: nnx.GraphDef, shardings, *, eos_id: int, max_new_tokens: int, masks: bool = False
) -> Callable:
    """The compiled function (params, batch, features) -> arrays that answers questions about boxes; as an `Evaluator`.

    Its arrays by name: `tokens` int32[B, max_new_tokens]; for a model whose cache keeps boxes also `boxes`
    float32[B, N, 4] in the model's coordinates, and their number `count` int32[B]; with `masks` also mask logits
    `masks` float32[B, N, s, s] at a quarter of SAM's size.
    shardings: NamedSharding of each parameter.
    """

    def answer(params, batch):
        model = nnx.merge(graphdef, params)
        logits, cache = prefill(model, batch, max_new_tokens - 1)
        tokens, cache = greedy(model, logits, cache, num_new=max_new_tokens, eos_id=eos_id)
        answers = {"tokens": tokens}
        if hasattr(model, "generated_boxes"):
            boxes, is_box = model.generated_boxes(cache)
            answers |= {"boxes": boxes, "count": is_box.sum(axis=1)}
        if masks:
            answers["masks"] = model.masks(cache["at_hidden"], model.encode_sam_images(batch))[0]
        return answers

    jitted = jax.jit(answer, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))

    def run(params, batch: dict[str, np.ndarray], features: Mapping[str, Any] | None = None):
        with jax.set_mesh(mesh):
            return jitted(params, on_devices(mesh, batch, features))

    return run


def boxes_of(
    encoded: Encoded, outputs: Sequence[dict[str, np.ndarray]], tokenizer: Tokenizer, *, batch_size: int
) -> list[BoxAnswer]:
    """An answer for every row of `data.encoding.encode_boxes`, in its order.

    outputs: a locator's for each of `eval_rows`' batches of `batch_size` rows over all devices.
    """
    answers: dict[int, BoxAnswer] = {}
    order = eval_order(encoded).tolist()
    for start, arrays in zip(range(0, len(encoded), batch_size), outputs, strict=True):
        for row, index in enumerate(order[start : start + batch_size]):
            answers[index] = _read(encoded, index, tokenizer, {key: array[row] for key, array in arrays.items()})
    return [answers[index] for index in range(len(encoded))]


def _read(encoded: Encoded, index: int, tokenizer: Tokenizer, row: dict[str, np.ndarray]) -> BoxAnswer:
    record, asked = encoded.records.records[index], encoded.asked[index]
    text = tokenizer.decode(row["tokens"].tolist())
    boxes = row["boxes"][: row["count"]] if "boxes" in row else None
    assert encoded.format.read_boxes is not None, "a format without boxes"
    predicted = encoded.format.read_boxes(text, boxes, record.size_px)
    overlap, truth = None, encoded.records.mask(index)
    if "masks" in row and truth is not None:
        of_label = [i for i, box in enumerate(record.boxes) if box.label == asked.label]
        drawn = masks_in_image(row["masks"][: row["count"]], record.size_px)
        overlap = round(dice(drawn.any(axis=0), truth[of_label].any(axis=0)), DICE_DECIMALS)
    return BoxAnswer(
        record.id, record.subset, asked.label, rounded(corners(asked.boxes)),
        None if predicted is None else rounded(predicted), text, overlap,
    )  # fmt: skip


def masks_in_image(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool[N, h, w] masks of an image of size (height, width), from logits float32[N, s, s] of its padded square."""
    height, width = size
    side = max(size)
    top, left = (side - height) // 2, (side - width) // 2
    pictures = [Image.fromarray(x.astype(np.float32)) for x in logits]
    resized = [np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR)) for picture in pictures]
    square = np.array(resized, np.float32).reshape(-1, side, side)
    return square[:, top : top + height, left : left + width] > MASK_THRESHOLD
