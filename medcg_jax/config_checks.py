"""Checks on the values of a run's configuration (`run_config`): the first that no run could use is an error."""

import math

from medcg_jax.config import (
    ATTENTION,
    BASE_DTYPES,
    BOX_TABLES,
    CONTROLS,
    DTYPES,
    LEAKS,
    LORA_TARGETS,
    MASK_PARTS,
    MATMUL,
    MODELS,
    PARTS,
    PUBLISHED_DETECTION,
    PUBLISHED_PAIRS,
    REMAT,
    SOURCES,
    TABLES,
    ConfigError,
    ModelConfig,
    RunConfig,
    StudyConfig,
    TrainConfig,
    parts_of,
    trains_masks,
)
from medcg_jax.families import registry

# The longest context of a model here (Llama 3.2), in tokens.
MOST_TOKENS = 2**17
# Steps are counted in int32 on devices, and so are pixels of an image.
MOST_STEPS = 2**31 - 1
MOST_RECORDS = 10**7
MOST_BATCH = 2**20
MOST_DEVICES = 2**20
# Two of them are added up, and the sum is a seed for JAX and numpy.
MOST_SEED = 2**30
# Below the largest float32.
MOST_FLOAT = 1e30
# The least number above 0, and the greatest below 1.
ABOVE_0, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)
# Field -> the least and the most that it may have: every field that holds numbers but `study.published_table`, of
# which a list says what is accepted.
BOUNDS = {
    **{f"mesh.{axis}": (-1, MOST_DEVICES) for axis in ("cell", "data", "fsdp", "tensor")},
    "model.scan_unroll": (0, 1000),
    "model.min_pixels": (0, MOST_STEPS),
    "model.max_pixels": (0, MOST_STEPS),
    "model.max_boxes": (0, 10**4),
    "model.lora_rank": (0, 10**5),
    "model.lora_alpha": (0, MOST_FLOAT),
    "data.seed": (0, MOST_SEED),
    "data.max_text_tokens": (1, MOST_TOKENS),
    "data.max_target_tokens": (1, MOST_TOKENS),
    "data.max_box_text_tokens": (0, MOST_TOKENS),
    "data.max_box_target_tokens": (0, MOST_TOKENS),
    "data.row_multiple": (0, MOST_TOKENS),
    "data.train_records_per_subset": (1, MOST_RECORDS),
    "data.test_records_per_subset": (0, MOST_RECORDS),
    "data.imagewikiqa_share": (0, BELOW_1),
    "data.subset_weights": (ABOVE_0, MOST_FLOAT),
    "data.max_pixels": (1, MOST_STEPS),
    **{
        f"{part}.{name}": bounds
        for part in ("base", "train")
        for name, bounds in {
            "epochs": (0, 10**6), "steps": (0, MOST_STEPS), "batch_size": (1, MOST_BATCH),
            "accumulation_steps": (1, MOST_BATCH), "learning_rate": (ABOVE_0, MOST_FLOAT), "warmup_frac": (0, 1),
            "end_learning_rate_frac": (0, 1), "weight_decay": (0, MOST_FLOAT), "b1": (0, 1), "b2": (0, 1),
            "eps": (ABOVE_0, MOST_FLOAT), "clip_norm": (0, MOST_FLOAT), "seed": (0, MOST_SEED),
            "log_every_steps": (1, MOST_STEPS), "checkpoint_every_steps": (0, MOST_STEPS),
            "keep_checkpoints": (1, MOST_STEPS), "keep_every_steps": (0, MOST_STEPS),
        }.items()
    },
    "eval.batch_size": (1, MOST_BATCH),
    "eval.max_new_tokens": (1, MOST_TOKENS),
    "eval.max_box_tokens": (1, MOST_TOKENS),
    "study.efficiency_records": (0, MOST_RECORDS),
    "study.epochs_of": (0, 10**6),
    "study.seeds": (0, MOST_SEED),
    "study.jobs": (1, 10**4),
    "study.cells_at_once": (0, 10**4),
    "study.near_duplicate_bits": (0, 40),
}  # fmt: skip
# Fields that list names or numbers of which each makes sense once; "circular" of `eval.controls` does thrice.
ONCE = (
    "model.trainable", "data.subsets", "study.tables", "study.targets", "study.box_subsets",
    "study.arms", "study.parts", "study.models", "study.seeds", "study.targets_of",
)  # fmt: skip


