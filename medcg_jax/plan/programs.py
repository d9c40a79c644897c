"""A run's own programs, compiled for a machine that need not be there: the training step and the tests, of any family.

Rows are of the shapes that the data room makes: one record of the phantom world goes through the format of the run's
model, at the lengths of the run's data. Shapes alone are used; neither weights nor data need be there.
"""

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from medcg_jax.config import BOX_TABLES, ConfigError, ModelConfig, RunConfig, RunError, replace, trains_masks
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.phantom.source import PhantomSource
from medcg_jax.data.tokenizer import Tokenizer, load_tokenizer
from medcg_jax.eval.letters import make_evaluator
from medcg_jax.families import build, registry
from medcg_jax.mesh import batch_sharding, check_batch, make_mesh
from medcg_jax.plan import topology
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import make_optimizer
from medcg_jax.train.setup import Setup, model_config
from medcg_jax.train.step import Program, make_step, with_shardings

Shapes = dict[str, jax.ShapeDtypeStruct]
# What allocators, collectives and other programs take beside a step, as a part of a device's memory.
MARGIN = 0.1


@dataclass(frozen=True)
class PlannedRun:
    """A run on a mesh, and what its programs are compiled from.

    alone: a run of `medcg train` and `medcg eval`, which keep nothing beside their programs. A grid keeps what a
      training starts from, and tests while the state of its trainings is there.
    """

    setup: Setup
    num_cells: int
    program: Program
    trainable: nnx.State
    frozen: nnx.State
    alone: bool = False

    @property
    def run(self) -> RunConfig:
        return self.setup.run

    @property
    def mesh(self) -> Mesh:
        return self.setup.mesh

    @property
    def cells_each(self) -> int:
        """Cells that a device has a part of."""
        return self.num_cells // self.mesh.shape["cell"]

    def params(self) -> nnx.State:
        """Abstract parameters of the whole model, with their shardings."""
        whole = build.join(self.trainable, self.frozen)
        return with_shardings(whole, build.shardings(self.setup.model, self.mesh))

    def state(self):
        """The abstract training state of all cells, with its shardings."""
        return self.program.abstract_state(self.trainable)


def architecture_of(model: ModelConfig) -> build.Config:
    """The architecture that a released size has of its own, or a tiny one with its small tokenizer's vocabulary."""
    return model_config(model, small_tokenizer(model)) if model.name in build.TINY else build.architecture(model)


def small_tokenizer(model: ModelConfig) -> Tokenizer:
    """The packaged tokenizer of the model's family, which gives rows of the right shapes."""
    return load_tokenizer("", registry.of_model(model.name).tokenizer)


def plan_run(run: RunConfig, mesh: Mesh, *, alone: bool = False) -> PlannedRun:
    """The run as `study` and `train` make it, without weights and data.

    Raises:
      ConfigError: the mesh does not divide the batches, the model or the cells.
    """
    check_batch(mesh, run.train.batch_size // run.train.accumulation_steps, "train.batch_size per accumulation step")
    check_batch(mesh, run.eval.batch_size, "eval.batch_size")
    model = architecture_of(run.model)
    row_format = registry.of(model).row_format(model, with_masks=trains_masks(run.model))
    # The small tokenizer knows the phantom's words, and no others.
    run = replace(run, data__system_prompt="")
    setup = Setup(run, mesh, small_tokenizer(run.model), model, row_format, PhantomSource(0, 8, 8))
    num_cells = run.study.cells_at_once or mesh.shape["cell"]
    try:
        program, trainable, frozen = make_program(run, model, mesh, num_cells=num_cells, loss_fn=setup.loss)
    except ValueError as error:
        raise ConfigError(f"mesh {dict(mesh.shape)}: {error}") from error
    return PlannedRun(setup, num_cells, program, trainable, frozen, alone)


def make_program(
    run: RunConfig, config: build.Config, mesh: Mesh, *, num_cells: int, loss_fn: Callable = token_loss
) -> tuple[Program, nnx.State, nnx.State]:
    """(the run's training step for `num_cells` cells on `mesh`, abstract trainable and frozen parameters of one run).

    config: the architecture. loss_fn: as `train.setup.Setup.loss`.
    """
    graphdef, params = build.abstract(config)
    split = partial(build.split_trainable, names=run.model.trainable)
    program = make_step(
        mesh, graphdef, *split(build.shardings(config, mesh)), make_optimizer(run.train), num_cells=num_cells,
        loss_fn=loss_fn, accumulation_steps=run.train.accumulation_steps, compute_dtype=run.model.compute_dtype,
    )  # fmt: skip
    return program, *split(params)


def hears_compiler() -> bool:
    """Whether the compiler's warnings are written in this process: XLA reads the variable once, when it is loaded."""
    return os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") in ("0", "1")


# ------------------------------------------------------------------ batches


def train_rows(setup: Setup) -> Encoded:
    """One training row, as long as the grid's longest."""
    data = setup.run.data
    boxes = set(setup.run.study.tables) & set(BOX_TABLES)
    lengths = {
        "max_text_tokens": boxes and data.max_box_text_tokens or data.max_text_tokens,
        "max_target_tokens": boxes and data.max_box_target_tokens or data.max_target_tokens,
    }
    return setup.encode(_one_record(setup, "train"), **lengths)


def eval_rows(setup: Setup) -> Encoded:
    """One test row of a choice question."""
    return setup.encode_eval(_one_record(setup, "test"))


def _one_record(setup: Setup, split: str):
    return setup.source.records(setup.source.subsets[0].name, split).select([0])


def batch_of(rows: Encoded, batch_size: int) -> Shapes:
    """The shapes of a batch of so many rows like this one."""
    batch, _ = rows.rows(np.zeros(1, np.int64))
    return {key: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype) for key, array in batch.items()}


