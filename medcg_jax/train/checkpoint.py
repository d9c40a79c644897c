"""Checkpoints of a run's state with its position in the data (Orbax, asynchronous, some kept), and of parameters
alone; room on disk.

A checkpoint is written in `STEP-NUMBER.part`: the arrays by Orbax, then `meta.json`, then the digests of all files
(`checksums`), each process those of its share. Only then it is renamed to `STEP`, and only then older ones are removed.
So whatever is called `STEP` was whole once, and a file of it that is missing, or differs in a bit, is damage: it is
named, the checkpoint is set aside before anything of it is loaded, and the one before it taken. What a kill has left of
a `.part` is removed at the next start.
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

META_FILE = "meta.json"
PART = ".part"
# What a process waits for the digests of the others, which read as much as it does itself.
SHARES_WAIT_S = 1800.0
POLL_S = 0.02
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
# Saves of this process, of all runs: where one failed, threads of Orbax may go on writing to its directory.
_saves = itertools.count()


class CheckpointError(ConfigError):
    """No checkpoint of those that are there can be read; the message is one line for the user."""


class SaveError(RunError):
    """A checkpoint could not be written; the message is one line with the room it needs and the last good one."""


class Checkpoints:
    """The checkpoints of one run (or of one cell of several) in `directory`, which all processes see.

    The newest `keep` are kept, and every one whose step is a multiple of `keep_every_steps` (0: none).
    report: takes the line about a checkpoint that is damaged.

    Attributes:
      skipped: a line for every checkpoint that was found damaged and set aside.
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
        """Writes `state` (a tree of arrays) and `meta` (JSON) for `step`; the files are written while the run goes on.

        A checkpoint appears whole or not at all. One of the same step is already there: nothing is written.

        Raises:
          SaveError: the one before could not be written (a full disk). The run ends over it: what it would do from now
            on could not be kept, and the last good checkpoint is still there.
        """
        self.wait()
        if step in self.steps():
            return
        plain = _plain(state)
        # Processes of one run save together, so all give it the same name.
        part = self.directory / f"{step}-{next(_saves)}{PART}"
        self._saving = step, num_bytes(plain), part
        try:
            if jax.process_index() == 0:
                part.mkdir()
                write_whole(part / META_FILE, json.dumps({**meta, "step": step}, indent=1) + "\n")
            self._orbax.save(part / "state", args=ocp.args.StandardSave(plain))
        except Exception as error:  # Orbax and TensorStore raise many kinds for a disk
            raise self._save_error(error) from error
        # A daemon: a process that is told to end at once does not wait for a
        self._writing = threading.Thread(target=self._finish, args=(step, part), name="checkpoint", daemon=True)
        self._writing.start()

    def restore(self, abstract_state) -> tuple[Any, dict] | None:
        """(state, meta) of the newest checkpoint that is whole; None where there is none at all.

        abstract_state: `jax.ShapeDtypeStruct`s with the shardings wanted, of any mesh and any number of processes.

        Raises:
          CheckpointError: there are checkpoints, and none can be read.
        """
        self.wait()
        failed = []
        for step in reversed(broadcast(f"checkpoints in {self.directory}", self.steps)):
            path = self.directory / str(step)
            why = _first_fault(path)
            if why is None:
                try:
                    state, meta = self._read(path, step, abstract_state)
                except Exception as error:  # the same on all processes: they have read the same bytes
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
        """The steps of the checkpoints that are there, rising; one that is being written is not."""
        return sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit() and path.is_dir())

    def latest(self) -> Path | None:
        """The newest checkpoint, its files written."""
        self.wait()
        steps = self.steps()
        return self.directory / str(steps[-1]) if steps else None

    def wait(self) -> None:
        """Returns when everything is written; raises SaveError where that could not be done."""
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

    def _finish(self, step: int, part: Path) -> None:
        """On a thread of its own: digests, the new name, and the end of older checkpoints."""
        try:
            self._orbax.wait_until_finished()
            count, whole = jax.process_count(), self.directory / str(step)
            checksums.write_share(part, jax.process_index(), count)
            if jax.process_index() == 0:
                _wait_for(lambda: checksums.shares_are_there(part, count), f"digests of {count} processes in {part}")
                _to_disk(part)
                os.replace(part, whole)
                _to_disk(self.directory)
                self._remove_old()
            else:
                _wait_for(whole.is_dir, f"{whole}, from the first process")
        except Exception as error:  # told by `wait`, on the main thread
            self._error = error

    def _remove_old(self) -> None:
        for step in self.steps()[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                # Renamed first: what a kill leaves of it is no checkpoint.
                gone = self.directory / f"{step}-old{PART}"
                os.replace(self.directory / str(step), gone)
                shutil.rmtree(gone)

    def _save_error(self, error: Exception) -> SaveError:
        assert self._saving is not None
        step, needed, part = self._saving
        if jax.process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)
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
        """Moves a damaged checkpoint out of the way: its step will be saved again, and no file is deleted."""
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
    """Writes parameters in the layout of a converted checkpoint (`model.checkpoint` takes it), whole or not at all.

    meta: JSON that `load_params` gives back: what made them, and its fingerprint.
    trained_on: the checkpoint that holds the rest, where `params` are no more than the parts that were trained.
    beside: the tokenizer's file and the checkpoint that the run started from: what an export needs of them is copied.
    A directory that is there already is replaced.
    """
    from medcg_jax.families.weights import convert
    from medcg_jax.families.weights.files import copy_companions

    directory = Path(directory).absolute()
    part = directory.with_name(f".{directory.name}.part")
    if jax.process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier(f"{part} is empty")
    convert.save_params(part, params, config, trained_on=trained_on)
    if jax.process_index() == 0:
        copy_companions(beside, part)
        (part / META_FILE).write_text(json.dumps(meta or {}, indent=1) + "\n")
    barrier(f"{part} has its files")
    checksums.write_share(part, jax.process_index(), jax.process_count())
    barrier(f"{part} has its digests")
    if jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(part, directory)
    barrier(f"{directory} is written")