def check(run: RunConfig) -> None:
    """Raises ConfigError for the first value of `run` that no run could use."""
    for key, bounds in BOUNDS.items():
        for name, value in _values(run, key):
            for number in value if isinstance(value, tuple) else (value,):
                within(name, number, *bounds)
    for key in ONCE:
        for name, values in _values(run, key):
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                raise ConfigError(f"{name} has {twice[0]!r} twice: each is accepted once")
    one_of("model.name", run.model.name, tuple(MODELS))
    for family in registry.families():
        for name in family.options:
            value, unset = getattr(run.model, name), getattr(ModelConfig(), name)
            if value != unset and MODELS[run.model.name] != family.name:
                raise ConfigError(
                    f"model.{name}={value!r}: expected {unset!r} for {run.model.name}, only {family.title} has this option"
                )
    one_of("model.intermediate_from", run.model.intermediate_from, ("", "input", "output"))
    one_of("model.compute_dtype", run.model.compute_dtype, DTYPES)
    one_of("model.matmul", run.model.matmul, MATMUL)
    one_of("model.attention", run.model.attention, ATTENTION)
    one_of("model.remat", run.model.remat, REMAT)
    one_of("data.source", run.data.source, SOURCES)
    for name in run.model.trainable:
        one_of("model.trainable", name, PARTS)
        if not run.study.models:
            parts = parts_of(MODELS[run.model.name], PARTS, lora_rank=run.model.lora_rank)
            one_of("model.trainable", name, parts)
    check_adapters(run.model)
    if trains_masks(run.model) and not set(run.model.trainable) <= set(MASK_PARTS):
        raise ConfigError(
            f"model.trainable={run.model.trainable}: {', '.join(MASK_PARTS)} are trained by themselves, after the boxes"
        )
    for name in run.study.models:
        one_of("study.models", name, tuple(MODELS))
    for name in run.study.tables:
        one_of("study.tables", name, (*TABLES, *BOX_TABLES))
    for name in run.study.targets_of:
        one_of("study.targets_of", name, (*TABLES, *BOX_TABLES))
    for name in run.study.epochs_of:
        one_of("study.epochs_of", name, (*TABLES, *BOX_TABLES))
    for name in run.study.model_flags:
        one_of("study.model_flags", name, tuple(MODELS))
    for name in run.eval.controls:
        one_of("eval.controls", name, CONTROLS)
    check_general(run)
    one_of("study.leaks", run.study.leaks, LEAKS)
    one_of("study.near_duplicates", run.study.near_duplicates, ("off", *LEAKS))
    check_published(run.study)
    if not run.study.seeds:
        raise ConfigError("study.seeds is empty: one seed or more is accepted")
    for part in ("base", "train"):
        check_training(part, getattr(run, part))
    if run.log.profile_steps:
        profile_steps(run.log.profile_steps, run.train.steps)