# ------------------------------------------------------------------ compiling


@dataclass(frozen=True)
class Compiled:
    """A compiled program, or why the compiler refused it for want of memory; and what the compiler wrote meanwhile.

    options: what it was compiled with, of `topology.compiler_options`. seconds, cpu_s: that compiling took.
    """

    program: jax.stages.Compiled | None
    options: dict
    refusal: str
    output: str
    seconds: float
    cpu_s: float

    def text(self) -> str:
        """The optimised program's text.

        Raises:
          JaxRuntimeError, ValueError: the compiler cannot write it.
        """
        with captured_stderr([]):  # where it fails libtpu writes a trace of its own stack
            return topology.text_of(self.program, self.options)


def compile_training(planned: PlannedRun, batch_size: int) -> Compiled:
    """The training step at this batch size.

    Raises:
      RunError: it cannot be compiled, for another reason than memory.
    """
    batch = batch_of(train_rows(planned.setup), batch_size)
    options = topology.compiler_options(planned.mesh.devices.flat[0])
    return compiled(
        "the training step", options,
        lambda: planned.program.compile(planned.trainable, planned.frozen, batch, options)[1],
    )  # fmt: skip


def compile_tests(planned: PlannedRun) -> Compiled:
    """The program that answers a batch of choice questions.

    Raises:
      RunError: as `compile_training`.
    """
    setup, config, mesh = planned.setup, planned.run.eval, planned.mesh
    evaluator = make_evaluator(
        mesh, planned.program.graphdef, build.shardings(setup.model, mesh), eos_id=setup.model.eos_token_id,
        max_new_tokens=config.max_new_tokens, generate=config.generate,
    )  # fmt: skip
    shapes, sharding = batch_of(eval_rows(setup), config.batch_size), batch_sharding(mesh)
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for key, x in shapes.items()}
    options = topology.compiler_options(mesh.devices.flat[0])

    def build_it() -> jax.stages.Compiled:
        with jax.set_mesh(mesh):
            return evaluator.jitted.lower(planned.params(), batch).compile(options)

    return compiled("the program of tests", options, build_it)


def compiled(what: str, options: dict, build_it: Callable[[], jax.stages.Compiled]) -> Compiled:
    """What `build_it` compiles, with its seconds.

    Raises:
      RunError: it cannot be compiled, for another reason than memory; named `what`.
    """
    before, output = os.times(), []
    program, refusal = None, ""
    with captured_stderr(output):
        try:
            program = build_it()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            refusal = " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in refusal:
                # The same program would stop a real run: a kernel's limits, a size that a mesh does not divide.
                raise RunError(f"{what} cannot be compiled: {type(error).__name__}: {refusal[:300]}") from error
    after = os.times()
    cpu = after.user + after.system - before.user - before.system
    return Compiled(program, options, refusal, output[0], after.elapsed - before.elapsed, cpu)


