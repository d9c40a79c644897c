"""One run as the training loop sees it: its hparams, stream, files and checkpoints, and how far it is."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from medcg_jax.config import RunError, flat
from medcg_jax.train.checkpoint import CheckpointError, Checkpoints
from medcg_jax.train.log import MetricsFile
from medcg_jax.train.loss_check import LossCheck
from medcg_jax.train.optim import Hparams
from medcg_jax.train.step import TrainState
from medcg_jax.train.wandb_log import WandbTarget


class NonFiniteLoss(RunError):
    """A loss or a gradient is not finite; the message is one line for the user.

    Attributes:
      cell: name of the run.
      step: updates made, the one with this loss included.
      records: ids of the records of this process's rows of its batch.
      checkpoint: the last good one, or None.
    """

    def __init__(
        self, cell: str, step: int, loss: float, grad_norm: float, records: list[str], checkpoint: Path | None
    ):
        self.cell, self.step, self.records, self.checkpoint = cell, step, records, checkpoint
        last = f"last good checkpoint {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{cell}: step {step} has loss {loss:g} and gradient norm {grad_norm:g}; {last}; "
            f"records of the batch: {', '.join(records)}"
        )


class Stream(Protocol):
    """Batches from a position on, as `data.pipeline.Batches`: yields (batch, ids of its records)."""

    def __next__(self) -> tuple[dict[str, np.ndarray], list[str]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Cell:
    """What a run is made of.

    hparams: run-time values (`optim.hparams_from`); runs in one program may differ in all of them.
    open_stream: the run's batches from a position (batches drawn before) on.
    metrics: file of its metrics; None: none are kept. tensorboard: directory, wandb: where else; None: none.
    checkpoints: directory; None: nothing is saved, and a run that is stopped starts anew.
    config: JSON kept in the checkpoints; another one there is an error.
    flops_per_step: of one step, what the model needs (`models.flops`); None: not known.
    pixels: keys of a batch's images, which the model must be found to see before the first step; (): it is not asked.
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
class CellResult:
    """How a run ended: updates made, its last line of metrics, what stopped it (None: it is complete), and
    a line for every damaged checkpoint that was set aside."""

    name: str
    step: int = 0
    metrics: dict = field(default_factory=dict)
    error: NonFiniteLoss | None = None
    skipped_checkpoints: list[str] = field(default_factory=list)


class CellRun:
    """A run under way. `step` counts the updates handed to the device, `result.step` those whose loss was looked at.

    conditions: see `LossCheck`.
    """

    def __init__(
        self, cell: Cell, *, log_every_steps: int, checkpoint_every_steps: int, keep: int, keep_every_steps: int,
        conditions: dict, say: Callable[[str], None],
    ):  # fmt: skip
        self.cell = cell
        self.result = CellResult(cell.name)
        self.step, self.total = 0, int(cell.hparams["total_steps"])
        self._log_every, self._save_every, self._say = log_every_steps, checkpoint_every_steps, say
        self._store = self._loss_check = None
        if cell.checkpoints:
            self._store = Checkpoints(cell.checkpoints, keep=keep, keep_every_steps=keep_every_steps, say=say)
            self._loss_check = LossCheck(cell.checkpoints, conditions, say)
        self._saved_step = -1
        self._losses: list[float] = []  # since the last line of metrics
        self._stream: Stream | None = None
        self._file: MetricsFile | None = None
        self._drawn: tuple[dict[str, np.ndarray], list[str]] | None = None

    @property
    def active(self) -> bool:
        return self.result.error is None and self.step < self.total

    @property
    def over(self) -> bool:
        """Complete, every loss of it looked at; or diverged."""
        return self.result.error is not None or self.result.step == self.total

    def resume(self, abstract: TrainState) -> TrainState | None:
        """The state of the newest whole checkpoint, laid out as `abstract`; None where there is none.

        Raises:
          CheckpointError: none can be read, or it is another run's.
        """
        found = self._store.restore(abstract) if self._store else None
        if found is None:
            return None
        state, meta = found
        theirs, ours = flat(meta["config"]), flat(json.loads(json.dumps(self.cell.config)))
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"{self._store.directory} is another run's: {name} is {theirs.get(name)!r} there and "
                    f"{ours.get(name)!r} here; another --workdir is accepted"
                )
        self.step = self.result.step = self._saved_step = meta["position"]
        self.result.metrics, self._losses = meta["metrics"], meta["losses"]
        self.result.skipped_checkpoints = self._store.skipped
        self._loss_check.restored(self.step)
        self._say(f"{self.cell.name}: going on from step {self.step} of {self.total}")
        return state

    def open(self) -> None:
        """Opens stream and metrics where the run stands."""
        self._stream = self.cell.open_stream(self.step)
        if self.cell.metrics and jax.process_index() == 0:
            self._file = MetricsFile(
                self.cell.metrics, step=self.step, tensorboard=self.cell.tensorboard, wandb=self.cell.wandb
            )

    def draw(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """The next batch, counted; where the run has ended any batch (nothing looks at it) without its records."""
        if not self.active:
            if self._drawn is None:
                self._drawn = next(self._stream)
            return self._drawn[0], []
        self._drawn = next(self._stream)
        self.step += 1
        return self._drawn

    @property
    def log_due(self) -> bool:
        return self.active and self.step % self._log_every == 0 or self._at_end

    @property
    def compare_due(self) -> bool:
        """The first step after a restore is made: no more should be before its loss is seen to be the right one."""
        return self._loss_check is not None and self._loss_check.due and self.step > self.result.step

    @property
    def save_due(self) -> bool:
        return self.active and bool(self._save_every) and self.step % self._save_every == 0 or self._at_end

    @property
    def _at_end(self) -> bool:
        """The last update is handed to the device and not looked at yet."""
        return self.result.error is None and self.step == self.total != self.result.step

    def look(self, loss: float, grad_norm: float, lr: float, records: list[str]) -> None:
        """Takes the numbers of the next update; where they are not finite the run ends with the error in its result."""
        step = self.result.step + 1
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            last = self._store.latest() if self._store else None
            self.result.error = NonFiniteLoss(self.cell.name, step, loss, grad_norm, records, last)
            return
        if self._loss_check is not None:
            self._loss_check.look(self.cell.name, step, loss)
        self.result.step = step
        self._losses.append(float(loss))
        if step % self._log_every == 0 or step == self.total:
            mean = sum(self._losses) / len(self._losses)
            self.result.metrics = {"step": step, "loss": mean, "lr": float(lr), "grad_norm": float(grad_norm)}
            self._losses = []

    def write(self, rates: dict) -> None:
        """Writes the line of metrics that `look` has made, if it is new, with the rates of the time since the last."""
        line = self.result.metrics
        if "mfu" not in line and line.get("step") == self.result.step:
            line.update(rates)
            if self._file is not None:
                self._file.write(line)

    def save(self, state: Callable[[], TrainState]) -> None:
        """Saves the run's state, unless it is saved already, not sound, or not to be kept."""
        if self._store is None or self.result.error is not None or self.result.step == self._saved_step:
            return
        # Copies: the checkpoint is written while the run goes on.
        kept = {"metrics": dict(self.result.metrics), "losses": list(self._losses)}
        meta = {"position": self.result.step, "config": self.cell.config, **kept}
        self._store.save(self.result.step, state(), meta)
        self._saved_step = self.result.step
        self._loss_check.saved(self._saved_step)

    def wait(self) -> None:
        """Returns when what was saved is written."""
        if self._store is not None:
            self._store.wait()

    def close(self) -> None:
        for thing in (self._stream, self._file, self._store):
            if thing is not None:
                thing.close()
