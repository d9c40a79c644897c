"""One run of the training loop: its parts, its progress, and all that it writes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from medcg_jax.config import RunError, TrainConfig
from medcg_jax.train.checkpoint import Checkpoints
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.log import MetricsFile, StepTrace, WandbTarget
from medcg_jax.train.meta import check_same_run
from medcg_jax.train.optim import Hparams
from medcg_jax.train.step import TrainState


class NonFiniteLoss(RunError):
    """A loss or a gradient is not finite; the message is one line for the user.

    Attributes:
      run: its name.
      step: updates made, including the one with this loss.
      records: ids of the records in this process's rows of the batch.
      checkpoint: the last good checkpoint, or None.
    """

    def __init__(self, run: str, step: int, loss: float, grad_norm: float, records: list[str], checkpoint: Path | None):
        self.run, self.step, self.records, self.checkpoint = run, step, records, checkpoint
        last = f"last good checkpoint {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{run}: step {step} has loss {loss:g} and gradient norm {grad_norm:g}; {last}; "
            f"records of the batch: {', '.join(records)}"
        )


class Stream(Protocol):
    """Batches from a position on, as from `data.pipeline.Batches`: yields (batch, ids of its records)."""

    def __next__(self) -> tuple[dict[str, np.ndarray], list[str]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class RunSpec:
    """What a run is made of.

    hparams: run-time values (`optim.hparams_from`); runs of one program may differ in all of them.
    open_stream: takes the number of batches drawn before; gives the run's batches from there on.
    metrics: file for its metrics; None: they are not kept. tensorboard: directory, wandb: target; None: not used.
    checkpoints: directory; None: nothing is saved, and a stopped run starts over.
    config: JSON that is kept in the checkpoints; a checkpoint with another one is an error.
    flops_per_step: FLOPs that the model needs for one step (`setup.step_flops`); None: not known.
    pixels: keys of a batch's images; the loop first checks that the model sees them. (): no check.
    """

    name: str
    hparams: Hparams
    open_stream: Callable[[int], Stream]
    metrics: Path | None = None
    tensorboard: Path | None = None
    wandb: WandbTarget | None = None
    checkpoints: Path | None = None
    config: dict = field(default_factory=dict)
    flops_per_step: float | None = None
    pixels: tuple[str, ...] = ()


@dataclass
class RunResult:
    """How a run ended: updates made, its last line of metrics, the error that stopped it (None: it is complete), and
    a line for each damaged checkpoint that was set aside."""

    name: str
    step: int = 0
    metrics: dict = field(default_factory=dict)
    error: NonFiniteLoss | None = None
    skipped_checkpoints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How a loop logs, saves and reports.

    Attributes:
      checkpoint_every_steps: 0: only at the end.
      keep_start: False: once the only run has begun, the parameters that it started from are deleted to free memory.
      peak_flops: of all devices together. Where it, or a run's `flops_per_step`, is None, mfu is null. With several
        runs, mfu is that of the program.
      progress: called at every check with ({name: updates made} of the runs in their slots, text); replaces the bar
        on stderr.
      label: the run's name in the bar; "": its own name.
      goodput: clock of the run, or of all runs of this process.
      trace: profiles some steps.
    """

    log_every_steps: int = 10
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    keep_start: bool = True
    peak_flops: float | None = None
    progress: Callable[[dict[str, int], str], None] | None = None
    label: str = ""
    goodput: Goodput = field(default_factory=Goodput)
    trace: StepTrace | None = None


def loop_options(train: TrainConfig) -> dict[str, int]:
    """The fields of a training's configuration that are `Options` of the loop."""
    names = ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps")
    return {name: getattr(train, name) for name in names}