def check_adapters(model: ModelConfig) -> None:
    one_of("model.base_dtype", model.base_dtype, BASE_DTYPES)
    for name in model.lora_targets:
        one_of("model.lora_targets", name, LORA_TARGETS)
    if not model.lora_targets or len(set(model.lora_targets)) < len(model.lora_targets):
        accepted = ", ".join(LORA_TARGETS)
        raise ConfigError(f"model.lora_targets={model.lora_targets}: one or more of {accepted} are accepted, once each")
    if model.matmul and model.base_dtype not in DTYPES:
        raise ConfigError(
            f'model.matmul={model.matmul!r} with model.base_dtype={model.base_dtype!r}: "" is accepted, the products of '
            "a quantised base are taken in model.compute_dtype"
        )
    if model.lora_rank and "lora" not in model.trainable:
        raise ConfigError(
            f"model.lora_rank={model.lora_rank} with model.trainable={model.trainable}: adapters are trained by "
            '"lora" there; 0 is accepted without it'
        )
    if model.lora_rank and "decoder" in model.trainable:
        raise ConfigError(
            f'model.trainable={model.trainable} with model.lora_rank={model.lora_rank}: "decoder" or "lora" is '
            "accepted, the one in the other's place"
        )


def check_general(run: RunConfig) -> None:
    share = run.data.imagewikiqa_share
    if share and not run.data.general_records:
        raise ConfigError(
            f"data.general_records='': the path of a JSON list of four-option records is accepted with "
            f"data.imagewikiqa_share={share}, ImageWikiQA is not in the release"
        )
    if share and (run.data.subset_weights or trains_masks(run.model)):
        why = "data.subset_weights" if run.data.subset_weights else "a training of masks"
        raise ConfigError(f"data.imagewikiqa_share={share}: 0.0 alone is accepted with {why}")


def check_published(study: StudyConfig) -> None:
    tables = (0, *PUBLISHED_PAIRS, *PUBLISHED_DETECTION)
    if study.published_table not in tables:
        accepted = ", ".join(map(str, tables))
        raise ConfigError(f"study.published_table={study.published_table}: one of {accepted} is accepted")
    for name, words in (("baseline_plus_records", ("related",)), ("baseline_plus_subsets", ("related", "all"))):
        value = getattr(study, name)
        is_number = value.isascii() and value.isdigit() and len(value) <= 9 and 1 <= int(value) <= MOST_RECORDS
        if value not in words and not is_number:
            raise ConfigError(
                f"study.{name}={value[:20]!r}: {', '.join(words)} or a number of at least 1 and at most {MOST_RECORDS:,} "
                "is accepted"
            )
    counts = study.efficiency_records
    if not counts or counts[0] < 0 or list(counts) != sorted(set(counts)):
        raise ConfigError(f"study.efficiency_records={counts}: rising numbers of at least 0 are accepted")


def check_training(part: str, train: TrainConfig) -> None:
    if train.batch_size % train.accumulation_steps:
        raise ConfigError(
            f"{part}.accumulation_steps={train.accumulation_steps} does not divide "
            f"{part}.batch_size={train.batch_size}; a divisor of it is accepted"
        )
    for name in ("param_dtype", "moment_dtype"):
        one_of(f"{part}.{name}", getattr(train, name), DTYPES)


def profile_steps(text: str, num_steps: int) -> tuple[int, int]:
    """(first, last) of `log.profile_steps`, numbered from 1, both included. num_steps: of the run; 0: not known yet.

    Raises:
      ConfigError: it is no range, or no range of the run's steps.
    """
    first, colon, last = text.partition(":")
    numbers = [int(part) for part in (first, last) if part.isascii() and part.isdigit() and len(part) <= 10]
    most = num_steps or math.inf
    if not colon or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= most:
        of = f", of the run's {num_steps} steps" if num_steps else ""
        raise ConfigError(f"log.profile_steps={text!r}: FIRST:LAST with 1 <= FIRST <= LAST is accepted{of}")
    return numbers[0], numbers[1]


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: one of {', '.join(choices)} is accepted")


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
    raise ConfigError(f"{name}={value}: {words} is accepted")


def _values(run: RunConfig, key: str) -> list[tuple[str, object]]:
    """(name for people, value) of a field, and of a dict one for each key."""
    section, _, name = key.partition(".")
    value = getattr(getattr(run, section), name)
    return [(f"{key}[{inner!r}]", one) for inner, one in value.items()] if isinstance(value, dict) else [(key, value)]
