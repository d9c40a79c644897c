"""Greedy generation and letters of every family: whatever the batch, its padding and the mesh, what no cache gives."""

import functools

import family_toys
import jax
import numpy as np
import pytest
from eval_toys import others_long
from family_toys import MESHES, SOURCE, SUBSETS, TINY
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.config import DataConfig
from medcg_jax.data.encoding import encode_eval
from medcg_jax.eval.generation import greedy, prefill
from medcg_jax.eval.letters import make_evaluator, option_logprobs
from medcg_jax.families import build
from medcg_jax.mesh import batch_sharding, put_batch

NEW = 8
# Slots of padding that a row of `shifted` has before and behind it.
ROOM = 7
# Generation goes on to the last token: no id is this one.
NO_END = -1
TOLERANCE = 1e-5


@functools.cache
def rows(family: str) -> dict[str, np.ndarray]:
    """Eight prompts of two subsets, of several lengths."""
    found = family_toys.setup(family)
    data = DataConfig(system_prompt="", max_text_tokens=27)
    batch = {}
    for subset in SUBSETS:
        encoded = encode_eval(SOURCE.records(subset, "test"), found.tokenizer, data, found.format)
        for key, array in encoded.rows(np.arange(4))[0].items():
            batch.setdefault(key, []).append(array)
    return {key: np.concatenate(arrays) for key, arrays in batch.items()}


@functools.cache
def graph(family: str):
    return build.abstract(family_toys.setup(family).model)[0]


@functools.cache
def evaluator(family: str, mesh: str):
    """(params, batch) -> (log-probabilities of the letters, tokens), by the evaluation's own program on a mesh."""
    found = family_toys.setup(family, mesh)
    places = build.shardings(found.model, found.mesh)
    made = make_evaluator(found.mesh, graph(family), places, eos_id=NO_END, max_new_tokens=NEW)
    put = lambda batch: put_batch(batch, batch_sharding(found.mesh))
    run = family_toys.compiled(found.mesh, made.jitted, family_toys.placed(family, mesh), put(rows(family)))
    return lambda params, batch: tuple(np.asarray(x) for x in run(params, put(batch)))


@functools.cache
def generator(family: str, count: int, length: int):
    """batch -> tokens [count, NEW], with a cache, of rows of this shape on one device."""

    def generate(params, batch):
        model = nnx.merge(graph(family), params)
        logits, cache = prefill(model, batch, NEW - 1)
        return greedy(model, logits, cache, num_new=NEW, eos_id=NO_END)[0]

    shapes = {key: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for key, x in rows(family).items()}
    for key in ("tokens", "segment_ids"):
        shapes[key] = jax.ShapeDtypeStruct((count, length), np.int32)
    params = family_toys.placed(family, None)
    run = family_toys.compiled(family_toys.setup(family).mesh, jax.jit(generate), params, shapes)
    return lambda batch: np.asarray(run(params, batch))


@functools.cache
def forward(family: str):
    """(tokens, segment_ids, boxes or None) -> (hidden states, logits) of whole rows, without a cache."""
    images = {key: rows(family)[key] for key in nnx.merge(graph(family), family_toys.weights(family)).image_keys}

    def run(params, tokens, segment_ids, boxes):
        model = nnx.merge(graph(family), params)
        rest = {} if boxes is None else {"boxes": boxes}
        hidden, _ = model.hidden(tokens, images, segment_ids=segment_ids, **rest)
        return hidden, model.logits(hidden)

    params, mesh = family_toys.placed(family, None), family_toys.setup(family).mesh
    made = []

    def call(*args):
        if not made:
            made.append(family_toys.compiled(mesh, jax.jit(run), params, *args))
        return tuple(np.asarray(x) for x in made[0](params, *args))

    return call


