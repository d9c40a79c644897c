"""The settings that a test must share with the training of its parameters, as `medcg train` wrote them beside these."""

import json
from pathlib import Path
from typing import Any

from medcg_jax.config import AUTO, ConfigError, RunConfig
from medcg_jax.families.weights.hub import resolve
from medcg_jax.train.meta import training_config

# A model is asked as it was trained: architecture, prompt, and what it is shown of an image.
SAME = (
    "model.name",
    "model.intermediate_from",
    "model.mask_text_only_rows_attention",
    "model.min_pixels",
    "model.max_pixels",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_targets",
    "data.system_prompt",
)
# These may differ, for a test on other data or in another precision, which is then told.
TOLD = (
    "data.source",
    "data.root",
    "data.subsets",
    "data.seed",
    "data.phantom_decoys",
    "data.phantom_rule",
    "data.window",
    "data.deep_grey",
    "data.frame",
    "model.compute_dtype",
    "model.matmul",
    "model.base_dtype",
)


def parameters_of(run: RunConfig, workdir: Path) -> Path:
    """The directory whose parameters `medcg eval` takes: that of the workdir's training, else the checkpoint."""
    trained = workdir / "params"
    return trained if trained.is_dir() or not run.model.checkpoint else resolve(run.model.checkpoint, weights=False)


def differences(run: RunConfig, config: dict[str, Any], keys: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    """(field, recorded value, the run's) for those of the fields that differ; fields that are not recorded do not."""
    different = []
    for key in keys:
        section, _, name = key.partition(".")
        value = json.loads(json.dumps(getattr(getattr(run, section), name)))
        if key == "model.name" and value == AUTO:  # not known before the checkpoint is read
            continue
        trained = config.get(section, {})
        if name in trained and trained[name] != value:
            different.append((key, trained[name], value))
    return different


def check_same(run: RunConfig, directory: Path) -> None:
    """Raises ConfigError if the run would ask the model in `directory` otherwise than it was trained."""
    if not (config := training_config(directory)):
        return
    different = differences(run, config, SAME)
    if different:
        words = ", ".join(f"{key}={theirs!r}, not {ours!r}" for key, theirs, ours in different)
        raise ConfigError(
            f"{directory} was trained with {words}: another run's config; expected the one of its training"
        )


def lines(run: RunConfig, directory: Path) -> list[str]:
    """Lines on what differs from the training and may: the data, the precision."""
    if not (config := training_config(directory)):
        return []
    drawn = config.get("data", {}).get("source") == run.data.source == "phantom"
    told = [entry for entry in differences(run, config, TOLD) if drawn or not entry[0].startswith("data.phantom_")]
    return [f"trained with {key}={theirs!r}, tested with {ours!r}" for key, theirs, ours in told]
