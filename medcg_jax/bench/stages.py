"""The stages of `medcg bench` on a run's records: step, answers, loader, conversion, start-up.

A stage is `stage(ask, save)`, in a process of its own (`run`). Weights are random.
"""

import dataclasses
import io
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import jax
import numpy as np

from medcg_jax.bench.clock import Spent, matrix_rate, now, ratio, spread, times, turns
from medcg_jax.bench.rows import Rows, loader_rows, open_rows, question_rows, training_batch
from medcg_jax.bench.run import STAGES, Ask, read_json, run_stage
from medcg_jax.bench.steps import HF_BATCH, Port, describe, peak_bytes, rates, step_flops
from medcg_jax.config import MODELS, MeshConfig, RunError, model_title, replace
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.pipeline import Batches
from medcg_jax.eval.letters import evaluate, make_evaluator
from medcg_jax.families import build, flops
from medcg_jax.mesh import local_rows, make_mesh, put_batch
from medcg_jax.plan.topology import about_here
from medcg_jax.train.setup import Setup, model_config

# Most bytes of a model to convert; the family's tiny model replaces a larger one.
CONVERTED_BYTES = 2 << 30
# An id that no token has, so that random weights generate all tokens asked for.
NO_END = -1
TRAIN_PAIRS = {
    "train_vs_eager": ("port", "torch eager"),
    "train_vs_compile": ("port", "torch compile"),
    "train_vs_flash": ("port", "torch eager flash"),
}
ANSWER_PAIRS = {
    "eval_vs_generate": ("port letters", "torch generate"),
    "eval_vs_forward": ("port letters", "torch forward"),
    "generate_vs_generate": ("port generate", "torch generate"),
}


# ------------------------------------------------------------------ the training step


class Measure:
    """How runners are measured: `turns` with these settings, and ratios by `by` ("cpu" or "wall")."""

    def __init__(self, repeats: int = 5, steps: int = 0, clock: Callable[[], Spent] = now):
        self.repeats, self.steps, self.clock = repeats, steps, clock
        self.by = "cpu" if jax.default_backend() == "cpu" else "wall"

    def turns(self, runners: dict[str, Callable[[int], object]]) -> dict[str, list[Spent]]:
        return turns(runners, self.repeats, self.steps, clock=self.clock)

    def ratios(self, spent: dict[str, list[Spent]], pairs: dict[str, tuple[str, str]]) -> dict:
        """{name: ratio of (ours, theirs)} for the pairs of which both were measured."""
        return {
            name: ratio(spent[ours], spent[theirs], by=self.by)
            for name, (ours, theirs) in pairs.items()
            if ours in spent and theirs in spent
        }


def opened(ask: Ask, save: Callable) -> Rows:
    """The rows that the stage works on; saves the machine, the mesh and a note on stand-ins."""
    rows = open_rows(ask.run)
    save(about=about_here() | {"mesh": dict(rows.setup.mesh.shape)}, notes=notes_on(rows))
    return rows


