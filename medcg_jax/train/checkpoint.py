"""Checkpoints of a run's state and its position in the data (Orbax, asynchronous), checkpoints of parameters alone,
and the disk space that they need.

A checkpoint is written to the folder `STEP-NUMBER.part`: arrays by Orbax and `meta.json`, then the digests of all files
(`checksums`; each process digests its share). The folder is then renamed to `STEP`, and older checkpoints are removed.
So every folder called `STEP` was once complete, and a missing or changed file in it is damage. A damaged checkpoint is
reported and set aside before anything is loaded from it, and the one before it is used. A `.part` folder that a killed
process left behind is removed at the next start.
"""

import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from medcg_jax.config import ConfigError, RunError
from medcg_jax.families.build import Config, num_bytes
from medcg_jax.files import write_whole
from medcg_jax.processes import barrier, broadcast, gather
from medcg_jax.train import checksums
from medcg_jax.train.meta import META_FILE, CheckpointError, read_meta

PART = ".part"
# How long a process waits for the digests of the others, each of which reads as much as it does itself.
SHARES_WAIT_S = 1800.0
POLL_S = 0.02
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
# Numbers all saves of this process: after a failed save, threads of Orbax may still write to its directory.
_saves = itertools.count()


class SaveError(RunError):
    """A checkpoint could not be written; the message is one line with the room it needs and the last good one."""