def load_params(directory: Path, config: Config, mesh: Mesh, *, base: str = "", seed: int = 0):
    """(graphdef, params, meta) of what `save_params` wrote, on `mesh`.

    base: where to look for what it was trained on, if that is no longer where it was. seed: of adapters that are not
      there.

    Raises:
      CheckpointError: files are missing or damaged.
      WeightsError: the parameters are of another architecture.
    """
    from medcg_jax.families.weights import convert

    meta = read_meta(directory)
    if meta is None:
        raise CheckpointError(f"{directory}: {META_FILE} is missing or no JSON; delete the directory to make it anew")
    why = _first_fault(Path(directory))
    if why is not None:
        raise CheckpointError(f"{directory}: parameters are damaged ({why}); delete the directory to make it anew")
    try:
        trained_on = convert.trained_parts(Path(directory))
        parts = {"base": Path(base)} if base and trained_on and not Path(trained_on[0]).is_dir() else {}
        graphdef, params = convert.load_checkpoint(Path(directory), config, mesh, parts=parts, seed=seed)
    except convert.WeightsError:
        raise
    except Exception as error:  # as in Checkpoints.restore
        raise CheckpointError(
            f"{directory}: parameters cannot be read ({_one_line(error)}); delete the directory to make it anew"
        ) from error
    return graphdef, params, meta


def read_meta(directory: Path) -> dict | None:
    """The meta of parameters that `save_params` wrote; None where there is none that can be read."""
    try:
        meta = json.loads((Path(directory) / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) else None


def _first_fault(directory: Path) -> str | None:
    """`checksums.first_fault`, each process of its share of the bytes; the same on all."""
    fault = checksums.first_fault(directory, jax.process_index(), jax.process_count())
    return next(filter(None, gather(f"digests of {directory}", fault)), None)


def _plain(tree) -> dict:
    """The tree's leaves by their path: what is on disk does not hang on classes of optax or flax."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Numbered, so that they come back in this order.
    return {f"{i:04d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _wait_for(there: Callable[[], bool], what: str) -> None:
    """Looks until it is there: other processes show what they have done by their files."""
    deadline = time.monotonic() + SHARES_WAIT_S
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen in {SHARES_WAIT_S:.0f} s: {what}")
        time.sleep(POLL_S)


def _to_disk(directory: Path) -> None:
    """Hands the names in a directory to the disk, so that a machine that fails keeps them."""
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
    """Bytes that can be written where `directory` is, or will be."""
    directory = directory.absolute()
    return shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free


def used_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.stat().st_size
        except OSError:  # removed meanwhile
            pass
    return total


def check_room(directory: Path, needed: float, what: str) -> None:
    """Makes `directory`; what lies in it already counts as room, since it makes way for what is written.

    needed: bytes. what: the fields that decide how many.

    Raises:
      ConfigError: nothing can be written there, or it has less room than is needed; the message names both amounts.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Tried, not asked for: root may write where the mode says no, and not on a read-only disk.
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
