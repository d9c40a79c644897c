"""The checkpoint that a run starts from: found or fetched, named with its commit and family, and checked."""

from pathlib import Path
from typing import Any

from medcg_jax.config import AUTO, ConfigError, ModelConfig, RunConfig, has_any_size, replace
from medcg_jax.config_checks import check
from medcg_jax.families.build import Config
from medcg_jax.families.weights.convert import (
    WeightsError,
    check_same,
    open_checkpoint,
    read_config,
    without_new_adapters,
)
from medcg_jax.families.weights.hub import is_repository, pinned, resolve
from medcg_jax.families.weights.processor import IMAGES, PROCESSOR
from medcg_jax.processes import barrier, broadcast, is_first_of_host
from medcg_jax.untrusted import read_json, shown

CHECKPOINT_FLAG = "model.checkpoint="
# Of an image processor's settings.
MAX_CONFIG_BYTES = 2**20
# How long processes wait for the one of their host that fetches: 150 GB at 5 MB/s take 8 hours.
FETCH_WAIT_S = 12 * 3600.0


def with_checkpoint(run: RunConfig) -> RunConfig:
    """The run with its checkpoints named as they are now: those of the hub with their commit, so that it goes on from the
    same one, and with the checkpoint's family as `model.name` in place of "auto".

    Of the hub only small files are fetched; `weights_dir` fetches the weights, once all else is known to be right. All
    processes of a run call it.

    Raises:
      ConfigError, RunError: as `hub.resolve`; or the checkpoint is of no family, or of one that the run does not fit.
    """
    flags = [flag for flags in run.study.model_flags.values() for flag in flags if flag.startswith(CHECKPOINT_FLAG)]
    asked = dict.fromkeys([run.model.checkpoint, *(flag.removeprefix(CHECKPOINT_FLAG) for flag in flags)])
    names = [name for name in asked if is_repository(name)]
    if names:
        commits = dict(zip(names, broadcast("commits of checkpoints", lambda: list(map(pinned, names))), strict=True))
        for name in commits.values():
            once_a_host(name, weights=False)
        in_place = {CHECKPOINT_FLAG + name: CHECKPOINT_FLAG + commit for name, commit in commits.items()}
        of_models = {
            model: tuple(in_place.get(f, f) for f in flags_of_model)
            for model, flags_of_model in run.study.model_flags.items()
        }
        checkpoint = commits.get(run.model.checkpoint, run.model.checkpoint)
        run = replace(run, model__checkpoint=checkpoint, study__model_flags=of_models)
    if run.model.name == AUTO and not run.study.models:
        run = replace(run, model__name=read_config(resolve(run.model.checkpoint, weights=False)).family)
        check(run)
    return run


def with_sizes(run: RunConfig) -> RunConfig:
    """`with_checkpoint` for verbs that need no weights: the run itself where its models are of named sizes."""
    return with_checkpoint(run) if any(map(has_any_size, (run.model.name, *run.study.models))) else run


def once_a_host(name: str, *, weights: bool) -> Path:
    """`hub.resolve`, by the first process of each host before the others."""
    if is_repository(name):
        if is_first_of_host():
            resolve(name, weights=weights)
        barrier(f"{name} is fetched", FETCH_WAIT_S)
    return resolve(name, weights=weights)


def checkpoint_dir(model: ModelConfig) -> Path | None:
    """The folder of `model.checkpoint`, of the hub's without its weights; None if it is empty."""
    return resolve(model.checkpoint, weights=False) if model.checkpoint else None


def weights_dir(model: ModelConfig) -> Path | None:
    """The folder of `model.checkpoint`, whole; None if it is empty. All processes of a run call it.

    Raises:
      ConfigError, RunError: as `hub.resolve`.
    """
    return once_a_host(model.checkpoint, weights=True) if model.checkpoint else None


def check_architecture(model: ModelConfig, config: Config) -> None:
    """Raises ConfigError if the checkpoint is of another architecture than `config`; the first differences are named."""
    directory = checkpoint_dir(model)
    if directory is None:
        return
    checkpoint = open_checkpoint(directory)
    try:
        check_same(checkpoint.config, without_new_adapters(config, checkpoint), directory)
    except WeightsError as error:
        if not has_any_size(model.name):
            hint = f"--config.model.name={AUTO} takes the architecture of the checkpoint"
        elif checkpoint.config.lora is not None and config.lora is None:
            hint = "set model.lora_rank, lora_alpha and lora_targets as there, or merge them: `medcg convert DIR OUT --to=hf`"
        else:
            raise
        raise ConfigError(f"{error}; {hint}") from error
    check_colours(directory, config)


def check_colours(directory: Path, config: Config) -> None:
    """Raises ConfigError if the checkpoint's image processor scales colours otherwise than `config` does."""
    for name in (IMAGES, PROCESSOR):
        if not (directory / name).is_file():
            continue
        stated = read_json(directory / name, max_bytes=MAX_CONFIG_BYTES)
        stated = stated.get("image_processor", stated)
        for field in ("image_mean", "image_std"):
            theirs, ours = stated.get(field) if isinstance(stated, dict) else None, getattr(config.vision, field, None)
            if theirs is not None and ours is not None and not _near(theirs, ours):
                raise ConfigError(
                    f"{directory / name}: {field} is {shown(theirs)}, and this port scales by {list(ours)}: expected a "
                    "checkpoint whose tower takes these"
                )


def _near(theirs: Any, ours: tuple[float, ...]) -> bool:
    """Whether the numbers are the same to three decimals: files round CLIP's."""
    is_list = isinstance(theirs, list) and len(theirs) == len(ours)
    return is_list and all(isinstance(x, int | float) and abs(x - y) < 1e-3 for x, y in zip(theirs, ours, strict=True))
