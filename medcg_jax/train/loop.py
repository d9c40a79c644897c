"""The training loop: one run, or a queue of runs that one program trains several at a time.

The host runs ahead of the device: losses stay on the device and are fetched together every `log_every_steps`. They are
checked then, and before anything is saved, so that no checkpoint is of a step after a non-finite loss.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np

from medcg_jax.config import Interrupted
from medcg_jax.mesh import put_batch
from medcg_jax.train import preempt
from medcg_jax.train.active_run import ActiveRun, NonFiniteLoss, Options, RunResult, RunSpec, loop_options
from medcg_jax.train.goodput import LoaderWatch
from medcg_jax.train.log import Progress
from medcg_jax.train.optim import Hparams, stack_hparams
from medcg_jax.train.sanity import check_sees
from medcg_jax.train.step import Program, TrainState

__all__ = ["NonFiniteLoss", "RunResult", "RunSpec", "fit", "fit_queue", "loop_options"]

# Steps handed to the device before the host waits for one of them: enough to keep it busy, few enough to bound memory.
MAX_AHEAD = 8


def fit(program: Program, params, frozen, spec: RunSpec, **options) -> tuple[TrainState, RunResult]:
    """(the state after the last step, how the run ended); resumed from a checkpoint if there is one.

    Arguments and errors as `fit_queue`.

    Raises:
      NonFiniteLoss: the run diverged.
    """
    waiting, ended = [spec], []
    fit_queue(
        program, params, frozen, lambda: waiting.pop() if waiting else None, lambda *end: ended.append(end), **options
    )
    [(result, state)] = ended
    if result.error:
        raise result.error
    return state, result


def fit_queue(
    program: Program,
    params,
    frozen,
    next_spec: Callable[[], RunSpec | None],
    ended: Callable[[RunResult, TrainState], None],
    **options,
) -> None:
    """Trains every run that `next_spec` gives, `program.num_cells` at a time; when a run ends, the next takes its slot.

    A later run compiles nothing. Each run starts from its newest checkpoint, or else from `params`.

    params, frozen: the trainable parameters that every run starts from, and the frozen ones that all runs share.
    next_spec: gives the next run, or None if there is none now; called again whenever a slot is free.
    ended: called with a run's result (with the error of a run that diverged) and its state, on the devices that held
      it, before another run takes the slot.
    options: see `Options`.

    Raises:
      BlindModel: the model does not see the images of its first batches.
      Interrupted: the process was told to stop (`preempt`), and all runs are saved.
      CheckpointError: there are checkpoints, and none can be read.
      SaveError: a checkpoint could not be written.
    """
    loop = Loop(program, params, frozen, Options(**options))
    try:
        loop.fill_slots(next_spec, ended)
        while any(run.active for run in loop.runs):
            with preempt.at_steps():
                loop.step()
                checked = loop.check_and_save()
                loop.stop_if_told()
            if checked:
                loop.fill_slots(next_spec, ended)
    finally:
        loop.close()


class Loop:
    """The runs in a program's slots, and their state on the devices; an empty slot has None."""

    def __init__(self, program: Program, params, frozen, options: Options):
        if jax.process_count() > 1 and program.mesh.shape["cell"] > 1:
            cells = program.mesh.shape["cell"]
            raise ValueError(f"mesh.cell={cells}: several processes share a run, so set it to 1")
        self._program, self._params, self._frozen, self._options = program, params, frozen, options
        self._state: Any = None  # a `TrainState`, once a run has started
        self._hparams: Hparams = {}
        self._slots: list[ActiveRun | None] = [None] * program.num_cells
        self._many = program.num_cells > 1
        # (metrics on the device, records of this process's rows in each slot) of each step that is not checked yet.
        self._pending: list[tuple[dict[str, jax.Array], list[list[str]]]] = []
        self._checked_at = 0.0  # 0: the step is not compiled yet
        self._loader = LoaderWatch()
        self._sees_images = False
        self._bar: Progress | None = None

    @property
    def runs(self) -> list[ActiveRun]:
        return [run for run in self._slots if run is not None]

    def fill_slots(self, next_spec, ended) -> None:
        """Reports the runs that have ended, and gives free slots to waiting runs. Call when all losses are checked."""
        changed = False
        for slot in range(len(self._slots)):
            while (run := self._slots[slot]) is None or run.over:
                if run is not None:
                    with self._options.goodput.within("checkpoint"):
                        run.close()  # before `ended`, which may remove the checkpoints
                    ended(run.result, self._program.take(self._state, slot))
                    self._slots[slot], changed = None, True
                    if not self._many:
                        self._state = None  # the memory of a lone run is needed for the next one
                spec = next_spec()
                if spec is None:
                    break
                self._start(slot, spec)
                changed = True
        if changed:
            self._put_hparams()
            # Rates do not count this time.
            self._checked_at = self._checked_at and time.perf_counter()
            self._options.goodput.lap()

    def _start(self, slot: int, spec: RunSpec) -> None:
        """Puts a run into a slot, at its newest checkpoint or its start."""
        program = self._program
        run = self._slots[slot] = ActiveRun(spec, self._options, self._print)
        with self._options.goodput.within("restart"):
            run_state = run.resume(lambda: program.abstract_run(self._params))
        run.open()
        if self._state is None and (run_state is None or self._many):
            self._state = program.start(self._params)
        elif run_state is None:
            run_state = program.start_run(self._params)
        if run_state is not None:
            self._state = program.put(self._state, slot, run_state)
        # A run that goes on from a checkpoint was asked about other pixels when it began.
        self._sees_images = self._sees_images or run.step > 0
        if not self._options.keep_start:
            jax.tree.map(lambda x: x.delete(), self._params)

    def step(self) -> None:
        """Draws a batch for every run and dispatches one step."""
        clock, trace = self._options.goodput, self._options.trace
        if trace is not None:
            trace.before(self._furthest() + 1, [metrics for metrics, _ in self._pending[-1:]])
        at = {run.spec.name: run.step + 1 for run in self.runs if run.active}
        with clock.within("input"):
            batches, records = zip(*(run.draw() if run else (None, []) for run in self._slots), strict=True)
            batch = self._stacked(batches) if self._many else batches[0]
            on_device = put_batch(batch, self._program.batch_sharding)
        first = not self._checked_at
        if not self._sees_images:
            with clock.within("compile"):
                self._check_sees_images(batch)
        with clock.step(at, compiles=first), jax.profiler.StepTraceAnnotation("train", step_num=self._furthest()):
            self._state, metrics = self._program(self._state, self._frozen, self._hparams, on_device)
        clock.handed(at, metrics["loss"])
        self._pending.append((metrics, list(records)))
        if first:
            # The first call compiled the step; rates begin after it.
            self._checked_at = time.perf_counter()
            clock.lap()
        if trace is not None:
            trace.after(self._furthest(), metrics)
        if len(self._pending) > MAX_AHEAD:
            with clock.waiting():
                jax.block_until_ready(self._pending[-1 - MAX_AHEAD][0]["loss"])

    def _check_sees_images(self, batch: dict[str, np.ndarray]) -> None:
        """Runs the step's own program on other pixels, without an update.

        Raises:
          BlindModel: the loss and the gradient norm are the same.
        """
        run = self.runs[0]
        steps = np.zeros(self._hparams["total_steps"].shape, np.int32)
        # With 0 steps in all no run is active, so that the state stays the same, bit for bit.
        hparams = {**self._hparams, **self._program.put_hparams({"total_steps": steps})}

        def score(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            on_device = put_batch(dict(batch), self._program.batch_sharding)
            self._state, metrics = self._program(self._state, self._frozen, hparams, on_device)
            return jax.device_get([metrics["loss"], metrics["grad_norm"]])

        keys, name = run.spec.pixels, self._options.label or run.spec.name
        self._sees_images = not keys or check_sees(score, batch, keys, name)

    def check_and_save(self) -> bool:
        """Checks losses, and saves, if a run is due; returns whether losses were checked."""
        save = any(run.save_due for run in self.runs)
        if not save and not any(run.log_due for run in self.runs):
            return False
        self._check()
        if save:
            self._save()
        return True

    def stop_if_told(self) -> None:
        """If the process is told to stop: saves every run and raises Interrupted."""
        if not preempt.told_to_stop():
            return
        if self._pending:
            self._check()
        self._save()
        with self._options.goodput.within("checkpoint"):
            for run in self.runs:
                run.wait()
        where = ", ".join(f"{run.spec.name} at step {run.result.step} of {run.total}" for run in self.runs)
        raise Interrupted(f"told to stop: {where}")

    def _save(self) -> None:
        with self._options.goodput.within("checkpoint"):
            for slot, run in enumerate(self._slots):
                if run:
                    run.save(partial(self._program.take, self._state, slot))

    def _check(self) -> None:
        """Fetches and checks all pending losses, and writes the lines of metrics that are due."""
        pending, self._pending = self._pending, []
        with self._options.goodput.waiting():
            fetched = jax.device_get([metrics for metrics, _ in pending])
        seconds = time.perf_counter() - self._checked_at
        waited_s = self._options.goodput.lap()["input"]
        failed_before = [run for run in self.runs if run.result.error]
        rates: list[tuple[ActiveRun, dict[str, float]]] = []
        flops = 0.0
        peak = self._options.peak_flops if all(run.spec.flops_per_step for run in self.runs) else None
        for slot, run in enumerate(self._slots):
            if run is None:
                continue
            steps = samples = tokens = 0
            for (_, records), metrics in zip(pending, fetched, strict=True):
                m = {key: value[slot] for key, value in metrics.items()} if self._many else metrics
                if m["active"] and run.result.error is None:
                    run.check(m["loss"], m["grad_norm"], m["lr"], records[slot])
                    steps, samples, tokens = steps + 1, samples + int(m["samples"]), tokens + int(m["tokens"])
            flops += steps * (run.spec.flops_per_step or 0.0)
            rates.append((run, {"samples_per_s": samples / seconds, "tokens_per_s": tokens / seconds}))
        mfu = flops / peak / seconds if peak else None
        for run, rate in rates:
            run.write({**rate, "mfu": mfu, "data_wait": min(1.0, waited_s / seconds)})
        self._checked_at = time.perf_counter()
        if line := self._loader.warning(waited_s, seconds, len(pending)):
            self._print(line)
        self._show_progress(sum(rate["samples_per_s"] for _, rate in rates))
        errors = [run.result.error for run in self.runs if run.result.error and run not in failed_before]
        for error in errors if len(self.runs) > 1 else ():
            self._print(str(error))
        if errors:
            self._put_hparams()

    def close(self) -> None:
        # Closing waits for the last checkpoint; if that fails, the other items are closed too.
        with self._options.goodput.within("checkpoint"), ExitStack() as stack:
            for item in (self._options.trace, self._bar, *self.runs):
                if item is not None:
                    stack.callback(item.close)

    def _stacked(self, batches) -> dict[str, np.ndarray]:
        # Slots without a run are never active: any batch will do.
        some = next(batch for batch in batches if batch is not None)
        return {key: np.stack([(some if batch is None else batch)[key] for batch in batches]) for key in some}

    def _put_hparams(self) -> None:
        """Puts the runs' hyper-parameters on the devices; 0 steps for a failed run or an empty slot."""
        if not self.runs:
            return
        stopped = {**self.runs[0].spec.hparams, "total_steps": np.int32(0)}
        values = [run.spec.hparams if run and not run.result.error else stopped for run in self._slots]
        self._hparams = self._program.put_hparams(stack_hparams(values) if self._many else values[0])

    def _furthest(self) -> int:
        """The greatest step of all runs."""
        return max(run.step for run in self.runs)

    def _show_progress(self, samples_per_s: float) -> None:
        losses = [run.result.metrics["loss"] for run in self.runs if run.result.metrics and not run.result.error]
        text = f"loss {sum(losses) / len(losses):.4f}, " if losses else ""
        text += f"{samples_per_s:.0f} samples/s" if samples_per_s >= 10 else f"{samples_per_s:.2g} samples/s"
        if self._options.progress is not None:
            self._options.progress({run.spec.name: run.step for run in self.runs}, text)
        elif jax.process_index() == 0:
            if self._bar is None:
                label = self._options.label or self.runs[0].spec.name
                self._bar = Progress(max(run.total for run in self.runs), done=self._furthest(), label=label)
            self._bar.update(self._furthest(), text)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.print(line)
        elif jax.process_index() == 0:
            print(line, flush=True)
