"""Checkpoints: a run's state with its position in the data (Orbax, asynchronous, the last few kept); parameters alone.

Every checkpoint carries a sum of each array's bits. It is computed on the devices, is the same for every mesh, and is
compared when the checkpoint is read: a damaged checkpoint is set aside with a line that says so, and the one before
it taken.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from medcg_jax.distributed import barrier
from medcg_jax.models.build import num_params
from medcg_jax.models.llava import LlavaConfig
from medcg_jax.run_config import ConfigError

META_FILE = "meta.json"


class CheckpointError(ConfigError):
    """No checkpoint of those that are there can be read; the message is one line for the user."""


class Checkpoints:
    """The checkpoints of one run (or of one cell of several) in `directory`.

    say: takes the line about a checkpoint that is damaged.
    """

    def __init__(self, directory: Path, *, keep: int = 2, say: Callable[[str], None] = print):
        self.directory = Path(directory).absolute()
        self._say = say
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state, meta: dict) -> None:
        """Writes `state` (a tree of arrays) and `meta` (JSON) for `step`; the files are written while the run goes on.

        A checkpoint appears whole or not at all. One of the same step is already there: nothing is written.
        """
        if step in self._manager.all_steps():
            return
        meta = {**meta, "step": step, "bit_sums": bit_sums(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_plain(state)), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args)

    def restore(self, abstract_state) -> tuple[object, dict] | None:
        """(state, meta) of the newest checkpoint that is whole; None where there is none at all.

        abstract_state: `jax.ShapeDtypeStruct`s with the shardings wanted, of any mesh.

        Raises:
          CheckpointError: there are checkpoints, and none can be read.
        """
        self.wait()
        failed = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, meta = self._read(step, abstract_state)
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                failed.append((step, _one_line(error)))
                continue
            for bad, why in failed:
                aside = self._set_aside(bad)
                self._say(f"checkpoint {bad} is damaged and lies in {aside}; going on from {step} ({why})")
            return state, meta
        if not failed:
            return None
        step, why = failed[0]
        raise CheckpointError(
            f"{self.directory}: no checkpoint can be read, the newest is of step {step} ({why}); "
            "delete the directory to start over"
        )

    def latest(self) -> Path | None:
        """The newest checkpoint, its files written."""
        self.wait()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _read(self, step: int, abstract_state):
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_plain(abstract_state)), meta=ocp.args.JsonRestore()
        )  # fmt: skip
        found = self._manager.restore(step, args=args)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), jax.tree.leaves(found["state"]))
        check_bit_sums(state, found["meta"]["bit_sums"])
        return state, found["meta"]

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way: its step will be saved again, and no file is deleted."""
        aside = self.directory.with_name(f"{self.directory.name}-damaged-{step}")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.directory / str(step), aside)
        barrier(f"{aside} is set aside")
        self._manager.reload()
        return aside


def save_params(directory: Path, params, config: LlavaConfig, meta: dict | None = None) -> None:
    """Writes parameters in the layout of a converted checkpoint (`model.checkpoint` takes it), whole or not at all.

    meta: JSON that `load_params` gives back: what made them, and its fingerprint.
    A directory that is there already is replaced.
    """
    from medcg_jax.weights import convert

    directory = Path(directory).absolute()
    part = directory.with_name(f".{directory.name}.part")
    if jax.process_index() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier(f"{part} is empty")
    convert.save_params(part, params, config)
    sums = bit_sums(params)
    if jax.process_index() == 0:
        (part / META_FILE).write_text(json.dumps({**(meta or {}), "bit_sums": sums}, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(part, directory)
    barrier(f"{directory} is written")


def load_params(directory: Path, config: LlavaConfig, mesh: Mesh):
    """(graphdef, params, meta) of what `save_params` wrote, on `mesh`.

    Raises:
      CheckpointError: files are missing or damaged.
      WeightsError: the parameters are of another architecture.
    """
    from medcg_jax.weights import convert

    meta = read_meta(directory)
    if meta is None:
        raise CheckpointError(f"{directory}: {META_FILE} is missing or no JSON; delete the directory to make it anew")
    try:
        graphdef, params = convert.load_checkpoint(Path(directory), config, mesh)
        check_bit_sums(params, meta["bit_sums"])
    except convert.WeightsError:
        raise
    except Exception as error:  # as in Checkpoints.restore
        raise CheckpointError(
            f"{directory}: parameters cannot be read ({_one_line(error)}); delete the directory to make it anew"
        ) from error
    return graphdef, params, meta


def read_meta(directory: Path) -> dict | None:
    """The meta of parameters that `save_params` wrote; None where there are none."""
    try:
        return json.loads((Path(directory) / META_FILE).read_text())
    except (OSError, ValueError):
        return None


def bit_sums(tree) -> list[int]:
    """For every array the sum of its elements' bits modulo 2**32: equal on every mesh, other after any flipped bit."""
    return [int(x) for x in jax.device_get(_bit_sums(jax.tree.leaves(tree)))]


def check_bit_sums(tree, expected: list[int]) -> None:
    """Raises ValueError where `tree` does not have the sums that were stored with it."""
    found = bit_sums(tree)
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} arrays, {len(expected)} expected")
    wrong = [i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(found)} arrays ({num_params(tree):,} numbers) are not as they were saved")


@jax.jit
def _bit_sums(leaves):
    def one(x):
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _plain(tree) -> dict:
    """The tree's leaves by their path: what is on disk does not hang on classes of optax or flax."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Numbered, so that they come back in this order.
    return {f"{i:04d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
