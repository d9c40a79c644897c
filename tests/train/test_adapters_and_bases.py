"""Adapters trained on a base kept in bf16, int8 or nf4: on eight devices as on one, and what a run leaves behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from train_toys import CONFIG, TRAIN, batch, others_long
from train_toys import run as run_steps

from medcg_jax.config import DataConfig, EvalConfig, LogConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from medcg_jax.eval.subsets import evaluate_subsets
from medcg_jax.families import build
from medcg_jax.families.weights.convert import convert, load_checkpoint, open_leaves, read_config, save_params
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.base import Base
from medcg_jax.nn.lora import TARGETS, LoraConfig
from medcg_jax.nn.quant import dequantize, is_quantized, quantize
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.run import train
from medcg_jax.train.setup import model_config
from medcg_jax.train.step import make_step

TRAINED = ("projector", "lora")
ADAPTED = dataclasses.replace(CONFIG, lora=LoraConfig(4, 8.0, TARGETS))
# Of random logits, twice what was measured: a random network of width 16 magnifies the errors of its weights.
ERRORS = {"bfloat16": 0.018, "int8": 0.044, "nf4": 0.68}


def kept(dtype: str):
    return ADAPTED if dtype == "float32" else dataclasses.replace(ADAPTED, base=Base(dtype, TRAINED))


def trained(config, mesh, *, steps=2):
    """(losses, the last state's params) of so many steps."""
    graphdef, params = build.create(config, mesh, seed=0)
    # At its start an adapter adds nothing: some that do.
    params = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.02 if path[0].key == "lora" else x, params)
    places = build.split_trainable(build.shardings(config, mesh), TRAINED)
    program = make_step(mesh, graphdef, *places, make_optimizer(TRAIN))
    trainable, frozen = build.split_trainable(params, TRAINED)
    hparams, state, losses = program.put_hparams(hparams_from(TRAIN, 10)), program.start(trainable), []
    for step in range(steps):
        rows = jax.device_put(batch(step), program.batch_sharding)
        state, metrics = program(state, frozen, hparams, rows)
        losses.append(float(metrics["loss"]))
    return losses, state.params, frozen


def test_eight_devices_train_as_one():
    config = kept("nf4")
    one, params, frozen = trained(config, make_mesh(devices=jax.devices()[:1]))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    many, spread, there = trained(config, mesh)
    assert np.abs(np.array(one) - np.array(many)).max() < 1e-5
    for found, expected in zip(jax.tree.leaves(spread), jax.tree.leaves(params), strict=True):
        assert np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-4
    # The base was quantised where it lies, and is the same.
    for found, expected in zip(jax.tree.leaves(there), jax.tree.leaves(frozen), strict=True):
        assert found.dtype == expected.dtype and (np.asarray(found) == np.asarray(expected)).all()
    kernel = there["decoder"]["blocks"]["gate"]["kernel"]
    assert kernel.qvalue.sharding.shard_shape(kernel.qvalue.shape) == (2, 8, 16)
    # Both halves of every adapter are split over fsdp, the rank where nothing else is.
    for name, half, axis in (("q", "a", 1), ("q", "b", 1), ("down", "a", 2), ("down", "b", 2)):
        x = spread["lora"][name][half]
        assert x.sharding.shard_shape(x.shape)[axis] == x.shape[axis] // 2, (name, half)


@pytest.mark.long
def test_two_cells_share_a_quantised_base():
    """In one program, each with adapters of its own: as one after the other."""
    config, mesh = kept("nf4"), make_mesh(devices=jax.devices()[:1])
    graphdef, params = build.create(config, mesh, seed=0)
    places = build.split_trainable(build.shardings(config, mesh), TRAINED)
    parts, losses = build.split_trainable(params, TRAINED), {}
    for num_cells in (2, 1):
        program = make_step(mesh, graphdef, *places, make_optimizer(TRAIN), num_cells=num_cells)
        for seeds in [(0, 50)] if num_cells == 2 else [(0,), (50,)]:
            all_hparams = [hparams_from(TRAIN, 10)] * num_cells
            _, metrics = run_steps(program, *parts, all_hparams, 2, seeds=list(seeds))
            losses[seeds] = metrics["loss"].reshape(2, num_cells)
    assert np.abs(losses[0, 50] - np.concatenate([losses[(0,)], losses[(50,)]], axis=1)).max() < 1e-5


def test_large_matrices_made_one_after_the_other_are_the_same(monkeypatch):
    config, mesh = kept("nf4"), make_mesh(devices=jax.devices()[:1])
    _, together = build.create(config, mesh, seed=0)
    monkeypatch.setattr(build, "ALONE_NUMBERS", 2 * 16 * 32)
    build._initializers.cache_clear()
    assert [len(places) for places, _ in build._initializers(config, mesh, jnp.float32)][1:] == [1, 1, 1]
    _, alone = build.create(config, mesh, seed=0)
    build._initializers.cache_clear()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), together, alone))


def test_only_what_is_not_trained_is_kept_otherwise():
    for dtype in ("bfloat16", "nf4"):
        config = kept(dtype)
        _, params = build.create(config, make_mesh(devices=jax.devices()[:1]), seed=0)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]:
            matrix = path[-1].key == "kernel" and "blocks" in [key.key for key in path]
            if path[0].key in TRAINED:
                assert leaf.dtype == jnp.float32
            elif dtype == "nf4" and matrix:
                assert leaf.qvalue.dtype == jnp.uint4 and leaf.scale.dtype == jnp.bfloat16
            else:
                assert leaf.dtype == jnp.bfloat16, path
        shapes = build.abstract(config)[1]
        assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, shapes))
        assert build.num_params(params) == build.num_params(build.abstract(ADAPTED)[1])


