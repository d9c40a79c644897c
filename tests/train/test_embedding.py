"""Words that are trained alone: the rows that move, what refuses them, and where a base leaves them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from train_toys import CONFIG, TRAIN, others_long, run, same_bits, setup

from medcg_jax.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    replace,
)
from medcg_jax.config_checks import check
from medcg_jax.data.phantom.pretraining import MAX_TARGET_TOKENS, MAX_TEXT_TOKENS, SITE_CLASSES, pretraining_records
from medcg_jax.data.phantom.world import choice_turn
from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import build, registry
from medcg_jax.families.weights.convert import load_checkpoint, save_params
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.base import Base
from medcg_jax.study.run import bases
from medcg_jax.train import optim
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.run import train
from medcg_jax.train.setup import open_setup

# Tokens that are trained; the batches of `train_toys` hold those from 3 to 38.
ROWS = (5, 9, 17)
OTHERS = np.setdiff1d(np.arange(CONFIG.text.vocab_size), ROWS)
STEPS = 2
WORDS = ("state", "normal", "abnormal")


def table(params) -> np.ndarray:
    return np.asarray(params["decoder"]["embed"]["table"])


def after_steps(mesh: MeshConfig | None = None, **fields):
    """(the table before, the state after, losses) of two steps that train the embedding."""
    program, trainable, frozen = setup(mesh, trainable=("embedding",), **fields)
    state, metrics = run(program, trainable, frozen, [hparams_from(TRAIN, 10)], STEPS)
    return table(trainable), state, metrics["loss"]


def test_only_the_named_rows_move():
    before, state, _ = after_steps(rows=ROWS)
    after = table(state.params)
    assert same_bits(after[OTHERS], before[OTHERS]) and (after[list(ROWS)] != before[list(ROWS)]).all()
    # Nothing else is among what the step changes.
    assert jax.tree.leaves(state.params)[0].shape == before.shape and len(jax.tree.leaves(state.params)) == 1


@pytest.mark.long
def test_other_rows_stay_in_bfloat16_too():
    narrow = dataclasses.replace(TRAIN, param_dtype="bfloat16", moment_dtype="bfloat16")
    before, state, _ = after_steps(rows=ROWS, train=narrow)
    after = table(state.params)
    assert after.dtype == jnp.bfloat16 and same_bits(after[OTHERS], before.astype(jnp.bfloat16)[OTHERS])


def test_eight_devices_train_the_words_as_one():
    _, alone, losses = after_steps(rows=ROWS)
    before, state, many = after_steps(MeshConfig(data=2, fsdp=2, tensor=2), rows=ROWS)
    assert np.abs(losses - many).max() < 1e-5
    assert np.abs(table(state.params) - table(alone.params)).max() < 1e-4
    assert same_bits(table(state.params)[OTHERS], before[OTHERS])
    (whole,) = jax.tree.leaves(state.params)
    assert np.prod(whole.sharding.shard_shape(whole.shape)) < whole.size


# ------------------------------------------------------------------ the optimizer

PARAMS = {
    "decoder": {"embed": {"table": np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)}},
    "projector": {"kernel": np.full((4, 4), 0.5, np.float32)},
}
KEPT = (1, 4)


def updates_of(optimizer, grads, steps: int = 3):
    params, state, update = PARAMS, optimizer.init(PARAMS), None
    for _ in range(steps):
        update, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, update))
    return jax.tree.map(np.asarray, update)


def grads(others: float):
    g = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    g[[0, 2, 3, 5]] *= others
    return {"decoder": {"embed": {"table": g}}, "projector": {"kernel": np.full((4, 4), 0.1, np.float32)}}


def test_other_rows_count_neither_in_the_clipping_nor_in_the_decay():
    config = TrainConfig(clip_norm=0.5, weight_decay=0.3)
    found = updates_of(make_optimizer(config, KEPT), grads(others=1e3))
    expected = updates_of(make_optimizer(config), grads(others=0.0))
    ours, plain = (tree["decoder"]["embed"]["table"] for tree in (found, expected))
    np.testing.assert_array_equal(ours[list(KEPT)], plain[list(KEPT)])
    np.testing.assert_array_equal(found["projector"]["kernel"], expected["projector"]["kernel"])
    assert not ours[[0, 2, 3, 5]].any() and plain[[0, 2, 3, 5]].all()  # without the rows, decay moves all


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_mask_is_seen(monkeypatch, missing):
    """Before the clipping, or behind the decay."""
    real, calls = optim._only_rows, []

    def once(rows):
        calls.append(rows)
        return optax.identity() if len(calls) == missing + 1 else real(rows)

    monkeypatch.setattr(optim, "_only_rows", once)
    with pytest.raises(AssertionError):
        test_other_rows_count_neither_in_the_clipping_nor_in_the_decay()
    assert len(calls) == 2


# ------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(the run of two words from a converted base, the base's parameters)."""
    from medcg_jax.plan.programs import small_tokenizer
    from medcg_jax.train.setup import model_config

    folder = tmp_path_factory.mktemp("base") / "params"
    config = model_config(ModelConfig(), small_tokenizer(ModelConfig()))
    _, params = build.create(config, make_mesh(devices=jax.devices()[:1]), seed=3)
    save_params(folder, params, config)
    run = RunConfig(
        model=ModelConfig(
            checkpoint=str(folder), trainable=("embedding",), trainable_words=WORDS, scan_unroll=1
        ),
        data=DataConfig(
            subsets=("ct-brain-state",), system_prompt="", train_records_per_subset=16, test_records_per_subset=8,
            max_text_tokens=14, max_target_tokens=2,
        ),
        train=TrainConfig(steps=3, batch_size=8, learning_rate=1e-2, weight_decay=0.1),
        eval=EvalConfig(batch_size=8, generate=False),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip
    return run, params


@pytest.mark.parametrize("words", others_long([WORDS, ()]))
def test_a_run_changes_its_words_and_nothing_else(start, tmp_path, words):
    run, before = start
    run = replace(run, model__trainable_words=words)
    train(run, tmp_path)
    opened = open_setup(run)
    after = load_checkpoint(tmp_path / "params", opened.model, opened.mesh)[1]
    rows = [opened.tokenizer.encode(word)[0] for word in WORDS]
    assert opened.trainable_rows(("embedding",)) == (tuple(rows) if words else ())
    assert opened.trainable_rows(("projector", "decoder")) == ()
    moved = (table(after) != table(before)).any(axis=1)
    assert moved[rows].all()
    # Without words all rows are trained: those of the frame move as well.
    assert (set(np.flatnonzero(moved)) == set(rows)) == bool(words)
    rest = [build.split_trainable(params, ("embedding",))[1] for params in (after, before)]
    assert same_bits(*rest) and len(jax.tree.leaves(rest[0])) > 20


@pytest.mark.parametrize("family", registry.families(), ids=lambda family: family.name)
def test_the_rows_are_those_that_a_question_reads(family):
    run = RunConfig(model=ModelConfig(name=family.tiny[0], trainable=("embedding",), trainable_words=WORDS))
    opened = open_setup(replace(run, data__system_prompt=""))
    turn = choice_turn("ct brain state?", ("abnormal", "normal"), "normal")
    prompt = opened.format.prompts.evaluation_prompt(
        opened.tokenizer, (turn,), system_prompt="", num_image_tokens=opened.format.max_image_tokens
    )
    assert set(opened.trainable_rows(("embedding",))) < set(prompt)


@pytest.mark.parametrize(("word", "says"), [("normal abnormal", "2 tokens"), ("adenocarcinomatosis", ""), ("", "0 ")])
def test_a_word_that_is_not_one_token_is_refused(start, word, says):
    opened = open_setup(replace(start[0], model__trainable_words=("state", word)))
    with pytest.raises(ConfigError) as error:
        opened.trainable_rows(("embedding",))
    message = str(error.value)
    assert message.startswith(f"model.trainable_words={word!r}: it is {says}") and "\n" not in message
    assert "expected words of one token" in message


SHARED = Path(__file__).parents[3] / "shared" / "tokenizers"


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/tokenizers is absent")
@pytest.mark.parametrize("name", ["llama32_vision", "qwen2_vl_json_alone"])
def test_a_word_of_a_real_tokenizer_has_the_token_that_sentences_have(start, name):
    """In byte-pair vocabularies a word behind a space is another token than at the start of a text."""
    opened = open_setup(start[0])
    tokenizer, word, split = load_tokenizer(SHARED / name), "mild", "tomography"
    library = tokenizers.Tokenizer.from_file(str(SHARED / name / "tokenizer.json"))
    in_sentence = set(library.encode(f"see the {word} here", add_special_tokens=False).ids)
    others = set(library.encode("see the here", add_special_tokens=False).ids)

    def rows_of(chosen: str) -> tuple[int, ...]:
        run = replace(opened.run, model__trainable_words=(chosen,))
        return dataclasses.replace(opened, run=run, tokenizer=tokenizer).trainable_rows(("embedding",))

    assert set(rows_of(word)) & (in_sentence - others)
    with pytest.raises(ConfigError, match="expected words of one token"):
        rows_of(split)


@pytest.mark.long
def test_such_a_word_stops_a_run_before_it_leaves_anything(start, tmp_path):
    with pytest.raises(ConfigError, match="expected words of one token"):
        train(replace(start[0], model__trainable_words=("normal abnormal",)), tmp_path)
    assert not (tmp_path / "params").exists() and not (tmp_path / "metrics").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(model__trainable=("projector",)), 'are trained by the part "embedding"; expected () without it'),
        (dict(model__trainable=("embedding", "decoder")), '"decoder" has the part "embedding" in it; expected either'),
        (dict(model__trainable_words=("state", "state")), "model.trainable_words"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(changes, says):
    run = RunConfig(model=ModelConfig(trainable=("projector", "embedding"), trainable_words=WORDS))
    check(run)
    with pytest.raises(ConfigError) as error:
        check(replace(run, **changes))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_a_trained_embedding_is_kept_in_float32_beside_a_smaller_base(dtype):
    tables = {}
    for trained in (("embedding",), ("projector",)):
        _, params = build.abstract(dataclasses.replace(CONFIG, base=Base(dtype, trained)))
        tables[trained[0]] = params["decoder"]["embed"]["table"].dtype
        assert params["decoder"]["head"]["kernel"].dtype == jnp.bfloat16
        assert (params["projector"]["up"]["kernel"].dtype == jnp.float32) == (trained == ("projector",))
    assert tables == {"embedding": jnp.float32, "projector": jnp.bfloat16}
    trainable, frozen = build.split_trainable(params, ("embedding",))
    assert jax.tree.structure(build.join(trainable, frozen)) == jax.tree.structure(params)


# ------------------------------------------------------------------ a base


@pytest.mark.parametrize("family", registry.families(), ids=lambda family: family.name)
def test_rows_of_a_base_fit_in_any_prompt(family):
    opened = open_setup(replace(RunConfig(model=ModelConfig(name=family.tiny[0])), data__system_prompt=""))
    records = pretraining_records(0, 200)
    frame = bases.frame_tokens(opened)

    def encode(text_tokens):
        return opened.encode(records, max_text_tokens=text_tokens, max_target_tokens=MAX_TARGET_TOKENS)

    longest = int(encode(MAX_TEXT_TOKENS + frame).arrays["length"].max())
    with pytest.raises(DataError, match="tokens"):
        encode(longest - opened.format.max_image_tokens - 1)


class Seen:
    """A model of which `base_loss` sees the features of an image's tokens alone."""

    image_keys = ("features", "cells")

    def image_tokens(self, images, side):
        assert side == 4
        return images["features"], images["cells"]


def site_batch(seed: int) -> dict[str, np.ndarray]:
    """Three rows of 20 tokens for the 16 sites, some of the whole image or of none; the last row only fills the batch."""
    rng = np.random.default_rng(seed)
    cells = np.stack([rng.permutation([*range(16), 2, 2, -1, 16]) for _ in range(3)])
    labels = np.stack([rng.integers(-1, size, (3, 16)) for size in SITE_CLASSES], -1)
    segments = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], np.int32)
    features = rng.normal(size=(3, 20, 8)).astype(np.float32)
    return {"features": features, "cells": cells, "site_labels": labels, "segment_ids": segments}


