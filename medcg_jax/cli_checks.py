"""Checks of paths before a verb imports what it needs, so that a wrong one is told at once."""

from pathlib import Path

from medcg_jax.config import AUTO, ConfigError, RunConfig
from medcg_jax.data.records import DataError
from medcg_jax.data.sources import check_root, is_prepared
from medcg_jax.eval import trained_with
from medcg_jax.families.weights.hub import is_repository
from medcg_jax.families.weights.kind import check_family, check_is_released, check_weights
from medcg_jax.train.meta import check_same_run, identity, newest_config


def check_run(run: RunConfig, verb: str, workdir: Path) -> None:
    """Checks the paths of a run: its data, its checkpoint, and for a test the parameters.

    Raises:
      ConfigError, DataError: one is missing, or holds something else than the configuration says.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; expected a folder, or a new name")
    checkpoint, has_trained = run.model.checkpoint, (workdir / "params").is_dir()
    is_of_hub = is_repository(checkpoint)
    if verb == "eval":
        if not has_trained and not checkpoint:
            raise ConfigError(
                f"{workdir / 'params'} is missing and model.checkpoint is empty: expected a --workdir of `medcg train`"
            )
        if has_trained or not is_of_hub:
            trained_with.check_same(run, trained_with.parameters_of(run, workdir))
    if verb == "reproduce":  # what a grid trains is decided by its data
        check_root(run.data)
    if not is_of_hub and not run.study.models and not (verb == "eval" and has_trained):
        check_weights(run.model)
    if checkpoint and not is_of_hub and not run.study.models:
        check_family(checkpoint, run.model.name)
    check_root(run.data)
    # Of others the commit or the family is not known yet, which `fit` compares.
    is_known = not is_of_hub and run.model.name != AUTO
    if verb == "train" and is_known and (theirs := newest_config(workdir / "checkpoints")):
        check_same_run(theirs, identity(run), workdir / "checkpoints")


def check_tree_folder(root: str) -> None:
    """Raises DataError if `root`, of a verb of `medcg data`, is no folder of a tree."""
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; expected that of a Med-MAT tree")
    if is_prepared(root):
        raise DataError(f"{root}: it is prepared; expected the tree that it was prepared from")


def check_checkpoint(src: str) -> None:
    """Raises ConfigError if `src` is a path, and there is nothing."""
    if not Path(src).exists() and not is_repository(src):
        raise ConfigError(f"{src}: no such file or folder; expected a checkpoint's")


def check_reference(src: str, against: str, inputs: str) -> None:
    """Raises ConfigError if `medcg parity` has nothing to compare `src` with."""
    check_checkpoint(src)
    if against:
        check_checkpoint(against)
    if inputs and not Path(inputs).is_file():
        raise ConfigError(f"--inputs={inputs}: no such file")
    if not against and not inputs:
        check_is_released(Path(src))
