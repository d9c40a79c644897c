"""The textbook's bytes, against counts by hand, against a compiled program, and against meshes that waste bytes."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from benchmarks import meshes
from medcg_jax.axes import MESH_AXES
from medcg_jax.config import MeshConfig, RunConfig, replace
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_7b, llava15_tiny
from medcg_jax.families.qwen2_vl.model import qwen2_vl_2b
from medcg_jax.plan import programs

BOTH = ("projector", "decoder")
SEVEN_B = llava15_7b(compute_dtype="bfloat16", remat="full")
# Parameters of LLaVA-1.5-7B by hand: a decoder layer's matrices, its head, the projector, a layer of the tower.
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008
HEAD = 4096 * 32000
PROJECTOR = 1024 * 4096 + 4096 * 4096
TOWER_LAYER = 4 * 1024 * 1024 + 2 * 1024 * 4096


def batch(rows: int, length: int = 768) -> dict:
    return {
        "tokens": jax.ShapeDtypeStruct((rows, length), "int32"),
        "pixels": jax.ShapeDtypeStruct((rows, 1, 336, 336, 3), "uint8"),
    }


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((1, data, fsdp, tensor), MESH_AXES)


def book(data, fsdp, tensor, *, rows=32, config=SEVEN_B, trainable=BOTH, **rest) -> dict:
    return meshes.textbook_bytes(config, mesh_of(data, fsdp, tensor), batch(rows), trainable=trainable, **rest)


def test_fsdp_gathers_twice_what_it_reduces():
    found = book(1, 8, 1)
    reduced = 2 * (32 * LAYER + HEAD + PROJECTOR)
    assert found["reduce-scatter"] == pytest.approx(reduced, rel=1e-3)
    assert found["all-gather"] == pytest.approx(reduced + 2 * 32 * LAYER + 2 * 23 * TOWER_LAYER, rel=1e-3)
    assert found["all-to-all"] == 2 * 4 * 768 * 4096 * 2
    # The rest is of norms and biases, which no axis splits.
    assert found["all-reduce"] < 2e6


def test_replicas_sum_a_shard_and_tensor_divides_and_sums_activations():
    one, replicas, split = book(1, 8, 1), book(4, 8, 1), book(1, 8, 2)
    assert replicas["all-gather"] == one["all-gather"]
    shards = one["reduce-scatter"] / 8 + 32000 * 4096 * 2 / 8
    assert replicas["all-reduce"] - one["all-reduce"] == pytest.approx(shards, rel=1e-6)
    assert split["all-gather"] == pytest.approx(one["all-gather"] / 2, rel=1e-3)
    rows = 4 * 768 * 4096 * 2  # bytes of a layer's input on one device
    tower, projected = 23 * 2 * 4 * 577 * 1024 * 2, 4 * 576 * 4096 * 2
    assert split["all-reduce"] - one["all-reduce"] == pytest.approx((5 * 32 + 1) * rows + tower + projected, rel=1e-3)


def test_what_is_frozen_is_gathered_and_not_reduced():
    whole, part = book(1, 8, 1), book(1, 8, 1, trainable=("projector",))
    assert part["all-gather"] == whole["all-gather"]
    assert part["reduce-scatter"] == pytest.approx(2 * PROJECTOR, rel=1e-3)
    assert book(1, 8, 1, accumulation_steps=4)["all-gather"] == 4 * whole["all-gather"]


def test_one_device_exchanges_nothing():
    assert book(1, 1, 1) == {}


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
def test_more_tensor_never_gathers_more(data, fsdp, tensor):
    few, many = (book(2**data, 2**fsdp, 2**more, rows=64) for more in (tensor, tensor + 1))
    assert many.get("all-gather", 0) <= few.get("all-gather", 0)
    assert all(size > 0 for size in (*few.values(), *many.values()))


def test_models_that_are_not_counted_are_refused():
    with pytest.raises(ValueError, match="Qwen2VLConfig"):
        meshes.textbook_bytes(qwen2_vl_2b(), mesh_of(1, 8, 1), batch(8), trainable=("decoder",))


def test_moving_counts_a_sum_that_all_keep_twice():
    assert meshes.moved_bytes({"all-gather": 3, "all-reduce": 5, "reduce-scatter": 7, "all-to-all": 11}) == 31


# ------------------------------------------------------------------ the recommended meshes


@pytest.mark.parametrize("where", meshes.MESHES)
def test_a_recommended_mesh_divides_the_model_and_its_batch(where):
    """What compiling would refuse, without compiling: heads, widths and rows that do not come out even."""
    row = meshes.MESHES[where]
    mesh = mesh_of(row.mesh.data, row.mesh.fsdp, row.mesh.tensor)
    build.shardings(SEVEN_B, mesh)
    assert not build.replicated(SEVEN_B, mesh)
    assert row.batch_size % (row.mesh.data * row.mesh.fsdp) == 0


def test_a_row_holds_by_its_memory_and_by_its_bytes(monkeypatch):
    config = llava15_tiny(40, 39, image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2)
    run = replace(RunConfig(), data__max_text_tokens=28, data__max_target_tokens=2, model__trainable=BOTH)
    run = replace(run, model__name="llava15_tiny", train__batch_size=8, eval__batch_size=8)
    monkeypatch.setattr(programs, "architecture_of", lambda model: config)
    monkeypatch.setattr(meshes.topology, "memory_bytes", lambda device: 100)
    row = meshes.Row(MeshConfig(data=1, fsdp=8), "", batch_size=8)

    def checked(by_kind, peak=80):
        monkeypatch.setattr(meshes, "compiled_step", lambda *_, **__: {"collective_bytes": by_kind, "peak_bytes": peak})
        return meshes.check_row(run, "local", row)

    usual = checked({})["textbook_bytes"]
    assert checked(usual)["holds"]
    assert not checked(usual, peak=95)["holds"]
    # Whole gradients summed on every device, in place of each device's part: the same payload, sent twice.
    summed = usual | {"all-reduce": usual["all-reduce"] + usual["reduce-scatter"], "reduce-scatter": 0}
    assert not checked(summed)["holds"]
    assert not checked(usual | {"all-gather": usual["all-gather"] * 0.7})["holds"]