def notes_on(rows: Rows) -> list[str]:
    """What a reader of the figures must know: stand-ins for the run's records, and other work on this machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    beside = f"other work ran beside this: a load of {load:.1f} on {cores} cores (times by CPU-second hold better)"
    return ([rows.note] if rows.note else []) + ([beside] if load > cores + 0.5 else [])


def train(ask: Ask, save: Callable) -> None:
    """Saves the figures of `training`, and the rate of matrix products."""
    if ask.against:
        from medcg_jax.bench import pytorch

        save(about={"attention": pytorch.attentions()})  # the import fails early where packages are missing
    rows = opened(ask, save)
    matrix = matrix_rate(ask.run.model.compute_dtype, sizes=ask.matrix_sizes)
    result = training(rows, ask.against, Measure(ask.repeats, ask.steps), matrix)
    save(**result | {"notes": notes_on(rows) + result["notes"]}, matrix=matrix)


def training(rows: Rows, against: str, measure: Measure, matrix: dict) -> dict:
    """{"batch", "flops", "compile", "runners", "data_wait", "ratios", "notes"} of the step, with the reference's beside."""
    setup, run, notes = rows.setup, rows.setup.run, []
    batch = training_batch(rows)
    port = Port(setup.model, setup.mesh, run.train, run.model, loss_fn=setup.loss)
    runners: dict[str, Callable[[int], object]] = {"port": port.seconds}
    if against:
        from medcg_jax.bench import pytorch

        reference = pytorch.Reference(setup.model, batch, run.train, run.model)
        check_alike(work_of(port, batch), reference.work())
    section = {"batch": describe(batch), "compile": port.compile(batch)}
    if against:
        section["torch_model"] = pytorch.families.side_of(setup.model).about
        section["work"] = reference.work()
        runners["torch eager"] = reference.seconds
        try:
            reference.compiled_seconds(1)
            runners["torch compile"] = reference.compiled_seconds
        except Exception as error:
            notes.append(f"torch.compile failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if "flash_attention_2" in pytorch.attentions():
            flash = pytorch.Reference(setup.model, batch, run.train, run.model, attention="flash_attention_2")
            runners["torch eager flash"] = flash.seconds
    spent = measure.turns(runners)
    needed = step_flops(setup.model, batch, run.model.trainable)
    figures = {name: step_figures(taken, batch, needed, matrix) for name, taken in spent.items()}
    if against:
        length = section["torch_length"] = reference.length
        executed = pytorch.families.executed(setup.model, len(batch["tokens"]), length, run.model.trainable)
        for name, row in figures.items():
            if name != "port":
                row |= {"executed_flops": executed, "peak_bytes": pytorch.peak_bytes()}
    figures["port"] |= {"peak_bytes": peak_bytes(), "loss": port.loss}
    if not rows.note:
        steps = max(2, min(50, round(2.0 / figures["port"]["step_s"]["median"])))
        section["data_wait"] = data_wait(port, setup, loader_rows(setup)["decoded when drawn"], steps)
    ratios = measure.ratios(spent, TRAIN_PAIRS)
    return section | {"flops": needed, "runners": figures, "ratios": ratios, "notes": notes}


def step_figures(taken: list[Spent], batch: dict, needed: dict | None, matrix: dict) -> dict:
    """`times` and `rates` of a step, and its MFU against the matrix product measured in this process: by wall time
    ("mfu_matrix", "mfu_matrix_causal") and by CPU time ("mfu_matrix_cpu", which other processes do not lower)."""
    row = times(taken, len(batch["tokens"])) | rates([step.wall_s for step in taken], batch, needed)
    if needed is None:
        return row
    # Simulated devices of a CPU share its cores.
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    wall, cpu = row["step_s"]["median"], row["cpu_s"]["median"]
    return row | {
        "mfu_matrix": needed["full"] / wall / (devices * matrix["flops_per_s"]),
        "mfu_matrix_causal": needed["causal"] / wall / (devices * matrix["flops_per_s"]),
        "mfu_matrix_cpu": needed["full"] / max(cpu, 1e-9) / matrix["flops_per_cpu_s"],
    }


def work_of(port: Port, batch: dict) -> dict[str, int]:
    """As `pytorch.Reference.work`, of the port."""
    return asked_of(port.config, batch) | {
        "targets": int(batch["target_weights"].sum()),
        "boxes": int((batch["box_weights"] > 0).sum()) if "box_weights" in batch else 0,
        "trained": build.num_params(port.abstract[0]),
    }


def asked_of(config: build.Config, batch: dict) -> dict[str, int]:
    """{"rows", "tokens", "image_tokens", "pixels"} of a batch, as `pytorch.read_by` has them of PyTorch's inputs."""
    real = batch["segment_ids"] != 0
    return {
        "rows": len(batch["tokens"]),
        "tokens": int(real.sum()),
        "image_tokens": int((real & (batch["tokens"] == config.image_token_id)).sum()),
        "pixels": image_pixels(batch),
    }


def image_pixels(batch: dict) -> int:
    """Numbers in the images of the port's batch, without the padding of images that have fewer patches than slots."""
    if "grids" in batch:
        return int(batch["grids"].prod(axis=-1).sum()) * batch["pixels"].shape[-1]
    return batch["pixels"].size


def check_alike(port: dict[str, int], reference: dict[str, int]) -> None:
    """Raises RunError where what the two sides count, as `pytorch.Reference.work`, differs."""
    different = [f"{name} {port[name]} against {reference[name]}" for name in port if port[name] != reference[name]]
    if different:
        raise RunError(f"port and reference do not do the same work: {', '.join(different)}")


def data_wait(port: Port, setup: Setup, encoded: Encoded, steps: int) -> dict:
    """{"share", "step_s", "steps"} of training fed by the loader: the share (0-1) of the wall time spent waiting for a
    batch, and seconds of a step with its batch drawn and put on the devices. `port` is compiled for such batches."""
    stream, waited, state = stream_of(setup, encoded), 0.0, port.state
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
    return Batches(encoded, batch_size=size, seed=0, rows=local_rows(setup.mesh, size))


# ------------------------------------------------------------------ answers


def answers(ask: Ask, save: Callable) -> None:
    """Saves times of option letters without generation, of generation, and of the reference's forward and generate; the
    port works as in `medcg eval`, from records to predictions."""
    rows = opened(ask, save)
    setup, run, num_new = rows.setup, ask.run, ask.run.eval.max_new_tokens
    encoded, measure = question_rows(rows), Measure(ask.repeats, ask.steps)
    with jax.set_mesh(setup.mesh):
        graphdef, params = build.create(setup.model, setup.mesh, seed=0)
    runners: dict[str, Callable[[int], object]] = {}
    needed = {}
    for stage, name, number in (("eval", "port letters", 0), ("generate", "port generate", num_new)):
        if stage in ask.stages:
            runners[name] = evaluation(setup, graphdef, params, encoded, num_new=number)
            needed[name] = needed_flops(setup, encoded, num_new=number)
    section = {
        "rows": len(encoded), "length": encoded.arrays["tokens"].shape[1],
        "real_tokens": int(encoded.arrays["length"].sum()), "batch_size": run.eval.batch_size,
        "max_new_tokens": num_new,
    }  # fmt: skip
    if ask.against:
        from medcg_jax.bench import pytorch

        batch = encoded.rows(np.arange(len(encoded)))[0]
        reference = pytorch.Answers(setup.model, batch, run.model, num_new=num_new)
        check_alike(asked_of(setup.model, batch), reference.work())
        if "eval" in ask.stages:
            runners["torch forward"] = reference.forward
        if why := pytorch.families.side_of(setup.model).no_generation:
            save(notes=[*notes_on(rows), why])
        else:
            runners["torch generate"] = reference.generate
            section["torch_generated_tokens"] = num_new
        section["torch_batch_size"] = HF_BATCH
    spent = measure.turns(runners)
    figures = {name: times(taken, len(encoded)) for name, taken in spent.items()}
    for name, total in needed.items():
        figures[name] |= {"flops": total, "tflops_per_s": total / figures[name]["step_s"]["median"] / 1e12}
    save(**section, runners=figures, ratios=measure.ratios(spent, ANSWER_PAIRS))


def evaluation(setup: Setup, graphdef, params, encoded: Encoded, *, num_new: int) -> Callable[[int], None]:
    """A runner that answers all rows of `encoded` (of `encode_eval`), generating `num_new` tokens for each."""
    evaluator = make_evaluator(
        setup.mesh, graphdef, build.shardings(setup.model, setup.mesh), eos_id=NO_END, max_new_tokens=num_new,
        generate=num_new > 0,
    )  # fmt: skip

    def run(steps: int) -> None:
        for _ in range(steps):
            evaluate(evaluator, params, encoded, setup.tokenizer, batch_size=setup.run.eval.batch_size)

    return run


def needed_flops(setup: Setup, encoded: Encoded, *, num_new: int) -> float:
    """FLOPs that the model needs for all rows at their real lengths: a forward pass with logits at one position, and
    `num_new` - 1 further tokens."""
    return sum(
        flops.evaluation(setup.model, num_rows=1, length=int(length), num_new=num_new)
        for length in encoded.arrays["length"]
    )


# ------------------------------------------------------------------ loader, conversion, start-up


def loader(ask: Ask, save: Callable) -> None:
    """Saves `times` and batches a second of one process that drains the loader, for each set of rows."""
    setup = opened(ask, save).setup
    size, num_bytes = setup.run.train.batch_size, {}
    streams = {name: stream_of(setup, encoded) for name, encoded in loader_rows(setup).items()}

    def drain(name: str) -> Callable[[int], None]:
        def run(steps: int) -> None:
            for _ in range(steps):
                batch, _ = next(streams[name])
            num_bytes[name] = sum(array.nbytes for array in batch.values())

        return run

    try:
        spent = turns({name: drain(name) for name in streams}, ask.repeats, ask.steps)
    finally:
        for stream in streams.values():
            stream.close()
    for name, taken in spent.items():
        row = times(taken, size)
        rate = 1 / row["step_s"]["median"]
        save(**{name: {**row, "batches_per_s": rate, "bytes_per_s": num_bytes[name] * rate}})


def convert(ask: Ask, save: Callable) -> None:
    """Saves {"model", "bytes", "to_orbax", "to_hf"}: spreads of bytes/s of `medcg convert` in both directions.

    Weights are random float32 in a temporary directory; of the run's model where that has at most `CONVERTED_BYTES`,
    else of its family's tiny one.
    """
    from medcg_jax.families.weights.convert import convert as convert_files
    from medcg_jax.families.weights.convert import export

    setup = opened(ask, save).setup
    model, config = setup.run.model, setup.model
    name = model_title(model.name, model.checkpoint)
    if 4 * build.num_params(build.abstract(config)[1]) > CONVERTED_BYTES:
        name = next(tiny for tiny in build.TINY if MODELS[tiny] == MODELS[model.name])
        config = model_config(replace(model, name=name, trainable=("projector", "decoder")), setup.tokenizer)
    _, params = build.create(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), seed=0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    speeds: dict[str, list[float]] = {"to_orbax": [], "to_hf": []}
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "hf"
        export(params, config, src)
        for i in range(min(ask.repeats, 3)):
            orbax, back = Path(folder) / f"orbax{i}", Path(folder) / f"back{i}"
            for way, args in (("to_orbax", (src, orbax)), ("to_hf", (orbax, back))):
                began = now()
                with redirect_stdout(io.StringIO()):
                    convert_files(*args, to=way.removeprefix("to_"))
                speeds[way].append(size / now().since(began).wall_s)
    save(model=name, bytes=size, **{way: spread(values) for way, values in speeds.items()})


def startup(ask: Ask, save: Callable) -> None:
    """Saves seconds from the start of a process to the end of its first training step: {"cold", "warm"}, by phase.

    Each is its own process with random weights and the run's data: the first has an empty compilation cache, the second
    the cache that the first filled. A phase's number is its end (`first_step`); "cpu_s" is the process's CPU time. This
    process takes no device, since on some machines only one process can hold it.

    Raises:
      RunError: a process failed or took too long.
    """
    limited = dataclasses.replace(ask, limit_s=min(ask.limit_s, STAGES["startup"].limit_s))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ask.scratch / "startup"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for name in ("cold", "warm"):
        file = ask.scratch / f"first_step_{name}.json"
        before, began = now(), time.time()
        status, _ = run_stage("first_step", limited, file, env=cache)
        saved = read_json(file)
        if status != "done":
            raise RunError(f"stage startup: no first step: {status}: {saved.get('error', 'no message')}")
        marks = {phase: at - began for phase, at in saved["marks"].items()}
        save(about=saved["about"], **{name: {**marks, "cpu_s": now().since(before).children_cpu_s}})


def first_step(ask: Ask, save: Callable) -> None:
    """Saves the Unix time at which each phase ended: "imports", "data" (rows encoded), "compiled", "first_step".

    The phases are those of `medcg train`, without a workdir.
    """
    marks = {"imports": time.time()}
    rows = open_rows(ask.run)
    batch = training_batch(rows)
    marks["data"] = time.time()
    port = Port(rows.setup.model, rows.setup.mesh, ask.run.train, ask.run.model, loss_fn=rows.setup.loss)
    port.compile(batch)
    marks["compiled"] = time.time()
    port.seconds(1)
    save(marks=marks | {"first_step": time.time()}, about=about_here())
