"""A conversion goes part by part and appears whole: what it holds at once, and what is left of one that fails."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import convert_memory
from medcg_jax import cli
from medcg_jax.config import MeshConfig, RunError
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.families.weights import convert as convert_module
from medcg_jax.families.weights import engine, llava, orbax_leaves
from medcg_jax.families.weights.convert import convert, load_checkpoint, open_leaves, read_config
from medcg_jax.families.weights.files import Tensors, WeightsError, open_tensors
from medcg_jax.mesh import make_mesh

# Twelve layers: a stack is twelve times its largest tensor of 0.5 MB.
CONFIG = llava15_tiny(96, 90, embed_dim=256, mlp_dim=1024, num_layers=12)
LARGEST = 2 * 256 * 1024


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    directory = tmp_path_factory.mktemp("released") / "src"
    convert_memory.write_random(directory, CONFIG, 5_000_000)
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def peak_of(run) -> int:
    """The most bytes that Python and numpy held at once while `run()` ran, beyond what was there before."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_stack_is_never_held_whole(released, tmp_path, monkeypatch):
    convert(released, tmp_path / "warm")
    # Two copies of a tensor, one as it is in the file and one as it is with us, and what Orbax notes about it.
    bound = 2 * LARGEST + 1_500_000
    assert bound < 6 * LARGEST
    assert peak_of(lambda: convert(released, tmp_path / "orbax")) < bound
    assert peak_of(lambda: convert(tmp_path / "orbax", tmp_path / "hf", to="hf")) < bound
    assert convert_memory.compare(released, tmp_path / "hf") == len(convert_memory.open_tensors(released).shapes)
    # Planted: what was read is kept.
    kept, read = [], engine._rows
    monkeypatch.setattr(engine, "_rows", lambda *args: kept.append(read(*args)) or kept[-1])
    assert peak_of(lambda: convert(released, tmp_path / "kept")) > bound


def test_on_disk_no_piece_holds_parts_of_two_layers(released, tmp_path, monkeypatch):
    """Of what a run saves, too: otherwise a layer could not be read without its stack."""
    monkeypatch.setattr(orbax_leaves, "LEAST_CHUNK_BYTES", 100_000)
    convert(released, tmp_path / "converted")
    _, params = load_checkpoint(released, CONFIG, make_mesh(devices=jax.devices()[:1]))
    convert_module.save_params(tmp_path / "saved", params, CONFIG)
    import orbax.checkpoint as ocp

    for name in ("converted", "saved"):
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata((tmp_path / name / "params").absolute()).item_metadata.tree
        kernel, head = found["decoder"]["blocks"]["up"]["kernel"], found["decoder"]["head"]["kernel"]
        assert kernel.shape == (12, 256, 1024)
        assert kernel.storage.chunk_shape[0] == 1
        for leaf in (kernel, head):
            assert np.prod(leaf.storage.chunk_shape) * np.dtype(leaf.dtype).itemsize <= 100_000
    # One is what the other is.
    leaves = [jax.tree.leaves(open_leaves(tmp_path / name)) for name in ("converted", "saved")]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b))


def test_a_release_goes_to_a_mesh_one_tensor_at_a_time(released):
    tensors, names = llava.open_release(released, json.loads((released / "config.json").read_text()), {})
    alive, most = {}, 0

    def read(name, index=()):
        nonlocal most
        value = tensors.read(name, index)
        alive.setdefault(name, []).append(weakref.ref(value))
        most = max(most, sum(any(ref() is not None for ref in slices) for slices in alive.values()))
        return value

    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    target = llava.table(CONFIG), build.abstract(CONFIG)[1], build.shardings(CONFIG, mesh)
    engine.load(*target, Tensors(tensors.shapes, read, tensors.dtype), names, "here")
    # One is put in place while the next one is read.
    assert most <= 2
    # Planted: a source that keeps what it gave.
    kept = []
    keeping = Tensors(tensors.shapes, lambda *args: kept.append(read(*args)) or kept[-1], tensors.dtype)
    engine.load(*target, keeping, names, "here")
    assert most == len(names)


