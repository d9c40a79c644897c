"""The training loop: one run, or several cells that one program trains at once, from streams to checkpoints.

The host runs ahead of the device: losses stay there and are fetched together every `log_every_steps`. All of them are
looked at then, and before anything is saved, so no checkpoint ever holds numbers that followed a non-finite loss.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from medcg_jax.mesh import put_batch
from medcg_jax.train.cell_run import Cell, CellResult, CellRun, NonFiniteLoss
from medcg_jax.train.cells import abstract_cell, stack_cells, take_cell
from medcg_jax.train.log import Progress
from medcg_jax.train.optim import stack_controls
from medcg_jax.train.step import Program, TrainState

__all__ = ["Cell", "CellResult", "NonFiniteLoss", "fit"]

# Steps handed to the device before the host waits for one of them: enough to keep it busy, few enough to bound memory.
MAX_AHEAD = 8


def fit(
    program: Program,
    params,
    frozen,
    cells: Sequence[Cell],
    *,
    log_every_steps: int = 10,
    checkpoint_every_steps: int = 0,
    keep_checkpoints: int = 2,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    label: str = "",
    progress: Callable[[int, str], None] | None = None,
) -> tuple[TrainState, list[CellResult]]:
    """(the state after the last step, a result for each cell), resumed from checkpoints where there are any.

    With several cells the state has a leading axis of `program.num_cells`; `cells.take_cell` gives one cell's. Fewer
    cells than the program holds are accepted: the slots left over stay as they start.

    params, frozen: the trainable parameters that every cell starts from (kept), and those the cells share.
    checkpoint_every_steps: 0: only at the end.
    flops_per_step: of one step of one cell; peak_flops: of all devices together; either None: mfu is null. Several
      cells' mfu is that of the program.
    progress: called with (steps made, text) at every check, in place of a bar on stderr.

    Raises:
      NonFiniteLoss: in the only cell, or in all of them. A cell that fails beside others ends there, with the error in
        its result, and leaves the others as they are.
      CheckpointError: there are checkpoints, and none can be read.
      ValueError: more cells than the program holds, or none.
    """
    if not 1 <= len(cells) <= program.num_cells:
        raise ValueError(f"{len(cells)} cells for a program of {program.num_cells}")
    if jax.process_count() > 1 and program.mesh.shape["cell"] > 1:
        raise ValueError(f"mesh.cell={program.mesh.shape['cell']}: 1 is accepted where several processes share a run")
    every = dict(log_every_steps=log_every_steps, checkpoint_every_steps=checkpoint_every_steps, keep=keep_checkpoints)
    loop = _Loop(program, frozen, cells, label, progress, every)
    if flops_per_step and peak_flops:
        loop.mfu_of_rate = flops_per_step / peak_flops
    try:
        state = loop.start(params)
        while any(run.active for run in loop.runs):
            state = loop.one_step(state)
            save = any(run.save_due for run in loop.runs)
            if save or any(run.log_due for run in loop.runs):
                loop.check()
            if save:
                loop.save(state)
        return state, [run.result for run in loop.runs]
    finally:
        loop.close()


@dataclass
class _Pending:
    """A step whose metrics are still on the device, with the records of each cell's batch."""

    metrics: dict[str, jax.Array]
    records: list[list[str]]