class Checkpoints:
    """The checkpoints of one run (or one cell) in `directory`, which all processes see.

    The newest `keep` are kept, and every one whose step is a multiple of `keep_every_steps` (0: none).
    report: prints the line about a damaged checkpoint.

    Attributes:
      skipped: a line for each damaged checkpoint that was set aside.
    """

    def __init__(
        self, directory: Path, *, keep: int = 2, keep_every_steps: int = 0, report: Callable[[str], None] = print
    ):
        self.directory = Path(directory).absolute()
        self.skipped: list[str] = []
        self._keep, self._keep_every, self._report = keep, keep_every_steps, report
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None
        self._saving: tuple[int, float, Path] | None = None  # step, bytes and directory of what is being written
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob(f"*{PART}"):
                shutil.rmtree(path, ignore_errors=True)
        barrier(f"{self.directory} is clean")

    def save(self, step: int, state, meta: dict) -> None:
        """Writes `state` (a tree of arrays) and `meta` (JSON) for `step`, in the background.

        A checkpoint appears whole or not at all. If there is one of this step already, nothing is written.

        Raises:
          SaveError: this or the previous checkpoint could not be written (a full disk). The run ends then, because its
            further steps could not be kept; the last good checkpoint is still there.
        """
        self.wait()
        if step in self.steps():
            return
        plain = _plain(state)
        # Processes of one run save together, so all give it the same name.
        folder = self.directory / f"{step}-{next(_saves)}{PART}"
        self._saving = step, num_bytes(plain), folder
        try:
            if jax.process_index() == 0:
                folder.mkdir()
                write_whole(folder / META_FILE, json.dumps({**meta, "step": step}, indent=1) + "\n")
            self._orbax.save(folder / "state", args=ocp.args.StandardSave(plain))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a disk
            raise self._save_error(error) from error
        # A daemon, so that a process that is told to end at once does not wait for it.
        self._writing = threading.Thread(target=self._finish, args=(step, folder), name="checkpoint", daemon=True)
        self._writing.start()

    def restore(self, abstract_state) -> tuple[Any, dict] | None:
        """(state, meta) of the newest whole checkpoint; None if there are no checkpoints.

        abstract_state: `jax.ShapeDtypeStruct`s with the target shardings, of any mesh and any number of processes.

        Raises:
          CheckpointError: there are checkpoints, and none can be read.
        """
        self.wait()
        failed: list[tuple[int, str]] = []
        for step in reversed(broadcast(f"checkpoints in {self.directory}", self.steps)):
            path = self.directory / str(step)
            why = _first_fault(path)
            if why is None:
                try:
                    state, meta = self._read(path, step, abstract_state)
                except Exception as error:  # raised on all processes, which read the same bytes
                    why = _one_line(error)
            if why is not None:
                failed.append((step, why))
                continue
            for bad, why in failed:
                aside = self._set_aside(bad)
                self.skipped.append(f"checkpoint {bad} is damaged and lies in {aside}; going on from {step} ({why})")
                self._report(self.skipped[-1])
            return state, meta
        if not failed:
            return None
        step, why = failed[0]
        raise CheckpointError(
            f"{self.directory}: no checkpoint can be read, the newest is of step {step} ({why}); "
            "delete the directory to start over"
        )

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, rising."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit() and path.is_dir())

    def latest(self) -> Path | None:
        """The directory of the newest checkpoint, once its files are written; None without one."""
        self.wait()
        steps = self.steps()
        return self.directory / str(steps[-1]) if steps else None

    def wait(self) -> None:
        """Returns when everything is written. Raises SaveError if that failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        error, self._error = self._error, None
        if error is not None:
            raise self._save_error(error) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _finish(self, step: int, folder: Path) -> None:
        """Runs on a thread: waits for the arrays, writes digests, renames the folder, removes older checkpoints."""
        try:
            self._orbax.wait_until_finished()
            count, whole = jax.process_count(), self.directory / str(step)
            checksums.write_share(folder, jax.process_index(), count)
            if jax.process_index() == 0:
                _wait_for(
                    lambda: checksums.shares_are_there(folder, count), f"digests of {count} processes in {folder}"
                )
                _to_disk(folder)
                os.replace(folder, whole)
                _to_disk(self.directory)
                self._remove_old()
            else:
                _wait_for(whole.is_dir, f"{whole}, from the first process")
        except Exception as error:  # raised by `wait`, on the main thread
            self._error = error

    def _remove_old(self) -> None:
        for step in self.steps()[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                # Renamed first: if a kill interrupts the removal, what is left is not taken for a checkpoint.
                gone = self.directory / f"{step}-old{PART}"
                os.replace(self.directory / str(step), gone)
                shutil.rmtree(gone)

    def _save_error(self, error: Exception) -> SaveError:
        assert self._saving is not None
        step, needed, folder = self._saving
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        good = self.steps()
        last = f"the last good one is of step {good[-1]}" if good else "there is no other"
        free = free_bytes(self.directory)
        return SaveError(
            f"{self.directory}: the checkpoint of step {step} could not be written; it needs "
            f"{amount(needed)} and {amount(free)} are free; {last} ({_one_line(error)})"
        )

    def _read(self, path: Path, step: int, abstract_state):
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
        if meta["step"] != step:
            raise ValueError(f"it is the checkpoint of step {meta['step']}")
        leaves = self._orbax.restore(path / "state", args=ocp.args.StandardRestore(_plain(abstract_state)))
        return jax.tree.unflatten(jax.tree.structure(abstract_state), jax.tree.leaves(leaves)), meta

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint away without deleting a file; its step will be saved again."""
        aside = self.directory.with_name(f"{self.directory.name}-damaged-{step}")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.directory / str(step), aside)
        barrier(f"{aside} is set aside")
        return aside


