"""The training loop: one run, or several cells that one program trains at once, from streams to checkpoints.

The host runs ahead of the device: losses stay there and are fetched together every `log_every_steps`. All of them are
looked at then, and before anything is saved, so no checkpoint ever holds numbers that followed a non-finite loss.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import jax
import numpy as np

from medcg_jax.config import Interrupted
from medcg_jax.mesh import put_batch
from medcg_jax.train import preempt
from medcg_jax.train.cell_run import Cell, CellResult, CellRun, NonFiniteLoss
from medcg_jax.train.cells import take_cell
from medcg_jax.train.goodput import Goodput
from medcg_jax.train.loader_watch import LoaderWatch
from medcg_jax.train.log import Progress
from medcg_jax.train.optim import stack_hparams
from medcg_jax.train.profile import StepTrace
from medcg_jax.train.sight import check_sees
from medcg_jax.train.step import Program, TrainState

__all__ = ["Cell", "CellResult", "NonFiniteLoss", "fit", "fit_queue"]

# Steps handed to the device before the host waits for one of them: enough to keep it busy, few enough to bound memory.
MAX_AHEAD = 8


def fit(
    program: Program, params, frozen, cells: Sequence[Cell], *, label: str = "", **options
) -> tuple[TrainState, list[CellResult]]:
    """(the state after the last step, a result for each cell), resumed from checkpoints where there are any.

    With several cells the state has a leading axis of `program.num_cells`; `cells.take_cell` gives one cell's. Fewer
    cells than the program holds are accepted: the slots left over stay as they start.

    params, frozen: the trainable parameters that every cell starts from, and those the cells share.
    options: see `Options`.

    Raises:
      BlindModel: the model does not see the images of its first batches.
      NonFiniteLoss: in the only cell, or in all of them. A cell that fails beside others ends there, with the error in
        its result, and leaves the others as they are.
      Interrupted: the process was told to stop (`preempt`); what can be saved is.
      CheckpointError: there are checkpoints, and none can be read.
      SaveError: a checkpoint could not be written.
      LossDiffers: the first loss after a restore is not the one that was logged.
      ValueError: more cells than the program holds, or none.
    """
    if not 1 <= len(cells) <= program.num_cells:
        raise ValueError(f"{len(cells)} cells for a program of {program.num_cells}")
    loop = _Loop(program, params, frozen, Options(**options), label or cells[0].name)
    try:
        state = loop.start(cells)
        if not loop.options.keep_start:
            jax.tree.map(lambda x: x.delete(), params)
        with preempt.at_steps():
            while loop.active:
                state = loop.one_step(state)
                if loop.look(state):
                    errors = [run.result.error for run in loop.runs]
                    if all(errors):
                        raise errors[0]
                loop.stop_if_told(state)
        return state, [run.result for run in loop.runs]
    finally:
        loop.close()


def fit_queue(
    program: Program,
    params,
    frozen,
    waiting: Callable[[], Cell | None],
    ended: Callable[[CellResult, TrainState], None],
    **options,
) -> None:
    """Trains every cell that `waiting` gives, `program.num_cells` at a time; one that ends leaves its slot to the next.

    Nothing is compiled again for one that comes later. Each starts from its newest checkpoint, or else from `params`.

    waiting: the next cell, or None where there is none now; it is asked again when a slot is or becomes free.
    ended: called with a cell's result, which holds the error of one that diverged, and its own state (on the devices
      that held it) before the slot is given away.
    options: see `Options`.

    Raises:
      BlindModel, Interrupted, CheckpointError, SaveError, LossDiffers: as `fit`.
    """
    loop = _Loop(program, params, frozen, Options(**options))
    try:
        state = loop.turn_over(None, waiting, ended)
        while loop.active:
            with preempt.at_steps():
                state = loop.one_step(state)
                seen = loop.look(state)
                loop.stop_if_told(state)
            if seen:
                state = loop.turn_over(state, waiting, ended)
    finally:
        loop.close()


@dataclass(frozen=True)
class Options:
    """How a loop logs, saves and reports.

    Attributes:
      checkpoint_every_steps: 0: only at the end.
      keep_start: False: `fit` deletes the parameters that its cells start from once they have begun, for their memory.
      peak_flops: of all devices together; None, or a cell whose `flops_per_step` is None: mfu is null. Several cells'
        mfu is that of the program.
      progress: called with ({name: updates made} of the cells in their slots, text) at every check, in place of a bar
        on stderr.
      goodput: clock of the run, or of all runs that a process makes.
      trace: writes a profile of some steps.
    """

    log_every_steps: int = 10
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    keep_start: bool = True
    peak_flops: float | None = None
    progress: Callable[[dict[str, int], str], None] | None = None
    goodput: Goodput = field(default_factory=Goodput)
    trace: StepTrace | None = None


@dataclass
class _Pending:
    """A step whose metrics are still on the device, with the records of this process's rows of each slot's batch."""

    metrics: dict[str, jax.Array]
    records: list[list[str]]


class _Loop:
    """The slots of a program, each with a run or None."""

    def __init__(self, program: Program, params, frozen, options: Options, label: str = ""):
        if jax.process_count() > 1 and program.mesh.shape["cell"] > 1:
            cells = program.mesh.shape["cell"]
            raise ValueError(f"mesh.cell={cells}: 1 is accepted where several processes share a run")
        self.program, self.params, self.frozen, self.options = program, params, frozen, options
        self.slots: list[CellRun | None] = [None] * program.num_cells
        self._many = program.num_cells > 1
        self._pending: list[_Pending] = []
        self._checked_at = None
        self._loader = LoaderWatch()
        self._sees = False
        self._label, self._bar = label, None

    @property
    def runs(self) -> list[CellRun]:
        return [run for run in self.slots if run is not None]

    @property
    def active(self) -> bool:
        return any(run.active for run in self.runs)

    def start(self, cells: Sequence[Cell]) -> TrainState:
        """The state that these cells go on from; streams and metrics files stand where it does."""
        state = None
        for place, cell in enumerate(cells):
            state = self._put(state, place, cell)
        self._put_hparams()
        if self.options.progress is None and jax.process_index() == 0:
            self._bar = Progress(self._total(), done=self._done(), label=self._label)
        return state

    def turn_over(self, state: TrainState | None, waiting, ended) -> TrainState | None:
        """Reports the runs that have ended; gives their slots and empty ones to cells that wait. `look` was just called."""
        changed = False
        for place in range(len(self.slots)):
            while (run := self.slots[place]) is None or run.over:
                if run is not None:
                    with self.options.goodput.within("checkpoint"):
                        run.close()  # first: whoever hears of the end may remove the checkpoints
                    ended(run.result, take_cell(state, place, self.program.num_cells) if self._many else state)
                    self.slots[place], changed = None, True
                    # The memory of a lone run is needed for the next one.
                    state = state if self._many else None
                cell = waiting()
                if cell is None:
                    break
                state, changed = self._put(state, place, cell), True
        if changed:
            self._put_hparams()
            # Rates are of training alone.
            self._checked_at = self._checked_at and time.perf_counter()
            self.options.goodput.lap()
        return state

    def _put(self, state: TrainState | None, place: int, cell: Cell) -> TrainState:
        """`state` with the cell in its slot, from its checkpoint or the start."""
        o = self.options
        run = CellRun(
            cell, log_every_steps=o.log_every_steps, checkpoint_every_steps=o.checkpoint_every_steps,
            keep=o.keep_checkpoints, keep_every_steps=o.keep_every_steps, conditions=self._conditions(place),
            say=self._say,
        )  # fmt: skip
        self.slots[place] = run
        with o.goodput.within("restart"):
            found = run.resume(self.program.abstract_one(self.params)) if cell.checkpoints else None
        run.open()
        if state is None and (found is None or self._many):
            state = self.program.start(self.params)
        elif found is None:
            found = self.program.start_one(self.params)
        return state if found is None else self.program.put(state, place, found)

    def one_step(self, state: TrainState) -> TrainState:
        """Draws a batch for every cell and hands one step to the device."""
        clock, trace = self.options.goodput, self.options.trace
        if trace is not None:
            trace.before(self._furthest() + 1, [p.metrics for p in self._pending[-1:]])
        at = {run.cell.name: run.step + 1 for run in self.runs if run.active}
        with clock.within("input"):
            batches, records = zip(*(run.draw() if run else (None, []) for run in self.slots), strict=True)
            batch = self._stacked(batches) if self._many else batches[0]
            on_device = put_batch(batch, self.program.batch_sharding)
        first = self._checked_at is None
        if not self._sees:
            with clock.within("compile"):
                state = self._look_at_images(state, batch)
        with clock.step(at, compiles=first), jax.profiler.StepTraceAnnotation("train", step_num=self._furthest()):
            state, metrics = self.program(state, self.frozen, self._hparams, on_device)
        clock.handed(at, metrics["loss"])
        self._pending.append(_Pending(metrics, list(records)))
        if first:
            # The first call has compiled the step; rates are of what comes after.
            self._checked_at = time.perf_counter()
            clock.lap()
        if trace is not None:
            trace.after(self._furthest(), metrics)
        if len(self._pending) > MAX_AHEAD:
            jax.block_until_ready(self._pending[-1 - MAX_AHEAD].metrics["loss"])
        return state

    def _look_at_images(self, state: TrainState, batch: dict[str, np.ndarray]) -> TrainState:
        """The same state, after the step's own program was asked, without an update, what it makes of other pixels.

        Raises:
          BlindModel: the same.
        """
        keys = next((run.cell.pixels for run in self.runs), ())
        steps = np.zeros(self._hparams["total_steps"].shape, np.int32)
        # No run has steps left, so that the state stays as it is, bit for bit.
        hparams = {**self._hparams, **self.program.put_hparams({"total_steps": steps})}

        def score(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
            nonlocal state
            on_device = put_batch(batch, self.program.batch_sharding)
            state, metrics = self.program(state, self.frozen, hparams, on_device)
            return jax.device_get([metrics["loss"], metrics["grad_norm"]])

        self._sees = not keys or check_sees(score, batch, keys, self._label or self.runs[0].cell.name)
        return state

    def look(self, state: TrainState) -> bool:
        """Checks and saves where a run is due to; whether it did."""
        save = any(run.save_due for run in self.runs)
        if not save and not any(run.log_due or run.compare_due for run in self.runs):
            return False
        self._check()
        if save:
            self._save(state)
        return True

    def stop_if_told(self, state: TrainState) -> None:
        """Saves every run and raises Interrupted where the process is told to stop."""
        if not preempt.told_to_stop():
            return
        if self._pending:
            self._check()
        self._save(state)
        with self.options.goodput.within("checkpoint"):
            for run in self.runs:
                run.wait()
        where = ", ".join(f"{run.cell.name} at step {run.result.step} of {run.total}" for run in self.runs)
        raise Interrupted(f"told to stop: {where}")

    def _save(self, state: TrainState) -> None:
        with self.options.goodput.within("checkpoint"):
            for place, run in enumerate(self.slots):
                if run:
                    run.save(lambda i=place: take_cell(state, i, self.program.num_cells) if self._many else state)

    def _conditions(self, place: int) -> dict:
        """What the last digits of a loss may hang on."""
        return {
            "mesh": dict(self.program.mesh.shape), "slots": self.program.num_cells, "slot": place,
            "processes": jax.process_count(), "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }  # fmt: skip

    def _check(self) -> None:
        """Fetches what is pending, looks at every loss, writes a line of metrics where one is due."""
        pending, self._pending = self._pending, []
        fetched = jax.device_get([p.metrics for p in pending])
        seconds = time.perf_counter() - self._checked_at
        waited_s = self.options.goodput.lap()["input"]
        failed = [run for run in self.runs if run.result.error]
        rates, flops = {}, 0.0
        known = self.options.peak_flops and all(run.cell.flops_per_step for run in self.runs)
        for i, run in enumerate(self.slots):
            if run is None:
                continue
            steps = samples = tokens = 0
            for p, metrics in zip(pending, fetched, strict=True):
                m = {key: value[i] for key, value in metrics.items()} if self._many else metrics
                if m["active"] and run.result.error is None:
                    run.look(m["loss"], m["grad_norm"], m["lr"], p.records[i])
                    steps, samples, tokens = steps + 1, samples + int(m["samples"]), tokens + int(m["tokens"])
            flops += steps * (run.cell.flops_per_step or 0.0)
            rates[i] = {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds}
        mfu = flops / self.options.peak_flops / seconds if known else None
        for i, rate in rates.items():
            self.slots[i].write({**rate, "mfu": mfu, "data_wait": min(1.0, waited_s / seconds)})
        self._checked_at = time.perf_counter()
        if line := self._loader.look(waited_s, seconds, len(pending)):
            self._say(line)
        self._tell(sum(rate["samples_per_s"] for rate in rates.values()))
        errors = [run.result.error for run in self.runs if run.result.error and run not in failed]
        for error in errors if len(self.runs) > 1 else ():
            self._say(str(error))
        if errors:
            self._put_hparams()

    def close(self) -> None:
        # The last checkpoint may still be being written; one that fails leaves nothing else open.
        with self.options.goodput.within("checkpoint"), ExitStack() as all_of_them:
            for thing in (self.options.trace, self._bar, *self.runs):
                if thing is not None:
                    all_of_them.callback(thing.close)

    def _stacked(self, batches) -> dict[str, np.ndarray]:
        # Slots without a cell are never active: any batch will do.
        some = next(batch for batch in batches if batch is not None)
        return {key: np.stack([(some if batch is None else batch)[key] for batch in batches]) for key in some}

    def _put_hparams(self) -> None:
        """The cells' run-time values on the devices; 0 steps where a cell has failed or a slot has none."""
        stopped = {"total_steps": np.int32(0)}
        some = next((run.cell.hparams for run in self.runs), None)
        if some is None:
            return
        all_hparams = [run.cell.hparams if run and not run.result.error else some | stopped for run in self.slots]
        self._hparams = self.program.put_hparams(stack_hparams(all_hparams) if self._many else all_hparams[0])

    def _furthest(self) -> int:
        """The step that a loop of one run is at: how far the run is that is furthest."""
        return max(run.step for run in self.runs)

    def _total(self) -> int:
        return max(run.total for run in self.runs)

    def _done(self) -> int:
        left = max((run.total - run.step for run in self.runs if run.result.error is None), default=0)
        return self._total() - left

    def _tell(self, samples_per_s: float) -> None:
        losses = [run.result.metrics["loss"] for run in self.runs if run.result.metrics and not run.result.error]
        text = f"loss {sum(losses) / len(losses):.4f}, " if losses else ""
        text += f"{samples_per_s:.0f} samples/s"
        if self.options.progress is not None:
            self.options.progress({run.cell.name: run.step for run in self.runs}, text)
        elif self._bar is not None:
            self._bar.update(self._done(), text)

    def _say(self, line: str) -> None:
        if jax.process_index() != 0:
            return
        if self._bar is not None:
            self._bar.say(line)
        else:
            print(line, flush=True)
