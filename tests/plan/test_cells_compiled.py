"""Cells compiled for devices that need not be there: parts of topologies, what is measured, and how many cells fit."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import pytest

from benchmarks import cells_compiled
from medcg_jax.config import ConfigError, DataConfig, EvalConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh
from medcg_jax.plan import programs, topology

MAKE_PROGRAM = programs.make_program

RUN = RunConfig(
    mesh=MeshConfig(data=1, fsdp=-1),
    model=ModelConfig(name="llava15_tiny"),
    data=DataConfig(max_text_tokens=28, max_target_tokens=2),
    train=TrainConfig(batch_size=8),
)
SMALL = llava15_tiny(
    40, 39, image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=32,
    scan_unroll=1,
)  # fmt: skip


# ------------------------------------------------------------------ topologies


@pytest.mark.parametrize(
    ("whole", "num", "expected"),
    [
        ("v5p:4x4x4", 4, "v5p:4x2x2"), ("v6e:8x8", 4, "v6e:4x4"), ("h100:8", 2, "h100:4"),
        ("v5p:2x2x4", 2, "v5p:2x2x2"), ("v5e:4x4*2", 2, "v5e:4x4"), ("v5e:4x4*2", 4, "v5e:4x2"),
        ("h100:8x8", 4, "h100:2x8"), ("h200:2x8", 4, "h200:1x4"), ("tpu7x:4x4x4*4", 2, "tpu7x:4x4x4*2"),
    ],
)  # fmt: skip
def test_a_part_of_a_topology(whole, num, expected):
    def num_chips(name):
        return math.prod(topology.parse(name).sizes) * topology.parse(name).num_slices

    assert cells_compiled.part_topology(whole, num) == expected
    assert num_chips(whole) == num * num_chips(expected)


@pytest.mark.parametrize(
    ("name", "num"), [("v5p:4x4x4", 3), ("h100:3", 2), ("v6e:8x8", 128), ("local", 2), ("v5e:4x4*3", 2)]
)
def test_parts_that_do_not_come_out_even_are_refused(name, num):
    with pytest.raises(ConfigError, match=re.escape(f"topology={name}")):
        cells_compiled.part_topology(name, num)


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:4x", "v5p:4x0x4", "v100:8", "8x8", "v5e:4x4*", "v5e:4x4*0", "h100:8*2", "h100:2x2x8", "v5e:²"]
)
def test_unknown_topologies_are_refused(name):
    with pytest.raises(ConfigError, match="h100.*hosts x GPUs"):
        topology.get_devices(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h200:8", "cuda")])
def test_what_compiles_for_a_topology_is_named_where_it_is_missing(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"{name}.*pip install '\.\[{extra}\]'"):
        topology.get_devices(name)


def test_the_text_of_a_program_is_what_its_own_compiler_wrote(tmp_path):
    compiled = SimpleNamespace(as_text=lambda: "of JAX")
    assert topology.text_of(compiled, {}) == "of JAX"
    options = {"xla_dump_to": str(tmp_path)}
    with pytest.raises(ValueError, match="0 texts"):
        topology.text_of(compiled, options)
    (tmp_path / "module_0001.jit_f.after_optimizations.txt").write_text("of libtpu")
    (tmp_path / "module_0001.jit_f.before_optimizations.txt").write_text("another")
    assert topology.text_of(compiled, options) == "of libtpu"
    (tmp_path / "module_0002.jit_g.after_optimizations.txt").write_text("a second program's")
    with pytest.raises(ValueError, match="2 texts"):
        topology.text_of(compiled, options)


def test_memory_is_known_by_the_longest_name():
    def device(kind):
        return SimpleNamespace(device_kind=kind)

    assert topology.memory_bytes(device("TPU v5 lite")) < 17e9 < 90e9 < topology.memory_bytes(device("TPU v5"))
    assert topology.memory_bytes(device("NVIDIA H100 80GB HBM3")) > 79e9
    with pytest.raises(ConfigError, match="memory of cpu"):
        topology.memory_bytes(jax.devices()[0])


# ------------------------------------------------------------------ what is measured


@pytest.fixture
def small(monkeypatch):
    """Plans are of a model small enough to compile in seconds."""
    monkeypatch.setattr(programs, "architecture_of", lambda model: SMALL)


@pytest.mark.long
def test_cells_need_what_one_needs_on_its_part(small):
    both = cells_compiled.against_one(RUN, "local", num_cells=2, num_groups=2)
    assert both["cells"]["mesh"] == {"cell": 2, "data": 1, "fsdp": 4, "tensor": 1}
    assert both["alone"]["mesh"] == {"cell": 1, "data": 1, "fsdp": 4, "tensor": 1}
    assert both["cells"]["batch"] == {"size": 8, "length": 32}
    assert abs(both["ratio"]["peak_bytes"] - 1) < 0.02
    assert abs(both["ratio"]["collective_bytes_sum"] - 1) < 0.03
    assert both["cells"]["num_collectives"] > 10 and not both["cells"]["crossing"]


# ------------------------------------------------------------------ as many as fit


def fit(compile_cells, limit_bytes, **rest):
    return programs.fitting_cells(compile_cells, num_groups=2, limit_bytes=limit_bytes, margin=0.0, **rest)


@pytest.mark.long
def test_the_largest_number_that_fits_is_found(small):
    @functools.cache
    def compile_cells(num_cells):
        planned = cells_compiled.planned_cells(RUN, jax.devices(), num_cells, 2)
        return programs.compile_training(planned, RUN.train.batch_size).program

    two, four = (compile_cells(n).memory_analysis().peak_memory_in_bytes for n in (2, 4))
    each = four - two
    # Room for five cells in each of two groups, and half of a sixth.
    found = fit(compile_cells, two + 4.5 * each)
    assert found.num_cells == 10 and len(found.peaks) <= 4
    assert found.peaks[10] <= found.usable_bytes
    assert compile_cells(12).memory_analysis().peak_memory_in_bytes > found.usable_bytes
    # The same room with a third of it left free holds fewer.
    freed = programs.fitting_cells(compile_cells, num_groups=2, limit_bytes=two + 4.5 * each, margin=1 / 3)
    assert freed.num_cells < 10


def compiled_of(peaks):
    """A compiler whose programs have these peaks: a function of the number of cells, inf where it refuses."""

    def compile_cells(num_cells):
        found = peaks(num_cells)
        if math.isinf(found):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(peak_memory_in_bytes=found))

    return compile_cells


@pytest.mark.parametrize("limit", [99, 100, 129, 130, 131, 400, 999, 1e9])
@pytest.mark.parametrize(
    "peaks",
    [
        lambda n: 70 + 15 * n,
        lambda n: 40 + 30 * n if n < 8 else 100 + 30 * n,  # not affine: a larger program is laid out in another way
        lambda n: 70 + 15 * n if n < 7 else math.inf,  # the compiler refuses what does not fit
        lambda n: 100.0,
    ],
)
def test_searching_finds_what_trying_all_finds(peaks, limit):
    fitting = [n for n in range(2, 41, 2) if peaks(n) <= limit]
    found = fit(compiled_of(peaks), limit, most=40)
    assert found.num_cells == max(fitting, default=0)
    assert len(found.peaks) <= 8


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("llava15_tiny", "token_loss"),
        ("next_chat_tiny", "box_loss"),
        *(
            pytest.param(name, "token_loss", marks=pytest.mark.long)
            for name in ("qwen2_vl_tiny", "llama32_vision_tiny", "minigpt_v2_tiny")
        ),
    ],
)
def test_as_many_of_every_family_fit_as_its_own_step_says(monkeypatch, name, loss):
    """The search itself, of the step that the family's grid runs: its rows, its parameters and its loss."""
    losses = []

    def make_program(*args, loss_fn, **rest):
        losses.append(loss_fn.__name__)
        return MAKE_PROGRAM(*args, loss_fn=loss_fn, **rest)

    monkeypatch.setattr(programs, "make_program", make_program)
    monkeypatch.setattr(topology, "memory_bytes", lambda device: 1e12)
    monkeypatch.setattr(topology, "get_devices", lambda where: jax.devices()[:1])  # quicker to compile for
    run = RunConfig(
        model=ModelConfig(name=name, scan_unroll=1), train=TrainConfig(batch_size=1),
        eval=EvalConfig(batch_size=1), data=DataConfig(max_text_tokens=64, max_target_tokens=4),
    )  # fmt: skip
    with programs.effort(False):
        found = programs.fitting_run(run, "local", num_groups=1, most=1)
    assert losses == [loss] and found.num_cells == 1
    # More than what is trained and its two moments.
    planned = programs.plan_run(run, make_mesh(run.mesh, jax.devices()[:1]))
    assert 3 * sum(x.size * 4 for x in jax.tree.leaves(planned.trainable)) < found.peaks[1] < 1e12


def test_what_is_no_question_of_memory_is_an_error():
    def broken(num_cells):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(broken, 100)
    with pytest.raises(ValueError, match="no peak memory for 2 cells"):
        fit(compiled_of(lambda n: 0), 100)
    with pytest.raises(ValueError, match="most=1"):
        fit(compiled_of(lambda n: n), 100, most=1)