def save_params(
    directory: Path, params, config: Config, meta: dict | None = None, *, trained_on: str = "",
    beside: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Writes parameters in the layout of a converted checkpoint (for `model.checkpoint`), whole or not at all.

    An existing directory is replaced.
    meta: JSON that `load_params` returns: the configuration that made them, and its fingerprint.
    trained_on: if `params` are only the trained parts, the checkpoint with the other parameters.
    beside: the tokenizer's file and the checkpoint that the run started from; what an export needs of them is copied.
    """
    from medcg_jax.families.weights import convert
    from medcg_jax.families.weights.files import copy_companions

    directory = Path(directory).absolute()
    folder = directory.with_name(f".{directory.name}.part")
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    barrier(f"{folder} is empty")
    convert.save_params(folder, params, config, trained_on=trained_on)
    if jax.process_index() == 0:
        copy_companions(beside, folder)
        (folder / META_FILE).write_text(json.dumps(meta or {}, indent=1) + "\n")
    barrier(f"{folder} has its files")
    checksums.write_share(folder, jax.process_index(), jax.process_count())
    barrier(f"{folder} has its digests")
    if jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(folder, directory)
    barrier(f"{directory} is written")


def load_params(directory: Path, config: Config, mesh: Mesh, *, base: str = "", seed: int = 0):
    """(graphdef, params, meta) as `save_params` wrote them, on `mesh`.

    base: the checkpoint that they were trained on, in case it has moved. seed: initialises adapters that the directory
      does not have.

    Raises:
      CheckpointError: files are missing or damaged.
      WeightsError: the parameters are of another architecture.
    """
    from medcg_jax.families.weights import convert
    from medcg_jax.families.weights.hub import resolve

    meta = read_meta(directory)
    if meta is None:
        raise CheckpointError(f"{directory}: {META_FILE} is missing or no JSON; delete the directory to make it anew")
    if (why := _first_fault(Path(directory))) is not None:
        raise _damaged(directory, why)
    try:
        trained_on = convert.trained_parts(Path(directory))
        parts = {"base": resolve(base)} if base and trained_on and not Path(trained_on[0]).is_dir() else {}
        graphdef, params = convert.load_checkpoint(Path(directory), config, mesh, parts=parts, seed=seed)
    except convert.WeightsError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(
            f"{directory}: parameters cannot be read ({_one_line(error)}); delete the directory to make it anew"
        ) from error
    return graphdef, params, meta


def check_whole(directory: Path) -> None:
    """Raises CheckpointError if files of a directory that has their digests are missing or changed; all processes of a
    run call it."""
    if checksums.are_in(directory) and (why := _first_fault(directory)) is not None:
        raise _damaged(directory, why)


def _damaged(directory: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{directory}: parameters are damaged ({why}); delete the directory to make it anew")


def _first_fault(directory: Path) -> str | None:
    """`checksums.first_fault`, with the same result on all processes; each reads its share of the bytes."""
    fault = checksums.first_fault(directory, jax.process_index(), jax.process_count())
    return next(filter(None, gather(f"digests of {directory}", fault)), None)


def _plain(tree) -> dict:
    """The tree's leaves by their path, so that the files do not depend on classes of optax or flax."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Numbered, so that Orbax returns them in this order.
    return {f"{i:04d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _wait_for(exists: Callable[[], bool], what: str) -> None:
    """Returns when files that other processes write exist. Raises TimeoutError after `SHARES_WAIT_S`."""
    deadline = time.monotonic() + SHARES_WAIT_S
    while not exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen in {SHARES_WAIT_S:.0f} s: {what}")
        time.sleep(POLL_S)


def _to_disk(directory: Path) -> None:
    """Flushes the file names in a directory to the disk, so that they survive a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def amount(count: float) -> str:
    """Bytes for people: "85.2 GB", "0.7 kB"."""
    unit, size = next(((unit, size) for unit, size in UNITS if count >= size), UNITS[-1])
    return f"{count / size:.1f} {unit}"


def free_bytes(directory: Path) -> int:
    """Free bytes on the disk of `directory`, which need not exist yet."""
    directory = directory.absolute()
    return shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free


def used_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; 0 if it does not exist."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.stat().st_size
        except OSError:  # removed meanwhile
            pass
    return total


def check_room(directory: Path, needed: float, what: str) -> None:
    """Creates `directory` and checks that its disk has room. Files in it count as room: they will be replaced.

    needed: bytes. what: for the message, what needs them and the fields that decide how many.

    Raises:
      ConfigError: the directory cannot be written, or has too little room; the message names both amounts.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A write is tried, since the mode says too little: root may write anyway, and nobody on a read-only disk.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written ({error.strerror}), and {amount(needed)} are needed there ({what}); "
            "give another --workdir"
        ) from error
    free, used = free_bytes(directory), used_bytes(directory)
    if free + used < needed:
        raise ConfigError(
            f"{directory}: {amount(needed)} are needed there ({what}), {amount(free)} are free and "
            f"{amount(used)} used by an earlier start; make room, or give another --workdir"
        )