@pytest.mark.parametrize("dtype", others_long(["nf4", "int8", "bfloat16"]))
def test_logits_are_nearly_those_of_the_float32_base(dtype):
    """The error is the dtype's: a quarter of it would be seen as well as twice as much."""
    mesh = make_mesh(devices=jax.devices()[:1])
    given = batch(0)

    def logits(config):
        graphdef, params = build.create(config, mesh, seed=0)
        model = nnx.merge(graphdef, params)
        return np.asarray(model(given["tokens"], {"pixels": given["pixels"]}, segment_ids=given["segment_ids"]))

    real = given["segment_ids"] != 0
    exact, found = logits(ADAPTED)[real], logits(kept(dtype))[real]
    error = float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))
    print(f"{dtype}: logits differ by {error:.4f} of their root mean square")
    assert ERRORS[dtype] / 4 < error < ERRORS[dtype]


def test_a_bfloat16_base_is_not_cast_in_the_step():
    """Of the frozen matrices no float32 copy is in the program: parameters, and what it computes."""
    config = dataclasses.replace(kept("bfloat16"), compute_dtype="bfloat16")
    mesh = make_mesh(devices=jax.devices()[:1])
    graphdef, params = build.abstract(config)
    trainable, frozen = build.split_trainable(params, TRAINED)
    places = build.split_trainable(build.shardings(config, mesh), TRAINED)

    def float32_kernels(compute_dtype):
        program = make_step(mesh, graphdef, *places, make_optimizer(TRAIN), compute_dtype=compute_dtype)
        hparams = {name: np.zeros((), x.dtype) for name, x in hparams_from(TRAIN, 10).items()}
        with jax.set_mesh(mesh):
            text = str(jax.make_jaxpr(program.jitted)(program.abstract_state(trainable), frozen, hparams, batch(0)))
        return text.count("f32[2,16,32]")  # gate and up of both layers; no adapter has this shape

    assert float32_kernels("bfloat16") == 0 < float32_kernels("float32")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(a tiny base as a converted checkpoint, the run that starts from it)."""
    directory = tmp_path_factory.mktemp("start")
    from medcg_jax.plan.programs import small_tokenizer

    model = ModelConfig()
    config = model_config(model, small_tokenizer(model))
    _, params = build.create(config, make_mesh(devices=jax.devices()[:1]), seed=3)
    save_params(directory / "base", params, config)
    run = RunConfig(
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
        model=ModelConfig(
            checkpoint=str(directory / "base"), trainable=TRAINED, lora_rank=4, lora_targets=("q", "down"),
            scan_unroll=1,
        ),
        data=DataConfig(
            subsets=("ct-brain-state",), train_records_per_subset=16, test_records_per_subset=8, max_text_tokens=64
        ),
        train=TrainConfig(steps=3, batch_size=8, learning_rate=1e-3),
        eval=EvalConfig(batch_size=8, generate=False),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip
    return directory / "base", run


def test_a_run_keeps_what_it_trained_and_is_tested_and_exported_with_its_base(start, tmp_path):
    base, run = start
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, base_dtype="nf4"))
    train(run, tmp_path)
    config = read_config(tmp_path / "params")
    assert config.lora == LoraConfig(4, 8.0, ("q", "down")) and config.base == Base("nf4", TRAINED)
    assert sum(path.stat().st_size for path in (tmp_path / "params").rglob("*")) < 0.5 * sum(
        path.stat().st_size for path in base.rglob("*")
    )
    scores = evaluate_subsets(run, tmp_path)
    assert scores["subsets"]["ct-brain-state"]["n"] == 8
    assert convert(tmp_path / "params", tmp_path / "hf", to="hf")["parameters"] > 100_000
    merged, plain = (open_leaves(path) for path in (tmp_path / "hf", base))
    changed = {
        name for name in TARGETS
        if not np.allclose(*(np.asarray(x["decoder"]["blocks"][name]["kernel"]) for x in (merged, plain)), atol=1e-7)
    }  # fmt: skip
    assert changed == {"q", "down"}


@pytest.mark.parametrize("dtype", others_long(["nf4", "int8"]))
def test_a_checkpoint_is_quantised_as_it_is_read(start, dtype):
    base, run = start
    found = read_config(base)
    config = dataclasses.replace(found, lora=LoraConfig(4, 8.0), base=Base(dtype, TRAINED))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = load_checkpoint(base, config, mesh, seed=5)
    plain = open_leaves(base)
    blocks = plain["decoder"]["blocks"]
    for name in ("q", "out", "down"):
        w = jnp.asarray(np.asarray(blocks[name]["kernel"]))
        wanted, got = quantize(w, dtype), params["decoder"]["blocks"][name]["kernel"]
        assert (np.asarray(got.qvalue) == np.asarray(wanted.qvalue)).all()
        assert (np.asarray(got.scale) == np.asarray(wanted.scale)).all()
        assert np.abs(np.asarray(dequantize(got, jnp.float32)) - w).max() > 0
    assert params["projector"]["up"]["kernel"].dtype == jnp.float32
    made = build.create_adapters(config, mesh, seed=5)
    assert (np.asarray(params["lora"]["q"]["a"]) == np.asarray(made["q"]["a"])).all()
    assert not np.asarray(params["lora"]["v"]["b"]).any() and np.asarray(params["lora"]["v"]["a"]).any()


def test_without_a_checkpoint_all_is_written_and_read_back_the_same(tmp_path):
    """Random weights are nowhere else: matrices go to the file in float32, and are the same when quantised again."""
    config, mesh = kept("nf4"), make_mesh(devices=jax.devices()[:1])
    _, params = build.create(config, mesh, seed=0)
    save_params(tmp_path, params, config)
    _, found = load_checkpoint(tmp_path, config, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()
