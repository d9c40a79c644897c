"""What a run reports: progress, metrics (JSON lines, TensorBoard, Weights & Biases), traces, compiled programs."""

import importlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from medcg_jax.config import ConfigError
from medcg_jax.files import write_whole
from medcg_jax.terminal import duration, install, said, shows_progress
from medcg_jax.untrusted import FileError, check_number, read_text

METRICS = ("step", "loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "mfu", "data_wait")
# Without a terminal, progress is at most one line in so many seconds.
PLAIN_LINE_EVERY_S = 10.0
# A metrics file: 500,000 lines.
MAX_METRICS_BYTES = 2**27
WANDB_FILE = "wandb.json"


@dataclass(frozen=True)
class WandbTarget:
    """Where a run's metrics go. The run's id is kept in `workdir`, so that a restarted run continues the same one."""

    project: str
    name: str
    workdir: Path
    config: dict


def load_wandb():
    """The package `wandb`.

    Raises:
      ConfigError: it is not installed, or one of its dependencies is missing.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"log.wandb is set and the package wandb cannot be imported ({error}): {install('wandb')} brings it, or "
            "log.wandb=''"
        ) from error


class WandbLog:
    """One run in Weights & Biases. With wandb's own WANDB_MODE=offline all stays in the workdir, for `wandb sync`."""

    def __init__(self, target: WandbTarget):
        wandb, self._path = load_wandb(), target.workdir / WANDB_FILE
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            known = {"id": secrets.token_hex(4), "step": 0}
        self._id, self._step = known["id"], known["step"]
        self._keep()
        self._run = wandb.init(
            project=target.project, name=target.name, id=self._id, resume="allow", dir=str(target.workdir),
            config=target.config,
        )  # fmt: skip

    def write(self, metrics: dict) -> None:
        """Logs a step's metrics, unless they are logged already: a restarted run repeats steps."""
        step = metrics["step"]
        if step <= self._step:
            return
        self._run.log({key: value for key, value in metrics.items() if key != "step" and value is not None}, step=step)
        self._step = step
        self._keep()

    def conclude(self, values: dict, tables: Mapping[str, tuple[list[str], list[list]]]) -> None:
        """Sets the run's summary, and logs tables. tables: name -> (columns, rows)."""
        self._run.summary.update(values)
        table = load_wandb().Table
        self._run.log({name: table(columns=columns, data=rows) for name, (columns, rows) in tables.items()})

    def close(self) -> None:
        self._run.finish()

    def _keep(self) -> None:
        write_whole(self._path, json.dumps({"id": self._id, "step": self._step}) + "\n")


class MetricsFile:
    """One run's metrics as JSON lines, each step once, and optionally in TensorBoard and Weights & Biases.

    step: updates made so far. Lines of later steps, and a last line that a kill cut off, are dropped: the run writes
      them again.
    """

    def __init__(self, path: Path, *, step: int = 0, tensorboard: Path | None = None, wandb: WandbTarget | None = None):
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a")
        self._board = None
        self._wandb = WandbLog(wandb) if wandb else None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            # TensorBoard hides what an earlier process logged from purge_step on.
            self._board = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, metrics: dict) -> None:
        """Appends one line with the keys of `METRICS`, and hands it to the system at once."""
        self._file.write(json.dumps({key: _rounded(metrics[key]) for key in METRICS}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key in METRICS[1:]:
                if metrics[key] is not None:
                    self._board.add_scalar(key, metrics[key], metrics["step"])
        if self._wandb is not None:
            self._wandb.write({key: metrics[key] for key in METRICS})

    def close(self) -> None:
        for output in (self._file, self._board, self._wandb):
            if output is not None:
                output.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, without a last line that a kill cut off; [] if there is no file.

    Raises:
      FileError: a line is not an object with a step, or its loss is not a finite number; the message names the line.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(read_text(path, MAX_METRICS_BYTES).split("\n")[:-1], 1):
        if text:
            name = f"{path}, line {number}"
            try:
                line = json.loads(text)  # a norm may be Infinity, which JSON itself does not have
            except (ValueError, RecursionError) as error:
                raise FileError(f"{name}: no JSON; without the line the rest is read") from error
            check_number(
                line.get("step") if isinstance(line, dict) else None, f"{name}: step", least=0, most=1e15, whole=True
            )
            if line.get("loss") is not None:
                check_number(line["loss"], f"{name}: loss", least=-1e15, most=1e15)
            lines.append(line)
    return lines


def _rounded(value):
    """Seven significant digits: what a float32 holds."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


class Progress:
    """A progress bar on a terminal; elsewhere a plain line at the first update, now and then, and at the last step; each with
    the time left.

    total: steps. done: steps made before. label: what runs, for example "base" or "pairs-03".
    """

    def __init__(self, total: int, *, done: int = 0, label: str = "", stream=None):
        self._stream = stream or sys.stderr
        self._total, self._done, self._label = total, done, label
        self._first, self._began = done, time.monotonic()
        self._printed_at = -math.inf
        self._bar = None
        if self._stream.isatty() and shows_progress():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=label,
                file=self._stream,
                leave=False,
                bar_format="{desc}: step {n_fmt}/{total_fmt} |{bar}|{postfix}",
            )

    def update(self, done: int, text: str) -> None:
        """Shows that `done` steps are made, with `text` beside it."""
        text += self._left(done)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._done)
        elif not shows_progress():
            pass
        elif done >= self._total or time.monotonic() - self._printed_at >= PLAIN_LINE_EVERY_S:
            self._printed_at = time.monotonic()
            print(f"{self._label}: step {done}/{self._total}, {text}", file=self._stream, flush=True)
            said()
        self._done = done

    def _left(self, done: int) -> str:
        """ ", 3 min left", by the steps since this object was made; "" where none is left or was made since."""
        if not self._first < done < self._total:
            return ""
        seconds = (time.monotonic() - self._began) * (self._total - done) / (done - self._first)
        return f", {duration(seconds)} left"

    def print(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class StepTrace:
    """Traces the steps `first` to `last` (numbered as in the metrics, both included) below `directory`.

    The trace begins when the steps before it are done, so that it has only these steps. A run that is resumed inside
    the range traces its remaining steps.
    """

    def __init__(self, directory: Path, first: int, last: int):
        self._directory, self._first, self._last = directory, first, last
        self._tracing = False

    def before(self, step: int, running) -> None:
        """Call before `step` draws its data. running: results of the steps before it, to wait for."""
        if not self._tracing and self._first <= step <= self._last:
            jax.block_until_ready(running)
            jax.profiler.start_trace(self._directory)
            self._tracing = True

    def after(self, step: int, running) -> None:
        """Call after `step` is dispatched. running: its results, to wait for."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(running)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


class CompileMonitor:
    """Counts the programs that this process has compiled, or taken from the cache, since the monitor was created.

    Attributes:
      compiled: programs that XLA compiled.
      from_cache: programs read from the persistent compilation cache.
      seconds: time spent on both.
    """

    def __init__(self):
        self._requests = self.from_cache = 0
        self.seconds = 0.0
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    @property
    def compiled(self) -> int:
        return self._requests - self.from_cache

    def line(self) -> str:
        return f"compiled {self.compiled} programs, {self.from_cache} from cache ({self.seconds:.1f} s)"

    def _on_event(self, event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.from_cache += 1

    def _on_duration(self, event: str, duration_secs: float, **_) -> None:
        # JAX sends this event for programs from the cache too.
        if event == "/jax/core/compile/backend_compile_duration":
            self._requests += 1
            self.seconds += duration_secs


def keep_programs() -> None:
    """Keeps compiled programs for later starts and other runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache.

    Without a home folder (as in some containers) they are not kept, and a line on stderr says so.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        print(
            "medcg: this user has no home folder, so compiled programs are not kept; JAX_COMPILATION_CACHE_DIR=FOLDER "
            "keeps them",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return
    enable_cache(caches / "medcg_jax" / "xla")


def enable_cache(directory: Path) -> None:
    """Keeps every compiled program, however small, in `directory`, and reuses those that are in it."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
