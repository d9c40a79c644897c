"""Packed rows train as the same records one a row: loss, gradients, steps, and a run from start to end."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from train_toys import CONFIG, IMAGE_ID, TRAIN, batch, setup

from medcg_jax.config import ConfigError, Interrupted, RunConfig, replace
from medcg_jax.config_checks import check
from medcg_jax.config_file import load
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.packing import Packer, RowShape, choose, sizes
from medcg_jax.data.records import Record, RecordSet, Turn
from medcg_jax.families.formats import llava
from medcg_jax.families.llava import Llava
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.train import run as runs
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.setup import check_packed_attention

COUNT = 8
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    """Eight records of different lengths, three of them without an image."""
    rows = batch(3, COUNT)
    length = rows.pop("segment_ids").sum(axis=1).astype(np.int32)
    without = np.arange(COUNT) % 3 == 1
    tokens = rows.pop("tokens")
    tokens[without] = np.where(tokens[without] == IMAGE_ID, 5, tokens[without])
    length[without] -= 3
    rows["target_positions"] -= 3 * without[:, None]
    pixels = rows.pop("pixels")[:, 0] * ~without[:, None, None, None]
    records = [Record(f"a/{i}", "a", (Turn("q", "a"),), image="" if bare else "x") for i, bare in enumerate(without)]
    arrays = {**rows, "tokens": tokens, "length": length}
    return Encoded(RecordSet(records, pixels), llava(16, CONFIG.num_image_tokens), arrays, {"pixels": pixels})


@pytest.fixture(scope="module")
def packed(encoded):
    """Four rows, of two records each."""
    shape = choose(sizes(encoded), np.arange(COUNT)[None], unit=4, multiple=0, cost=lambda shape: shape.rows)
    assert shape.rows == 4 and shape.images == 2
    rows, _ = Packer(encoded, shape).rows(np.arange(COUNT), np.arange(4))
    assert rows["segment_ids"].max(axis=1).sum() == COUNT
    return rows


@pytest.fixture(scope="module")
def gradients():
    """rows -> ((sum of losses, sum of weights), gradients of every parameter), in float32."""
    graphdef, params = nnx.split(nnx.jit(lambda: Llava(CONFIG, rngs=nnx.Rngs(0)))())

    def loss(params, rows):
        return token_loss(nnx.merge(graphdef, params), rows)

    jitted = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda rows: jitted(params, rows)


def largest_difference(found, expected) -> float:
    """Of loss and of every parameter's gradient, relative to its norm; gradients that rounding alone makes left out."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    # A key's bias changes no softmax: its gradient is 0.
    least = 1e-5 * max(np.linalg.norm(b) for _, b in pairs)
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs if np.linalg.norm(b) > least)


def test_loss_and_gradients_are_those_of_a_record_a_row(encoded, packed, gradients):
    expected, _ = encoded.rows(np.arange(COUNT))
    assert largest_difference(gradients(packed), gradients(expected)) < 1e-6


@pytest.mark.parametrize("fault", ["one segment", "another's image", "targets of another row", "order of images"])
def test_a_fault_in_packing_changes_them(encoded, packed, gradients, fault):
    rows = {key: array.copy() for key, array in packed.items()}
    if fault == "one segment":
        rows["segment_ids"] = np.minimum(rows["segment_ids"], 1)
    elif fault == "another's image":
        rows["pixels"] = rows["pixels"][::-1]
    elif fault == "targets of another row":
        rows["target_positions"] = rows["target_positions"][::-1]
    else:
        rows["pixels"][0, :2] = rows["pixels"][0, 1::-1]
    expected, _ = encoded.rows(np.arange(COUNT))
    assert largest_difference(gradients(rows), gradients(expected)) > 1e-3


def test_a_step_in_parts_is_that_of_a_record_a_row(encoded, packed):
    program, trainable, frozen = setup(accumulation_steps=2)
    hparams = program.put_hparams(hparams_from(TRAIN, COUNT))
    found = []
    for rows in (packed, encoded.rows(np.arange(COUNT))[0]):
        state, metrics = program(
            program.start(trainable), frozen, hparams, jax.device_put(rows, program.batch_sharding)
        )
        found.append((jax.device_get(state.opt_state), float(metrics["loss"]), float(metrics["grad_norm"])))
        assert (metrics["samples"], metrics["tokens"]) == (COUNT, encoded.arrays["length"].sum())
    # Not the parameters: Adam's first step has the sign of a gradient, however small.
    assert largest_difference(*found) < 1e-5


