"""A run's programs, the training step and the tests of any family, compiled for a machine that may be absent.

Only shapes are used, no weights and no data: one record of the phantom world goes through the row format of the run's
model, at the lengths of the run's data.
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
from medcg_jax.data.records import Split
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
# The share of a device's memory left to allocators, collectives and other programs.
MARGIN = 0.1


@dataclass(frozen=True)
class PlannedRun:
    """A run on a mesh, and what its programs are compiled from.

    alone: the run is of `medcg train` or `medcg eval`, which hold no other arrays. A grid also holds the weights that
      its trainings start from, and tests while the state of its trainings is on the devices.
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
        """Cells of each group of devices."""
        return self.num_cells // self.mesh.shape["cell"]

    def params(self) -> nnx.State:
        """Abstract parameters of the whole model, with their shardings."""
        whole = build.join(self.trainable, self.frozen)
        return with_shardings(whole, build.shardings(self.setup.model, self.mesh))

    def state(self):
        """The abstract training state of all cells, with its shardings."""
        return self.program.abstract_state(self.trainable)


def architecture_of(model: ModelConfig) -> build.Config:
    """The architecture of a released size; of a tiny one, with the vocabulary of its small tokenizer."""
    return model_config(model, small_tokenizer(model)) if model.name in build.TINY else build.architecture(model)


def small_tokenizer(model: ModelConfig) -> Tokenizer:
    """The packaged tokenizer of the model's family; it gives rows of the right shapes."""
    return load_tokenizer("", registry.of_model(model.name).tokenizer)


