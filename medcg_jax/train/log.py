"""What a run says: progress on a terminal or in plain lines, metrics (JSON lines, boards), and what was compiled."""

import json
import os
import sys
import time
from pathlib import Path

import jax

from medcg_jax.files import write_whole
from medcg_jax.train.wandb_log import WandbLog, WandbTarget
from medcg_jax.untrusted import FileError, check_number, read_text

METRICS = ("step", "loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "mfu", "data_wait")
# Without a terminal: at most one line in so many seconds.
PLAIN_LINE_EVERY_S = 10.0
# A metrics file: 500,000 lines.
MAX_METRICS_BYTES = 2**27


class MetricsFile:
    """One cell's metrics as JSON lines, each step once, and the same in TensorBoard and Weights & Biases where asked.

    Opened at `step` (updates made so far): lines of later steps, and a last line cut off by a kill, are dropped, since
    the run writes them again.
    """

    def __init__(self, path: Path, *, step: int = 0, tensorboard: Path | None = None, wandb: WandbTarget | None = None):
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
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
        for thing in (self._file, self._board, self._wandb):
            if thing is not None:
                thing.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, without a last one that a kill cut off; [] where there is no file.

    Raises:
      FileError: a line is no object with a step, or its loss is no finite number; the message names it.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(read_text(path, MAX_METRICS_BYTES).split("\n")[:-1], 1):
        if line:
            try:
                found.append(json.loads(line))  # a norm may be Infinity, which JSON itself does not have
            except (ValueError, RecursionError) as error:
                raise FileError(f"{path}, line {number}: no JSON; without the line the rest is read") from error
            step = found[-1].get("step") if isinstance(found[-1], dict) else None
            check_number(step, f"{path}, line {number}: step", least=0, most=1e15, whole=True)
            if found[-1].get("loss") is not None:
                check_number(found[-1]["loss"], f"{path}, line {number}: loss", least=-1e15, most=1e15)
    return found


def _rounded(value):
    """Seven significant digits: what a float32 holds."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


class Progress:
    """A progress bar on a terminal, a plain line now and then elsewhere, the last step always.

    total: steps. done: those made before. label: what runs, as "base" or "pairs-03".
    """

    def __init__(self, total: int, *, done: int = 0, label: str = "", stream=None):
        self._stream = stream or sys.stderr
        self._total, self._done, self._label = total, done, label
        self._said_at = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, file=self._stream, unit="step", leave=False)

    def update(self, done: int, text: str) -> None:
        """`done` steps are made; `text` says how they went."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._done)
        elif done >= self._total or time.monotonic() - self._said_at >= PLAIN_LINE_EVERY_S:
            self._said_at = time.monotonic()
            print(f"{self._label}: step {done}/{self._total}, {text}", file=self._stream, flush=True)
        self._done = done

    def say(self, line: str) -> None:
        """One line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class CompileMonitor:
    """Counts the programs compiled in this process since the monitor was made, and those taken from the cache.

    Attributes:
      compiled: programs that XLA compiled.
      from_cache: programs read from the persistent compilation cache instead.
      seconds: spent on both.
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

    def _on_duration(self, event: str, seconds: float, **_) -> None:
        # One for every program, from the cache or not.
        if event == "/jax/core/compile/backend_compile_duration":
            self._requests += 1
            self.seconds += seconds


def keep_programs() -> None:
    """Keeps compiled programs for later starts and other runs, where JAX_COMPILATION_CACHE_DIR says or in ~/.cache.

    Without a home folder (a container with a user of its own) they are not kept, which is said.
    """
    if jax.config.jax_compilation_cache_dir:
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
    """Keeps every compiled program, however small, in `directory`, and takes from there what is there already."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