class ActiveRun:
    """A run under way. `step` counts the updates handed to the device, `result.step` those whose loss was checked.

    report: prints a line for people.
    """

    def __init__(self, spec: RunSpec, options: Options, report: Callable[[str], None]):
        self.spec, self.result = spec, RunResult(spec.name)
        self.step, self.total = 0, int(spec.hparams["total_steps"])
        self._options, self._report = options, report
        self._checkpoints = None
        if spec.checkpoints:
            keep, every = options.keep_checkpoints, options.keep_every_steps
            self._checkpoints = Checkpoints(spec.checkpoints, keep=keep, keep_every_steps=every, report=report)
        self._saved_step = -1
        self._losses: list[float] = []  # since the last line of metrics
        self._stream: Any = None  # a `Stream`, once the run is open
        self._file: MetricsFile | None = None
        self._drawn: tuple[dict[str, np.ndarray], list[str]] | None = None

    @property
    def active(self) -> bool:
        return self.result.error is None and self.step < self.total

    @property
    def over(self) -> bool:
        """Complete with every loss checked, or diverged."""
        return self.result.error is not None or self.result.step == self.total

    @property
    def log_due(self) -> bool:
        return self.active and self.step % self._options.log_every_steps == 0 or self._at_end

    @property
    def save_due(self) -> bool:
        every = self._options.checkpoint_every_steps
        return self.active and bool(every) and self.step % every == 0 or self._at_end

    @property
    def _at_end(self) -> bool:
        """The last update was handed to the device, and its loss is not checked yet."""
        return self.result.error is None and self.step == self.total != self.result.step

    def resume(self, abstract: Callable[[], TrainState]) -> TrainState | None:
        """The state in the newest whole checkpoint, with the shardings of `abstract()`; None without a checkpoint.

        Raises:
          CheckpointError: no checkpoint can be read, or it belongs to another run.
        """
        if self._checkpoints is None or (restored := self._checkpoints.restore(abstract())) is None:
            return None
        state, meta = restored
        check_same_run(meta["config"], json.loads(json.dumps(self.spec.config)), self._checkpoints.directory)
        self.step = self.result.step = self._saved_step = meta["position"]
        self.result.metrics, self._losses = meta["metrics"], meta["losses"]
        self.result.skipped_checkpoints = self._checkpoints.skipped
        self._report(f"{self.spec.name}: going on from step {self.step} of {self.total}")
        return state

    def open(self) -> None:
        """Opens the stream and the metrics file at the run's step."""
        spec = self.spec
        self._stream = spec.open_stream(self.step)
        if spec.metrics and jax.process_index() == 0:
            self._file = MetricsFile(spec.metrics, step=self.step, tensorboard=spec.tensorboard, wandb=spec.wandb)

    def draw(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """(next batch, its records), counted as a step. A run that has ended gives any batch (the step ignores it) and
        no records."""
        if self.active or self._drawn is None:
            self._drawn = next(self._stream)
        if not self.active:
            return self._drawn[0], []
        self.step += 1
        return self._drawn

    def check(self, loss: float, grad_norm: float, lr: float, records: list[str]) -> None:
        """Records the numbers of the next update; if they are not finite, the run ends with an error."""
        step = self.result.step + 1
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            last = self._checkpoints.latest() if self._checkpoints else None
            self.result.error = NonFiniteLoss(self.spec.name, step, loss, grad_norm, records, last)
            return
        self.result.step = step
        self._losses.append(float(loss))
        if step % self._options.log_every_steps == 0 or step == self.total:
            mean = sum(self._losses) / len(self._losses)
            self.result.metrics = {"step": step, "loss": mean, "lr": float(lr), "grad_norm": float(grad_norm)}
            self._losses = []

    def write(self, rates: dict) -> None:
        """Writes the line of metrics that `check` made, if it is new, with the rates since the line before."""
        line = self.result.metrics
        if "mfu" not in line and line.get("step") == self.result.step:
            line.update(rates)
            if self._file is not None:
                self._file.write(line)

    def save(self, state: Callable[[], TrainState]) -> None:
        """Saves the run's state, unless it is saved already, the run has failed, or no checkpoints are kept."""
        result = self.result
        if self._checkpoints is None or result.error is not None or result.step == self._saved_step:
            return
        # Copies, because the run continues while the checkpoint is written.
        meta = {"position": result.step, "config": self.spec.config}
        meta |= {"metrics": dict(result.metrics), "losses": list(self._losses)}
        self._checkpoints.save(result.step, state(), meta)
        self._saved_step = result.step

    def wait(self) -> None:
        """Returns when every saved checkpoint is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def close(self) -> None:
        for item in (self._stream, self._file, self._checkpoints):
            if item is not None:
                item.close()