@functools.cache
def expected(family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [8, NEW], log-probabilities of the letters, the smallest lead of a likeliest token over the second).

    Every token by a forward pass over all that came before it. NExT-Chat's `<boxes>` follows its `<at>`, and is the box
    that was decoded there.
    """
    batch, config = rows(family), family_toys.setup(family).model
    last, count = batch["last_position"].copy(), len(batch["tokens"])
    tokens = np.pad(batch["tokens"], ((0, 0), (0, NEW)))
    has_boxes = family == "next_chat"
    boxes = np.zeros((count, config.max_boxes, 4), np.float32) if has_boxes else None
    number, every, made, margin = np.zeros(count, int), np.arange(count), [], np.inf
    for _ in range(NEW):
        segment_ids = (np.arange(tokens.shape[1]) <= last[:, None]).astype(np.int32)
        hidden, logits = forward(family)(tokens, segment_ids, boxes)
        own = logits[every, last]
        if not made:
            letters = np.asarray(option_logprobs(own, batch["option_ids"]))
        best = own.argmax(axis=-1)
        leads = np.sort(own, axis=-1)
        free = np.ones(count, bool)
        if has_boxes:
            free = tokens[every, last] != config.at_token_id
            decoder = nnx.merge(graph(family), family_toys.weights(family)).boxes
            decoded = np.asarray(decoder.decode(hidden[every, last]))
            for row in np.flatnonzero(~free):
                best[row], boxes[row, number[row]] = config.box_token_id, decoded[row]
                number[row] += 1
        margin = min(margin, (leads[:, -1] - leads[:, -2])[free].min())
        last += 1
        tokens[every, last] = best
        made.append(best)
    return np.stack(made, axis=1), letters, margin


@pytest.mark.parametrize("family", TINY)
def test_prompts_and_answers_differ_and_are_no_ties(family):
    tokens, letters, margin = expected(family)
    assert margin > 20 * TOLERANCE
    assert len(np.unique(rows(family)["last_position"])) > 1 and len({tuple(row) for row in tokens}) > 3
    assert 2 < np.abs(letters[np.isfinite(letters)]).max() < 20
    if family == "next_chat":
        config = family_toys.setup(family).model
        at, box = (tokens == i for i in (config.at_token_id, config.box_token_id))
        assert at[:, :-2].any() and (at[:, :-1] <= box[:, 1:]).all()


@pytest.mark.parametrize("mesh", others_long(MESHES))
@pytest.mark.parametrize("family", TINY)
def test_on_every_mesh_tokens_and_letters_are_those_of_no_cache(family, mesh):
    tokens, letters, _ = expected(family)
    params = family_toys.placed(family, mesh)
    found_letters, found = evaluator(family, mesh)(params, rows(family))
    assert (found == tokens).all()
    there = np.isfinite(letters)
    assert (np.isfinite(found_letters) == there).all()
    assert np.abs(found_letters[there] - letters[there]).max() < TOLERANCE
    # Planted: the same program, and the value heads lie one device further.
    params = jax.tree.map(lambda w: w, params)
    kernel = params["decoder"]["blocks"]["v"]["kernel"]
    params["decoder"]["blocks"]["v"]["kernel"] = jax.device_put(np.roll(kernel, 1, axis=2), kernel.sharding)
    wrong_letters, wrong = evaluator(family, mesh)(params, rows(family))
    assert not (wrong == tokens).all()
    assert np.abs(wrong_letters[there] - letters[there]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", others_long(TINY))
def test_a_row_alone_is_the_row_in_its_batch(family):
    tokens = expected(family)[0]
    alone = generator(family, 1, rows(family)["tokens"].shape[1])
    for row in range(len(tokens)):
        one = {key: array[row : row + 1] for key, array in rows(family).items()}
        assert alone(one).tolist() == tokens[row : row + 1].tolist()


def shifted(family: str, order, left, fill: int) -> dict[str, np.ndarray]:
    """The rows in another order, each behind so many slots of padding; `fill` stands in what is padding."""
    batch = {key: array[list(order)] for key, array in rows(family).items()}
    count, length = batch["tokens"].shape
    tokens, segment_ids = np.full((count, length + ROOM), fill, np.int32), np.zeros((count, length + ROOM), np.int32)
    for row, start in enumerate(left):
        real = int(batch["last_position"][row]) + 1
        tokens[row, start : start + real] = batch["tokens"][row, :real]
        segment_ids[row, start : start + real] = 1
    return batch | {
        "tokens": tokens, "segment_ids": segment_ids, "last_position": batch["last_position"] + np.array(left, np.int32)
    }  # fmt: skip


@pytest.mark.parametrize("family", others_long(TINY))
def test_padding_on_either_side_and_the_order_of_rows_change_nothing(family):
    tokens, config = expected(family)[0], family_toys.setup(family).model
    generate = generator(family, 8, rows(family)["tokens"].shape[1] + ROOM)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        order=st.permutations(range(8)),
        left=st.lists(st.integers(0, ROOM), min_size=8, max_size=8),
        fill=st.sampled_from([config.pad_token_id, 5, 10**6]),
    )
    def check(order, left, fill):
        found = generate(shifted(family, order, left, fill))
        assert found.tolist() == tokens[list(order)].tolist()

    check()


@pytest.mark.parametrize("family", others_long(TINY))
def test_padding_taken_for_text_is_seen(family):
    """On either side: the comparison has teeth."""
    tokens = expected(family)[0]
    generate = generator(family, 8, rows(family)["tokens"].shape[1] + ROOM)
    for left in ([ROOM] * 8, [0] * 8):
        batch = shifted(family, range(8), left, 5)
        blind = batch | {"segment_ids": np.ones_like(batch["segment_ids"])}
        assert not (generate(blind) == tokens).all()
