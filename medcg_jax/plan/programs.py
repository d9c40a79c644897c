"""The product's own programs for a machine that need not be there: the training step and the tests, of any family.

Rows are of the shapes that the data room makes: one record of the phantom world goes through the format of the run's
model, at the lengths of the run's data. Shapes alone are used; neither weights nor data need be there.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from medcg_jax.plan import cells, topology
from medcg_jax.train.setup import Setup, model_config
from medcg_jax.train.step import Program, with_shardings

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Subject:
    """A run on a mesh, and what its programs are compiled of.

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
    """The packaged tokenizer of the model's family, which makes rows of the right shapes."""
    return load_tokenizer("", registry.of_model(model.name).tokenizer)


def make_subject(run: RunConfig, mesh: Mesh) -> Subject:
    """The run as `study` and `train` make it, without weights and data.

    Raises:
      ConfigError: the mesh does not divide the batches, the model or the cells.
    """
    check_batch(mesh, run.train.batch_size // run.train.accumulation_steps, "train.batch_size per accumulation step")
    check_batch(mesh, run.eval.batch_size, "eval.batch_size")
    model = architecture_of(run.model)
    tokenizer = small_tokenizer(run.model)
    made = registry.of(model).row_format(model, with_masks=trains_masks(run.model))
    # The small tokenizer knows the phantom's words, and no others.
    run = replace(run, data__system_prompt="")
    setup = Setup(run, mesh, tokenizer, model, made, PhantomSource(0, 8, 8))
    num_cells = run.study.cells_at_once or mesh.shape["cell"]
    try:
        parts = cells.make_program(run, model, mesh, num_cells=num_cells, loss_fn=setup.loss)
    except ValueError as error:
        raise ConfigError(f"mesh {dict(mesh.shape)}: {error}") from error
    return Subject(setup, num_cells, *parts)


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
class Made:
    """A program: compiled, or why the compiler refused it for want of memory; and what the compiler wrote meanwhile.

    options: what it was compiled with, of `topology.compiler_options`.
    """

    compiled: jax.stages.Compiled | None
    options: dict
    refusal: str
    output: str
    seconds: float
    cpu_s: float


def compile_training(subject: Subject, batch_size: int) -> Made:
    """The training step at this batch size.

    Raises:
      RunError: it cannot be compiled, for another reason than memory.
    """
    batch = batch_of(train_rows(subject.setup), batch_size)
    options = topology.compiler_options(subject.mesh.devices.flat[0])

    def build_it() -> jax.stages.Compiled:
        return subject.program.compile(subject.trainable, subject.frozen, batch, options)[1]

    return _made("the training step", options, build_it)


def compile_tests(subject: Subject) -> Made:
    """The program that answers a batch of choice questions.

    Raises:
      RunError: as `compile_training`.
    """
    setup, config = subject.setup, subject.run.eval
    evaluator = make_evaluator(
        subject.mesh, subject.program.graphdef, build.shardings(setup.model, subject.mesh),
        eos_id=setup.model.eos_token_id, max_new_tokens=config.max_new_tokens, generate=config.generate,
    )  # fmt: skip
    placed = batch_sharding(subject.mesh)
    shapes = batch_of(eval_rows(setup), config.batch_size)
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for key, x in shapes.items()}
    options = topology.compiler_options(subject.mesh.devices.flat[0])

    def build_it() -> jax.stages.Compiled:
        with jax.set_mesh(subject.mesh):
            return evaluator.jitted.lower(subject.params(), batch).compile(options)

    return _made("the program of tests", options, build_it)


def fitting_run(run: RunConfig, where: str, *, num_groups: int, most: int = 64) -> cells.Fit:
    """`cells.fitting_cells` of a run's own training step on a topology (or "local"), with that device's memory.

    Raises:
      ConfigError: the mesh does not fit the devices or the batch, or the memory of the devices is not known.
    """
    mesh = make_mesh(replace(run, mesh__cell=num_groups).mesh, topology.get_devices(where))
    limit = topology.memory_bytes(mesh.devices.flat[0])
    options = topology.compiler_options(mesh.devices.flat[0])

    def compile_cells(num_cells: int) -> jax.stages.Compiled:
        subject = make_subject(replace(run, study__cells_at_once=num_cells), mesh)
        batch = batch_of(train_rows(subject.setup), run.train.batch_size)
        return subject.program.compile(subject.trainable, subject.frozen, batch, options)[1]

    return cells.fitting_cells(compile_cells, num_groups=num_groups, limit_bytes=limit, most=most)


def _made(what: str, options: dict, build_it: Callable[[], jax.stages.Compiled]) -> Made:
    before, output = os.times(), []
    compiled, refusal = None, ""
    with captured_stderr(output):
        try:
            compiled = build_it()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            refusal = " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in refusal:
                # The same program would stop a real run: a kernel's limits, a size that a mesh does not divide.
                raise RunError(f"{what} cannot be compiled: {type(error).__name__}: {refusal[:300]}") from error
    after = os.times()
    cpu = after.user + after.system - before.user - before.system
    return Made(compiled, options, refusal, output[0], after.elapsed - before.elapsed, cpu)


@contextlib.contextmanager
def captured_stderr(output: list[str]) -> Iterator[None]:
    """What this process, its libraries included, writes to standard error meanwhile goes to `output`, as one text.

    Where the block raises anything but what is told in one line, it is written to standard error after all.
    """
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except (ConfigError, RunError, jax.errors.JaxRuntimeError):
            raise
        except BaseException:
            os.dup2(kept, 2)
            file.seek(0)
            os.write(2, file.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        output.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def effort(full: bool) -> Iterator[None]:
    """The compiler's effort meanwhile: full as in a real run, or as little as it can. Nothing comes from a cache of
    compiled programs: of those the compiler says nothing, and their seconds are not its own."""
    wanted = {"jax_enable_compilation_cache": False}
    wanted |= {} if full else cells.fast_flags()
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