def test_a_layer_is_written_into_its_stack_in_place():
    """The program needs no memory for a second stack, as a scatter of the layer does in bfloat16 on a CPU."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    where = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    stack = jax.ShapeDtypeStruct((12, 256, 64), "bfloat16", sharding=where)
    layer = jax.ShapeDtypeStruct((256, 64), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    one_layer = 256 * 64 * stack.dtype.itemsize

    def scratch(program) -> int:
        return program.lower(stack, layer, 3).compile().memory_analysis().temp_size_in_bytes

    assert scratch(engine._set_layer(where)) <= one_layer
    # Planted: the scatter.
    scatter = jax.jit(lambda stack, value, i: stack.at[i].set(value), donate_argnums=0, out_shardings=where)
    assert scratch(scatter) > 2 * one_layer


def test_each_tensor_keeps_its_own_dtype(released, tmp_path):
    """Of a release in two precisions neither is widened or cut."""
    tensors = open_tensors(released)
    dtypes = {name: np.dtype(np.float32 if "projector" in name else np.float16) for name in tensors.shapes}
    src = tmp_path / "src"
    src.mkdir()
    specs = {name: (shape, dtypes[name]) for name, shape in tensors.shapes.items()}
    values = ((name, (tensors.read(name) / 3).astype(dtypes[name])) for name in specs)
    convert_module.write_safetensors(src, specs, values)
    (src / "config.json").write_text((released / "config.json").read_text())
    assert convert(src, tmp_path / "orbax")["dtype"] == "float16, float32"
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    convert_memory.compare(src, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_cut_off_shard_stops_a_conversion_before_it_begins(released, tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for file in released.iterdir():
        (src / file.name).write_bytes(file.read_bytes())
    last = max(src.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(WeightsError, match=f"{last.name} is cut off, damaged or no safetensors file: "):
        convert(src, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_failure_in_the_middle_leaves_nothing(to, released, tmp_path, monkeypatch):
    read, count = engine._rows, 0

    def fails(*args):
        nonlocal count
        count += 1
        if count == 30:
            raise OSError("planted")
        return read(*args)

    monkeypatch.setattr(engine, "_rows", fails)
    with pytest.raises(OSError, match="planted"):
        convert(released, tmp_path / "dst", to=to)
    assert count == 30
    assert not list(tmp_path.iterdir())


# Converts argv[1] into argv[2], and is killed when it reads its thirtieth tensor.
KILLED = """
import os, signal, sys
from pathlib import Path
from medcg_jax.families.weights import engine
from medcg_jax.families.weights.convert import convert
read, count = engine._rows, 0
def kills(*args):
    global count
    count += 1
    if count == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*args)
engine._rows = kills
convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3])
"""


# `medcg convert` where no file may grow past 100 kB: a write meets that as it meets a full disk, by the system's error.
FULL = """
import resource, sys
from medcg_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(["convert", sys.argv[1], sys.argv[2], f"--to={sys.argv[3]}"]))
"""


def child(program: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("to", ["orbax", pytest.param("hf", marks=pytest.mark.long)])
def test_a_killed_conversion_leaves_nothing_that_looks_like_a_checkpoint(to, released, tmp_path):
    dst = tmp_path / "dst"
    done = child(KILLED, released, dst, to)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not dst.exists()
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left and not {"model.json", "config.json"} & set(left)
    for path in tmp_path.iterdir():
        with pytest.raises(WeightsError, match="holds no checkpoint"):
            read_config(path)
    # The same command again: whole, and nothing else is there.
    convert(released, dst, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
    assert open_leaves(dst)["decoder"]["embed"]["table"].shape == (96, 256)


@pytest.mark.parametrize("to", [pytest.param("orbax", marks=pytest.mark.long), "hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(to, released, tmp_path):
    done = child(FULL, released, tmp_path / "dst", to)
    assert done.returncode == 1, done.stderr[-2000:]  # no wrong use: the same may work later
    assert len(done.stderr.splitlines()) == 1 and "File too large" in done.stderr, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


def test_parameters_that_cannot_be_read_are_named(released, tmp_path):
    convert(released, tmp_path / "orbax")
    file = tmp_path / "orbax" / "model.json"
    stated = file.read_text()
    file.write_text(stated.replace('"mlp_dim": 1024', '"mlp_dim": 512'))
    with pytest.raises(WeightsError, match="params holds other shapes than .*model.json states"):
        open_leaves(tmp_path / "orbax")
    file.write_text(stated)
    (tmp_path / "orbax" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(WeightsError, match="params cannot be read"):
        open_leaves(tmp_path / "orbax")
    assert cli.main(["convert", str(tmp_path / "orbax"), str(tmp_path / "dst"), "--to=hf"]) == 2


@pytest.mark.long
def test_the_measurement_measures_and_compares(tmp_path, monkeypatch):
    """At this size a process' libraries alone are above the limit: it can fail."""
    result = convert_memory.measure(tmp_path / "here", CONFIG, 5_000_000)
    assert result["compared"] == len(engine.slots(llava.table(CONFIG), convert_memory.build.abstract(CONFIG)[1]))
    assert not result["below_limit"]
    for to in ("orbax", "hf"):
        assert 10_000_000 < result[to]["RssAnon"] < result[to]["VmHWM"]
    path = max((tmp_path / "here" / "hf").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="did not come back as it was"):
        convert_memory.compare(tmp_path / "here" / "src", tmp_path / "here" / "hf")
    monkeypatch.setattr(convert_memory, "LIMIT_S", 0.2)
    with pytest.raises(RunError, match="not done after 0.2 s"):
        convert_memory.watched([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(RunError, match="exit status 3: oh"):
        monkeypatch.setattr(convert_memory, "LIMIT_S", 60)
        convert_memory.watched([sys.executable, "-c", "print('oh'); raise SystemExit(3)"])


def test_a_size_gives_its_number_of_layers():
    assert convert_memory.of_size(14.126e9).text.num_layers == 32
    assert convert_memory.of_size(0).text.num_layers == 1