def site_loss(batch, rows=2) -> float:
    """By numpy, of the first rows."""
    readout = np.asarray(jax.random.normal(jax.random.key(0), (8, sum(SITE_CLASSES)))) * 2 / 8**0.5
    sums, counts = np.zeros(5), np.zeros(5)
    for i in range(rows):
        for site in range(16):
            mean = batch["features"][i][batch["cells"][i] == site].mean(0)
            logits = np.split(mean / np.sqrt(np.mean(mean**2) + 1e-6) @ readout, np.cumsum(SITE_CLASSES)[:-1])
            for k, (own, label) in enumerate(zip(logits, batch["site_labels"][i, site], strict=True)):
                if label >= 0:
                    sums[k] += np.log(np.exp(own).sum()) - own[label]
                    counts[k] += 1
    return float((sums / counts).sum())


def test_the_loss_of_the_sites_is_that_by_hand_and_of_real_rows(monkeypatch):
    monkeypatch.setattr(bases, "token_loss", lambda model, batch: (jnp.float32(10.0), jnp.float32(4.0)))
    loss_of = jax.jit(lambda batch: bases.base_loss(Seen(), batch))
    batch = site_batch(0)
    total, weight = loss_of(batch)
    expected = 10 + 4 * bases.SITE_WEIGHT * site_loss(batch)
    assert float(weight) == 4 and float(total) == pytest.approx(expected, rel=1e-5)
    # A row that only fills the batch says nothing, whatever is in it; a real row does.
    other = site_batch(1)
    for row, same in ((2, True), (1, False)):
        changed = {key: array.copy() for key, array in batch.items()}
        for key in ("features", "cells", "site_labels"):
            changed[key][row] = other[key][row]
        assert (float(loss_of(changed)[0]) == float(total)) == same
    filled = batch | {"segment_ids": np.ones_like(batch["segment_ids"])}
    assert float(loss_of(filled)[0]) == pytest.approx(10 + 1.2 * site_loss(batch, 3), rel=1e-5)


def test_words_that_were_not_read_start_at_the_mean_of_the_others():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = build.create(CONFIG, mesh, seed=0)
    before = jax.tree.map(np.asarray, params)
    tokens = np.array([[3, 4, 7, 0], [7, 8, 0, 0]], np.int32)
    where = params["decoder"]["embed"]["table"].sharding
    after = bases.with_common_start(params, tokens)
    read = np.unique(tokens)
    unread = np.setdiff1d(np.arange(CONFIG.text.vocab_size), read)
    found = table(after)
    assert same_bits(found[read], table(before)[read])
    assert (found[unread] == found[unread[0]]).all()
    np.testing.assert_allclose(found[unread[0]], table(before)[read].mean(0), rtol=1e-5, atol=1e-6)
    assert after["decoder"]["embed"]["table"].sharding == where
    rest = [build.split_trainable(tree, ("embedding",))[1] for tree in (after, before)]
    assert jax.tree.structure(after) == jax.tree.structure(before) and same_bits(*rest)
