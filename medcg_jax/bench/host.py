"""What of a run is no computation on a device: its loader, conversion of weights, and the time until its first step."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import jax

from medcg_jax.bench.clock import Spent, now, spread, times, turns
from medcg_jax.bench.steps import Port
from medcg_jax.config import MODELS, MeshConfig, RunConfig, RunError, replace
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.pipeline import Batches
from medcg_jax.families import build
from medcg_jax.mesh import make_mesh, own_rows, put_batch
from medcg_jax.train.setup import Setup, model_config

# A model that is converted has at most so many bytes; of a larger one the family's tiny model stands in.
CONVERTED_BYTES = 2 << 30
PACKAGE = Path(__file__).resolve().parents[2]


def loader(setup: Setup, sets: dict[str, Encoded], repeats: int) -> dict:
    """Batches a second of each set of rows drained as fast as they come, one process's: {name: `times` and "bytes"}."""
    size = setup.run.train.batch_size
    streams = {name: stream_of(setup, encoded) for name, encoded in sets.items()}
    num_bytes = {}

    def drain(name: str) -> Callable[[int], None]:
        def run(steps: int) -> None:
            for _ in range(steps):
                batch, _ = next(streams[name])
            num_bytes[name] = sum(array.nbytes for array in batch.values())

        return run

    try:
        spent = turns({name: drain(name) for name in streams}, repeats)
    finally:
        for stream in streams.values():
            stream.close()
    found = {}
    for name, taken in spent.items():
        row = times(taken, size)
        rate = 1 / row["step_s"]["median"]
        found[name] = {**row, "batches_per_s": rate, "bytes_per_s": num_bytes[name] * rate}
    return found


def data_wait(port: Port, setup: Setup, encoded: Encoded, steps: int) -> dict:
    """{"share", "step_s"} of training fed by the loader: share (0-1) of the wall time spent waiting for a batch, and
    seconds of a step with its batch drawn and put on the devices. `port` is compiled for such batches."""
    stream, waited = stream_of(setup, encoded), 0.0
    state = port.state
    try:
        next(stream)  # the threads are running
        began = time.perf_counter()
        with jax.set_mesh(port.mesh):
            for _ in range(steps):
                asked = time.perf_counter()
                batch, _ = next(stream)
                waited += time.perf_counter() - asked
                on_device = put_batch(batch, port.program.batch_sharding)
                state, _ = port.compiled.call(state, port.frozen, port.hparams, on_device)
            port.state = jax.block_until_ready(state)
        seconds = time.perf_counter() - began
    finally:
        stream.close()
    return {"share": waited / seconds, "step_s": seconds / steps, "steps": steps}


def stream_of(setup: Setup, encoded: Encoded) -> Batches:
    size = setup.run.train.batch_size
    return Batches(encoded, batch_size=size, seed=0, rows=own_rows(setup.mesh, size))


def conversion(setup: Setup, repeats: int) -> dict:
    """Bytes a second of `medcg convert` in both directions, of random float32 weights in a temporary directory.

    {"model", "bytes", "to_orbax", "to_hf"}: the directions' spreads of bytes/s. The model is the run's where it has at
    most `CONVERTED_BYTES`, else its family's tiny one.
    """
    from medcg_jax.families.weights.convert import convert, export

    name, config = setup.run.model.name, setup.model
    if 4 * build.num_params(build.abstract(config)[1]) > CONVERTED_BYTES:
        name = next(tiny for tiny in build.TINY if MODELS[tiny] == MODELS[name])
        parts = replace(setup.run.model, name=name, trainable=("projector", "decoder"))
        config = model_config(parts, setup.tokenizer)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    _, params = build.create(config, mesh, seed=0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    rates: dict[str, list[float]] = {"to_orbax": [], "to_hf": []}
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "hf"
        export(params, config, src)
        for i in range(repeats):
            orbax, back = Path(folder) / f"orbax{i}", Path(folder) / f"back{i}"
            for way, args in (("to_orbax", (src, orbax)), ("to_hf", (orbax, back))):
                began = now()
                with redirect_stdout(io.StringIO()):
                    convert(*args, to=way.removeprefix("to_"))
                rates[way].append(size / now().since(began).wall_s)
    return {"model": name, "bytes": size, **{way: spread(found) for way, found in rates.items()}}


def startup(run: RunConfig, limit_s: float) -> dict:
    """Seconds from the start of a process to the end of its first training step: {"cold", "warm"}, each by phase.

    Each is a process of its own on random weights and the run's data: the first has an empty compilation cache, the
    second what the first left there. A phase's number is when it ended (`bench_startup.first_step`); "cpu_s" is all
    that the process used. On machines whose device one process alone can hold, it must run before this one takes it.
    limit_s: seconds that one of them may take; it is ended then.

    Raises:
      RunError: a process failed or took too long; with its last line.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "run.json"
        kept.write_text(json.dumps(dataclasses.asdict(run)))
        for name in ("cold", "warm"):
            found[name] = _first_step(kept, Path(folder) / "cache", limit_s)
    return found


def _first_step(kept: Path, cache: Path, limit_s: float) -> dict:
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "benchmarks.first_steps", str(kept)]
    before, began = now(), time.time()
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RunError(f"stage startup: no first step within {limit_s:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"stage startup: the process ended with {process.returncode}: {last[:300]}")
    marks = json.loads(out.strip().splitlines()[-1])
    spent: Spent = now().since(before)
    return {**{phase: at - began for phase, at in marks.items()}, "cpu_s": spent.children_cpu_s}