def config(path: Path, **changes) -> RunConfig:
    """A few steps on phantoms, with as many general records, which have no image."""
    run = load(f"{CONFIGS / 'phantom.py'}:tiny", {})
    return replace(
        run, data__subsets=("ct-brain-state",), data__imagewikiqa_share=0.9, data__general_records=str(path),
        data__train_records_per_subset=20, data__row_multiple=8, train__steps=4, train__batch_size=8,
        train__log_every_steps=1, eval__batch_size=8, mesh__data=4, mesh__tensor=2, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    path = tmp_path_factory.mktemp("general") / "general.json"
    texts = ("Which?", "What is this?", "Is it the left lung?", "Where is the lesion in this image?")
    choice = "\nA: no\nB: yes\nC: one\nD: two"
    path.write_text(json.dumps([
        {
            "id": i, "caption": "", "image": "", "Question": texts[i % 4], "Answer": ("no", "yes", "one", "two")[i % 3],
            "Question-choice": texts[i % 4] + choice, "Answer-choice": "ABC"[i % 3], "data-no": "",
        }
        for i in range(30)
    ]))  # fmt: skip
    return path


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_stopped_and_resumed_has_the_losses_of_one_that_does_not_pack(general, tmp_path, monkeypatch, capfd):
    runs.train(config(general), tmp_path / "unpacked")

    # After two steps it is told to stop; it draws the rest in rows of the same shape, and the loop compares a loss.
    shapes, batches = [], runs.Batches

    def spied(*args, pack: RowShape, position: int, **rest):
        shapes.append((position, pack))
        return batches(*args, pack=pack, position=position, **rest)

    monkeypatch.setattr(runs, "Batches", spied)
    told = iter([False, True])
    monkeypatch.setattr("medcg_jax.train.preempt.told_to_stop", lambda: next(told, False))
    with pytest.raises(Interrupted):
        runs.train(config(general, data__pack=1), tmp_path / "packed")
    runs.train(config(general, data__pack=1), tmp_path / "packed")
    assert [position for position, _ in shapes] == [0, 2] and shapes[0][1] == shapes[1][1]
    assert shapes[0][1].rows == 4 and "8 records a batch in 4 rows" in capfd.readouterr().out
    assert np.allclose(losses(tmp_path / "packed"), losses(tmp_path / "unpacked"), rtol=1e-5)
    assert len(losses(tmp_path / "packed")) == 4


def test_what_cannot_pack_is_refused_in_one_line():
    packing = replace(RunConfig(), data__pack=1)
    for changes, message in (
        ({"data__pack": 2}, "data.pack=2: 0 or 1 is accepted"),
        ({"model__name": "qwen2_vl_tiny"}, "data.pack=1: 0 is accepted with model.name='qwen2_vl_tiny'"),
        ({"model__attention": "cudnn"}, "model.attention='cudnn': auto, plain or splash is accepted with data.pack=1"),
        ({"data__row_multiple": -1}, "data.row_multiple=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(replace(packing, **changes))
    check(packing)
    with pytest.raises(ConfigError, match="data.pack=1: 0 is accepted in a grid"):
        make_plan(packing)


def test_a_gpus_kernel_is_not_taken_silently():
    packing = replace(RunConfig(), data__pack=1, model__compute_dtype="bfloat16")
    with pytest.raises(ConfigError, match="model.attention='auto' takes cuDNN's kernel .*; 'plain' is accepted"):
        check_packed_attention(packing, "gpu")
    for run, platform in (
        (packing, "tpu"), (packing, "cpu"), (replace(packing, data__pack=0), "gpu"),
        (replace(packing, model__attention="plain"), "gpu"), (replace(packing, model__compute_dtype="float32"), "gpu"),
    ):  # fmt: skip
        check_packed_attention(run, platform)
