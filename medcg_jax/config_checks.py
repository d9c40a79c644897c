"""Checks of a run's configuration: each field against its bounds and choices, then combinations of fields."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import Field
from typing import Any

from medcg_jax.config import (
    ABOVE_0,
    ARMS,
    BELOW_1,
    BUDGETS,
    DTYPES,
    EMBEDDING,
    LORA_TARGETS,
    MASK_PARTS,
    MODELS,
    MOST_RECORDS,
    NUMBERED_ARMS,
    PARTS,
    PUBLISHED_DETECTION,
    PUBLISHED_PAIRS,
    ConfigError,
    ModelConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
    has_any_size,
    parts_of,
    trains_masks,
)
from medcg_jax.families import registry


def check(run: RunConfig) -> None:
    """Raises ConfigError for the first value of `run` that cannot be used."""
    for setting, key, value in settings(run):
        check_setting(setting, key, value)
    if has_any_size(run.model.name) and not run.model.checkpoint and not run.study.models:
        sizes = ", ".join(name for name in MODELS if not has_any_size(name))
        raise ConfigError(
            f"model.name={run.model.name!r} with model.checkpoint='': expected the folder or the hub's repository whose "
            f"config.json states the model's sizes; or as model.name one of {sizes}"
        )
    # None: "auto", whose checkpoint is not read yet.
    family = MODELS.get(run.model.name)
    for other in registry.families():
        for name in other.options:
            value, unset = getattr(run.model, name), getattr(ModelConfig(), name)
            if value != unset and family not in (other.name, None):
                raise ConfigError(f"model.{name}={value!r}: expected {unset!r}, only {other.title} has this option")
    if family and not run.study.models:
        for name in run.model.trainable:
            one_of("model.trainable", name, parts_of(family, PARTS, lora_rank=run.model.lora_rank))
    check_adapters(run.model)
    if trains_masks(run.model) and not set(run.model.trainable) <= set(MASK_PARTS):
        raise ConfigError(
            f"model.trainable={run.model.trainable}: {', '.join(MASK_PARTS)} are trained by themselves, after the boxes"
        )
    check_general(run)
    check_published(run.study)
    check_arms(run.study)
    if not run.study.seeds:
        raise ConfigError("study.seeds is empty: expected one seed or more")
    for section in ("base", "train"):
        train: TrainConfig = getattr(run, section)
        if train.batch_size % train.accumulation_steps:
            raise ConfigError(
                f"{section}.accumulation_steps={train.accumulation_steps}: expected a divisor of "
                f"{section}.batch_size={train.batch_size}"
            )
    if run.log.profile_steps:
        profile_steps(run.log.profile_steps, run.train.steps)


def settings(config, prefix: str = "") -> Iterator[tuple[Field, str, Any]]:
    """(field, its name as "train.batch_size", its value) of every field below the sections of a configuration."""
    for setting in dataclasses.fields(config):
        value, key = getattr(config, setting.name), prefix + setting.name
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield setting, key, value


def check_setting(setting: Field, key: str, value: Any) -> None:
    """Raises ConfigError if a value is outside the limits of its field (`config.setting`)."""
    limits = setting.metadata
    names = tuple(value) if isinstance(value, dict | tuple) else (value,)
    if limits.get("choices"):
        for name in names:
            one_of(key, name, limits["choices"])
    entries = (
        [(f"{key}[{name!r}]", entry) for name, entry in value.items()] if isinstance(value, dict) else [(key, value)]
    )
    for name, entry in entries:
        if limits.get("least") is not None:
            for number in entry if isinstance(entry, tuple) else (entry,):
                within(name, number, limits["least"], limits["most"])
        if limits.get("once"):
            repeated = [item for index, item in enumerate(entry) if item in entry[:index]]
            if repeated:
                raise ConfigError(f"{name} has {repeated[0]!r} twice: expected each once")


def check_adapters(model: ModelConfig) -> None:
    if not model.lora_targets or len(set(model.lora_targets)) < len(model.lora_targets):
        choices = ", ".join(LORA_TARGETS)
        raise ConfigError(f"model.lora_targets={model.lora_targets}: expected one or more of {choices}, once each")
    if model.matmul and model.base_dtype not in DTYPES:
        raise ConfigError(
            f'model.matmul={model.matmul!r} with model.base_dtype={model.base_dtype!r}: expected "", the products of '
            "a quantised base are computed in model.compute_dtype"
        )
    if model.trainable_words and EMBEDDING not in model.trainable:
        raise ConfigError(
            f"model.trainable_words={model.trainable_words} with model.trainable={model.trainable}: these words are "
            f'trained by the part "{EMBEDDING}"; expected () without it'
        )
    if EMBEDDING in model.trainable and "decoder" in model.trainable:
        raise ConfigError(
            f'model.trainable={model.trainable}: "decoder" has the part "{EMBEDDING}" in it; expected either'
        )
    if model.lora_rank and "lora" not in model.trainable:
        raise ConfigError(
            f"model.lora_rank={model.lora_rank} with model.trainable={model.trainable}: adapters are trained by "
            'the part "lora"; expected 0 without it'
        )
    if model.lora_rank and "decoder" in model.trainable:
        raise ConfigError(
            f"model.trainable={model.trainable} with model.lora_rank={model.lora_rank}: expected either "
            '"decoder" or "lora"'
        )


def check_general(run: RunConfig) -> None:
    share = run.data.imagewikiqa_share
    if share and not run.data.general_records:
        raise ConfigError(
            f"data.general_records='': expected the path of a JSON list of four-option records with "
            f"data.imagewikiqa_share={share}, ImageWikiQA is not in the release"
        )
    if share and (run.data.subset_weights or trains_masks(run.model)):
        why = "data.subset_weights" if run.data.subset_weights else "a training of masks"
        raise ConfigError(f"data.imagewikiqa_share={share}: expected 0.0 with {why}")


def check_published(study: StudyConfig) -> None:
    tables = (0, *PUBLISHED_PAIRS, *PUBLISHED_DETECTION)
    if study.published_table not in tables:
        choices = ", ".join(map(str, tables))
        raise ConfigError(f"study.published_table={study.published_table}: expected one of {choices}")
    for name, words in (("baseline_plus_records", ("related",)), ("baseline_plus_subsets", ("related", "all"))):
        value = getattr(study, name)
        is_number = value.isascii() and value.isdigit() and len(value) <= 9 and 1 <= int(value) <= MOST_RECORDS
        if value not in words and not is_number:
            raise ConfigError(
                f"study.{name}={value[:20]!r}: expected {', '.join(words)} or a number of at least 1 and at most "
                f"{MOST_RECORDS:,}"
            )
    for name in ("efficiency_records", "dose_subsets"):
        counts = getattr(study, name)
        if not counts or counts[0] < 0 or list(counts) != sorted(set(counts)):
            raise ConfigError(f"study.{name}={counts}: expected rising numbers of at least 0")
    if not study.ablation_budgets:
        raise ConfigError(f"study.ablation_budgets is empty: expected one or more of {', '.join(BUDGETS)}")


def check_arms(study: StudyConfig) -> None:
    numbered = "|".join(NUMBERED_ARMS)
    for arm in study.arms:
        if arm not in ARMS and not re.fullmatch(rf"({numbered})_\d{{1,9}}", arm, re.ASCII):
            close = difflib.get_close_matches(arm, ARMS, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            others = ", ".join((*ARMS, *(f"{name}_N" for name in NUMBERED_ARMS)))
            raise ConfigError(f"study.arms={arm[:40]!r}: {hint}expected one or more of {others}")


def profile_steps(text: str, num_steps: int) -> tuple[int, int]:
    """(first, last) of `log.profile_steps`, numbered from 1, both included. num_steps: of the run; 0: not known yet.

    Raises:
      ConfigError: it is not a range, or not within the run's steps.
    """
    first, colon, last = text.partition(":")
    numbers = [int(text) for text in (first, last) if text.isascii() and text.isdigit() and len(text) <= 10]
    most = num_steps or math.inf
    if not colon or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= most:
        of = f", of the run's {num_steps} steps" if num_steps else ""
        raise ConfigError(f"log.profile_steps={text!r}: expected FIRST:LAST with 1 <= FIRST <= LAST{of}")
    return numbers[0], numbers[1]


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(choices)}{hint}")


def within(name: str, value: float, least: float, most: float) -> None:
    if least <= value <= most:
        return
    if most == BELOW_1:
        words = f"{least} to below 1"
    elif isinstance(value, int) and most == least + 1:
        words = f"{least} or {most}"
    elif most < 100:
        words = f"{least} to {most}"
    else:
        low = "above 0" if least == ABOVE_0 else f"of at least {least}"
        words = f"a finite number {low} and at most {most:,}"
    raise ConfigError(f"{name}={value}: expected {words}")