class _Loop:
    def __init__(self, program: Program, frozen, cells: Sequence[Cell], label: str, progress, every: dict):
        self.program, self.frozen = program, frozen
        self.mfu_of_rate: float | None = None
        self._many = program.num_cells > 1
        self._pending: list[_Pending] = []
        self._data_wait_s, self._checked_at = 0.0, None
        self._label, self._report, self._bar = label or cells[0].name, progress, None
        self.runs = [CellRun(cell, say=self._say, **every) for cell in cells]

    def start(self, params) -> TrainState:
        """The state to go on from; streams and metrics files stand where it does."""
        state = self._resumed(params) if any(run.cell.checkpoints for run in self.runs) else self.program.start(params)
        self._put_control()
        for run in self.runs:
            run.open()
        if self._report is None and jax.process_index() == 0:
            self._bar = Progress(self._total(), done=self._done(), label=self._label)
        return state

    def one_step(self, state: TrainState) -> TrainState:
        """Draws a batch for every cell and hands one step to the device."""
        began = time.perf_counter()
        batches, records = zip(*(run.draw() for run in self.runs), strict=True)
        batch = self._stacked(batches) if self._many else batches[0]
        on_device = put_batch(batch, self.program.batch_sharding)
        self._data_wait_s += time.perf_counter() - began
        state, metrics = self.program(state, self.frozen, self._control, on_device)
        self._pending.append(_Pending(metrics, list(records)))
        if self._checked_at is None:
            # The first call has compiled the step; rates are of what comes after.
            self._checked_at, self._data_wait_s = time.perf_counter(), 0.0
        if len(self._pending) > MAX_AHEAD:
            jax.block_until_ready(self._pending[-1 - MAX_AHEAD].metrics["loss"])
        return state

    def check(self) -> None:
        """Fetches what is pending, looks at every loss, writes a line of metrics where one is due.

        Raises:
          NonFiniteLoss: no cell is left to train.
        """
        pending, self._pending = self._pending, []
        fetched = jax.device_get([p.metrics for p in pending])
        seconds = time.perf_counter() - self._checked_at
        failed = sum(run.result.error is not None for run in self.runs)
        rates, cell_steps = [], 0
        for i, run in enumerate(self.runs):
            steps = rows = tokens = 0
            for p, metrics in zip(pending, fetched, strict=True):
                m = {key: value[i] for key, value in metrics.items()} if self._many else metrics
                if m["active"] and run.result.error is None:
                    run.look(m["loss"], m["grad_norm"], m["lr"], p.records[i])
                    steps, rows, tokens = steps + 1, rows + len(p.records[i]), tokens + int(m["tokens"])
            cell_steps += steps
            rates.append({"samples_per_s": rows * jax.process_count() / seconds, "tokens_per_s": tokens / seconds})
        mfu = None if self.mfu_of_rate is None else self.mfu_of_rate * cell_steps / seconds
        for run, rate in zip(self.runs, rates, strict=True):
            run.write({**rate, "mfu": mfu, "data_wait": self._data_wait_s / seconds})
        self._checked_at, self._data_wait_s = time.perf_counter(), 0.0
        self._tell(sum(rate["samples_per_s"] for rate in rates))
        errors = [run.result.error for run in self.runs if run.result.error is not None]
        if len(errors) == len(self.runs):
            raise errors[0]
        if len(errors) > failed:
            self._say(str(errors[-1]))
            self._put_control()

    def save(self, state: TrainState) -> None:
        """A checkpoint of every cell that moved since its last one and is sound; `check` has just been called."""
        for i, run in enumerate(self.runs):
            run.save(lambda i=i: take_cell(state, i, self.program.num_cells) if self._many else state)

    def close(self) -> None:
        for thing in [*self.runs, self._bar]:
            if thing is not None:
                thing.close()

    def _resumed(self, params) -> TrainState:
        """The state in which each cell that has a checkpoint stands where its newest one does."""
        abstract, num = self.program.abstract_state(params), self.program.num_cells
        if not self._many:
            found = self.runs[0].resume(abstract)
            return self.program.start(params) if found is None else found
        found = [run.resume(abstract_cell(abstract, i, num)) for i, run in enumerate(self.runs)]
        if all(state is None for state in found):
            return self.program.start(params)
        found += [None] * (num - len(found))
        if any(state is None for state in found):
            fresh = self.program.start(params)
            found = [take_cell(fresh, i, num) if state is None else state for i, state in enumerate(found)]
        return stack_cells(found, self.program.state_shardings)

    def _stacked(self, batches) -> dict[str, np.ndarray]:
        # Slots without a cell are never active: any batch will do.
        batches = [*batches, *batches[:1] * (self.program.num_cells - len(batches))]
        return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}

    def _put_control(self) -> None:
        """The cells' run-time values on the devices; 0 steps where a cell has failed or a slot has none."""
        stopped = {"total_steps": np.int32(0)}
        controls = [run.cell.control | (stopped if run.result.error else {}) for run in self.runs]
        controls += [controls[0] | stopped] * (self.program.num_cells - len(controls))
        self._control = self.program.put_control(stack_controls(controls) if self._many else controls[0])

    def _total(self) -> int:
        return max(run.total for run in self.runs)

    def _done(self) -> int:
        left = max((run.total - run.step for run in self.runs if run.result.error is None), default=0)
        return self._total() - left

    def _tell(self, samples_per_s: float) -> None:
        losses = [run.result.metrics["loss"] for run in self.runs if run.result.metrics and not run.result.error]
        text = f"loss {sum(losses) / len(losses):.4f}, " if losses else ""
        text += f"{samples_per_s:.0f} samples/s"
        if self._report is not None:
            self._report(self._done(), text)
        elif self._bar is not None:
            self._bar.update(self._done(), text)

    def _say(self, line: str) -> None:
        if jax.process_index() != 0:
            return
        if self._bar is not None:
            self._bar.say(line)
        else:
            print(line, flush=True)