@contextlib.contextmanager
def captured_stderr(output: list[str]) -> Iterator[None]:
    """What this process, its libraries included, writes to standard error meanwhile goes to `output`, as one text.

    Where the block raises anything but what is told in one line, it is written to standard error after all.
    """
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except (ConfigError, RunError, jax.errors.JaxRuntimeError):
            raise
        except BaseException:
            os.dup2(stderr, 2)
            file.seek(0)
            os.write(2, file.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        output.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def effort(full: bool) -> Iterator[None]:
    """The compiler's effort meanwhile: full as in a real run, or as little as it can. Nothing comes from a cache of
    compiled programs: of those the compiler says nothing, and their seconds are not its own."""
    fast = {} if full else {"jax_optimization_level": "O0", "jax_exec_time_optimization_effort": -1.0}
    settings = {"jax_enable_compilation_cache": False} | fast
    # jax 0.11 has the first of the two alone.
    before = {name: getattr(jax.config, name) for name in settings if hasattr(jax.config, name)}
    try:
        for name, value in {name: settings[name] for name in before}.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# ------------------------------------------------------------------ as many cells as fit


@dataclass(frozen=True)
class FittingCells:
    """How many cells fit at once: 0 where not one does in every group.

    peaks: cells -> peak bytes of a device, of every program that was compiled; inf: the compiler said it does not fit.
    usable_bytes: of a device, less the margin.
    """

    num_cells: int
    peaks: dict[int, float]
    usable_bytes: float


def fitting_cells(
    compile_cells: Callable[[int], jax.stages.Compiled],
    *,
    num_groups: int,
    limit_bytes: float,
    margin: float = MARGIN,
    most: int = 64,
) -> FittingCells:
    """The largest number of cells, a multiple of `num_groups` and at most `most`, whose program fits a device's memory.

    What fits is what the compiler says: the peak that its plan of buffers has at any moment, arguments included. It
    grows by the same bytes for each further cell of a group, so two programs foretell the third, which is compiled to
    confirm it; where it does not, the search goes on between what fitted and what did not.

    compile_cells: the program of so many cells, compiled (allocates nothing).
    num_groups: of devices, each with its own cells: the size of the mesh's axis `cell`.
    limit_bytes: memory of one device (`topology.memory_bytes`). margin: part of it that is left free.

    Raises:
      ValueError: `most` is below `num_groups`, or the compiler gives no peak.
    """
    if most < num_groups:
        raise ValueError(f"most={most}: expected at least one cell in each of {num_groups} groups")
    usable, peaks = limit_bytes * (1 - margin), {}

    def fits(local: int) -> bool:
        if local * num_groups not in peaks:
            peaks[local * num_groups] = _peak(compile_cells, local * num_groups)
        return peaks[local * num_groups] <= usable

    # `good` cells in a group fit, `bad` do not; none is known to fit at first, and more than `most` are not asked for.
    good, bad = 0, most // num_groups + 1
    guess = 1
    while good + 1 < bad:
        good, bad = (guess, bad) if fits(guess) else (good, guess)
        predicted = _predicted(peaks, num_groups, usable, good)
        # A number that was refuted foretells nothing more: halfway then.
        guess = (good + bad) // 2 if predicted >= bad <= most // num_groups else min(max(predicted, good + 1), bad - 1)
    return FittingCells(good * num_groups, dict(sorted(peaks.items())), usable)


def _predicted(peaks: dict[int, float], num_groups: int, usable: float, good: int) -> int:
    """Cells in a group that would fill the memory, by the two largest programs with a known peak."""
    known = sorted((cells // num_groups, peak) for cells, peak in peaks.items() if peak < math.inf)[-2:]
    if len(known) < 2:
        return good + 1
    (fewer, low), (more, high) = known
    each = (high - low) / (more - fewer)
    return more + math.floor((usable - high) / each) if each > 0 else sys.maxsize


def _peak(compile_cells: Callable[[int], jax.stages.Compiled], num_cells: int) -> float:
    try:
        analysis = compile_cells(num_cells).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    if not peak:
        raise ValueError(f"the compiler gives no peak memory for {num_cells} cells")
    return peak


def fitting_run(run: RunConfig, where: str, *, num_groups: int, most: int = 64) -> FittingCells:
    """`fitting_cells` of a run's own training step on a topology (or "local"), with that device's memory.

    Raises:
      ConfigError: the mesh does not fit the devices or the batch, or the memory of the devices is not known.
    """
    mesh = make_mesh(replace(run, mesh__cell=num_groups).mesh, topology.get_devices(where))
    limit = topology.memory_bytes(mesh.devices.flat[0])
    options = topology.compiler_options(mesh.devices.flat[0])

    def compile_cells(num_cells: int) -> jax.stages.Compiled:
        planned = plan_run(replace(run, study__cells_at_once=num_cells), mesh)
        batch = batch_of(train_rows(planned.setup), run.train.batch_size)
        return planned.program.compile(planned.trainable, planned.frozen, batch, options)[1]

    return fitting_cells(compile_cells, num_groups=num_groups, limit_bytes=limit, most=most)


def print_fitting(cells: FittingCells, where: str, num_groups: int) -> None:
    for number, peak in cells.peaks.items():
        print(f"  {number:4} cells: peak {peak / topology.GIB:.3f} GiB a device")
    usable = cells.usable_bytes / topology.GIB
    print(f"{cells.num_cells} cells fit {where} in {num_groups} groups ({usable:.2f} GiB usable a device)")