def plan_run(run: RunConfig, mesh: Mesh, *, alone: bool = False, model: build.Config | None = None) -> PlannedRun:
    """The run's programs as `study` and `train` make them, without weights and data; model: in place of the run's own.

    Raises:
      ConfigError: the mesh does not divide the batches, the model or the cells.
    """
    check_batch(mesh, run.train.batch_size // run.train.accumulation_steps, "train.batch_size per accumulation step")
    check_batch(mesh, run.eval.batch_size, "eval.batch_size")
    model = model or architecture_of(run.model)
    row_format = registry.of(model).row_format(model, with_masks=trains_masks(run.model))
    # The small tokenizer knows only the phantom's words.
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
    """(the run's training step for `num_cells` cells on `mesh`, abstract trainable, abstract frozen parameters of a cell).

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
    """Whether XLA writes its warnings in this process; it reads the variable once, when it is loaded."""
    return os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") in ("0", "1")


# ------------------------------------------------------------------ batches


def train_rows(setup: Setup) -> Encoded:
    """One training row, as long as the longest of the grid."""
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


def _one_record(setup: Setup, split: Split):
    return setup.source.records(setup.source.subsets[0].name, split).select([0])


def batch_of(rows: Encoded, batch_size: int) -> Shapes:
    """The shapes of a batch of `batch_size` rows like this one."""
    batch, _ = rows.rows(np.zeros(1, np.int64))
    return {key: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype) for key, array in batch.items()}


# ------------------------------------------------------------------ compiling


@dataclass(frozen=True)
class Compiled:
    """A compiled program, or None with the compiler's refusal for lack of memory.

    options: of `topology.compiler_options`. output: what the compiler wrote to standard error. seconds, cpu_s: wall and
    CPU time of compiling.
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
        with captured_stderr([]):  # on failure libtpu writes its stack trace
            return topology.text_of(self.program, self.options)


def compile_training(planned: PlannedRun, batch_size: int, countable: bool = True) -> Compiled:
    """The training step at this batch size; countable: as in `topology.compiler_options`.

    Raises:
      RunError: it cannot be compiled for a reason other than memory.
    """
    batch = batch_of(train_rows(planned.setup), batch_size)
    options = topology.compiler_options(planned.mesh.devices.flat[0], countable)
    return compiled(
        "the training step", options,
        lambda: planned.program.compile(planned.trainable, planned.frozen, batch, options)[1],
    )  # fmt: skip


def compile_tests(planned: PlannedRun, countable: bool = True) -> Compiled:
    """The program that answers a batch of choice questions; countable: as in `topology.compiler_options`.

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
    options = topology.compiler_options(mesh.devices.flat[0], countable)

    def build_program() -> jax.stages.Compiled:
        with jax.set_mesh(mesh):
            return evaluator.jitted.lower(planned.params(), batch).compile(options)

    return compiled("the program of tests", options, build_program)


def compiled(title: str, options: dict, build_program: Callable[[], jax.stages.Compiled]) -> Compiled:
    """The program that `build_program` compiles, as a `Compiled`.

    Raises:
      RunError: it cannot be compiled for a reason other than memory; the message names it by `title`.
    """
    before, output = os.times(), []
    program, refusal = None, ""
    with captured_stderr(output):
        try:
            program = build_program()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            refusal = " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in refusal:
                # The program would fail in a real run too: a kernel's limit, or a size that the mesh does not divide.
                raise RunError(f"{title} cannot be compiled: {type(error).__name__}: {refusal[:300]}") from error
    after = os.times()
    cpu = after.user + after.system - before.user - before.system
    return Compiled(program, options, refusal, output[0], after.elapsed - before.elapsed, cpu)


@contextlib.contextmanager
def captured_stderr(output: list[str]) -> Iterator[None]:
    """Appends to `output`, as one text, what this process and its libraries write to standard error in the block.

    Where the block raises an error other than those reported in one line, the text goes to standard error after all.
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
    """Sets the compiler's effort in the block: full as in a real run, or the least. The cache of compiled programs is
    off, since a cached program has no warnings and no compile time of its own."""
    changes = {} if full else {"jax_optimization_level": "O0", "jax_exec_time_optimization_effort": -1.0}
    settings = {"jax_enable_compilation_cache": False} | changes
    # jax 0.11 has only the first of the two.
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
    """How many cells fit at once: 0 where one in each group does not fit.

    peaks: number of cells -> peak bytes of a device, for every compiled program; inf: the compiler refused it.
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

    A program fits where the compiler's peak, arguments included, is within the usable memory. The peak grows by the same
    bytes for each further cell of a group, so two programs predict the largest number, which is compiled to confirm it;
    if it does not fit, the search goes on between the numbers known to fit and not to fit.

    compile_cells: compiles the program of a number of cells, and allocates nothing.
    num_groups: groups of devices with cells of their own: the size of the mesh's axis `cell`.
    limit_bytes: memory of one device (`topology.memory_bytes`). margin: the share of it that is left free.

    Raises:
      ValueError: `most` is below `num_groups`, or the compiler states no peak.
    """
    if most < num_groups:
        raise ValueError(f"most={most}: expected at least one cell in each of {num_groups} groups")
    usable, peaks = limit_bytes * (1 - margin), {}

    def fits(local: int) -> bool:
        num_cells = local * num_groups
        if num_cells not in peaks:
            try:
                analysis = compile_cells(num_cells).memory_analysis()
                peaks[num_cells] = getattr(analysis, "peak_memory_in_bytes", 0)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                peaks[num_cells] = math.inf
            if not peaks[num_cells]:
                raise ValueError(f"the compiler gives no peak memory for {num_cells} cells")
        return peaks[num_cells] <= usable

    # `low` cells in a group fit; `high` do not fit, or exceed `most`.
    low, high = 0, most // num_groups + 1
    guess = 1
    while low + 1 < high:
        low, high = (guess, high) if fits(guess) else (low, guess)
        predicted = _predicted(peaks, num_groups, usable, low)
        # A refuted prediction is of no use: bisect.
        guess = (low + high) // 2 if predicted >= high <= most // num_groups else min(max(predicted, low + 1), high - 1)
    return FittingCells(low * num_groups, dict(sorted(peaks.items())), usable)


def _predicted(peaks: dict[int, float], num_groups: int, usable: float, low: int) -> int:
    """Cells of a group that would fill the memory, extrapolated from the two largest programs with a known peak."""
    known = sorted((cells // num_groups, peak) for cells, peak in peaks.items() if peak < math.inf)[-2:]
    if len(known) < 2:
        return low + 1
    (fewer, lower), (more, upper) = known
    each = (upper - lower) / (more - fewer)
    return more + math.floor((usable - upper) / each) if each > 0 else sys.maxsize


def fitting_run(run: RunConfig, where: str, *, num_groups: int, most: int = 64) -> FittingCells:
    """`fitting_cells` of a run's training step on a topology (or "local").

    Raises:
      ConfigError: the mesh does not fit the devices or the batch, or the devices' memory is not known.
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
