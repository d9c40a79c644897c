"""Checks on the values of a run's configuration (`run_config`): the first that no run could use is an error."""

import math

from medcg_jax.run_config import (
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


def check(run: RunConfig) -> None:
    """Raises ConfigError for the first value of `run` that no run could use."""
    one_of("model.name", run.model.name, tuple(MODELS))
    for name, family, why in (
        ("min_pixels", "qwen2_vl", "has one size of image"),
        ("max_pixels", "qwen2_vl", "has one size of image"),
        ("max_boxes", "next_chat", "takes no boxes as arrays"),
        ("intermediate_from", "mllama", "has no such layers"),
        ("mask_text_only_rows_attention", "mllama", "has no cross-attention"),
    ):
        value, unset = getattr(run.model, name), getattr(ModelConfig(), name)
        if value != unset and MODELS[run.model.name] != family:
            raise ConfigError(f"model.{name}={value!r}: {unset!r} is accepted, {run.model.name} {why}")
    for name in ("min_pixels", "max_pixels", "max_boxes"):
        at_least(f"model.{name}", getattr(run.model, name), 0)
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
    for name, epochs in run.study.epochs_of.items():
        one_of("study.epochs_of", name, (*TABLES, *BOX_TABLES))
        at_least(f"study.epochs_of[{name!r}]", epochs, 0)
    for name in run.study.model_flags:
        one_of("study.model_flags", name, tuple(MODELS))
    at_least("model.scan_unroll", run.model.scan_unroll, 0)
    at_least("data.max_text_tokens", run.data.max_text_tokens, 1)
    at_least("data.max_target_tokens", run.data.max_target_tokens, 1)
    at_least("data.max_box_text_tokens", run.data.max_box_text_tokens, 0)
    at_least("data.max_box_target_tokens", run.data.max_box_target_tokens, 0)
    at_least("data.row_multiple", run.data.row_multiple, 0)
    check_pack(run)
    at_least("data.train_records_per_subset", run.data.train_records_per_subset, 1)
    at_least("data.test_records_per_subset", run.data.test_records_per_subset, 0)
    at_least("data.max_pixels", run.data.max_pixels, 1)
    at_least("eval.batch_size", run.eval.batch_size, 1)
    at_least("eval.max_new_tokens", run.eval.max_new_tokens, 1)
    at_least("eval.max_box_tokens", run.eval.max_box_tokens, 1)
    for name in run.eval.controls:
        one_of("eval.controls", name, CONTROLS)
    at_least("study.jobs", run.study.jobs, 1)
    at_least("study.cells_at_once", run.study.cells_at_once, 0)
    check_general(run)
    one_of("study.leaks", run.study.leaks, LEAKS)
    one_of("study.near_duplicates", run.study.near_duplicates, ("off", *LEAKS))
    if not 0 <= run.study.near_duplicate_bits <= 40:
        raise ConfigError(f"study.near_duplicate_bits={run.study.near_duplicate_bits}: 0 to 40 is accepted")
    check_published(run.study)
    if not run.study.seeds:
        raise ConfigError("study.seeds is empty: one seed or more is accepted")
    for subset, weight in run.data.subset_weights.items():
        if not weight > 0:
            raise ConfigError(f"data.subset_weights[{subset!r}]={weight}: a weight above 0 is accepted")
    for part in ("base", "train"):
        check_training(part, getattr(run, part))
    if run.log.profile_steps:
        profile_steps(run.log.profile_steps, run.train.steps)


def check_pack(run: RunConfig) -> None:
    if run.data.pack not in (0, 1):
        raise ConfigError(f"data.pack={run.data.pack}: 0 or 1 is accepted")
    if run.data.pack and MODELS[run.model.name] != "llava":
        raise ConfigError(f"data.pack=1: 0 is accepted with model.name={run.model.name!r}, 1 with LLaVA alone")
    if run.data.pack and run.model.attention == "cudnn":
        raise ConfigError(
            "model.attention='cudnn': auto, plain or splash is accepted with data.pack=1, cuDNN's kernel reads segment "
            "ids as lengths"
        )


def check_adapters(model: ModelConfig) -> None:
    one_of("model.base_dtype", model.base_dtype, BASE_DTYPES)
    at_least("model.lora_rank", model.lora_rank, 0)
    at_least("model.lora_alpha", model.lora_alpha, 0)
    for name in model.lora_targets:
        one_of("model.lora_targets", name, LORA_TARGETS)
    if not model.lora_targets or len(set(model.lora_targets)) < len(model.lora_targets):
        accepted = ", ".join(LORA_TARGETS)
        raise ConfigError(f"model.lora_targets={model.lora_targets}: one or more of {accepted} are accepted, once each")
    if model.matmul and model.base_dtype not in DTYPES:
        raise ConfigError(
            f"model.matmul={model.matmul!r} with model.base_dtype={model.base_dtype!r}: \"\" is accepted, the products of "
            "a quantised base are taken in model.compute_dtype"
        )
    if model.lora_rank and "lora" not in model.trainable:
        raise ConfigError(
            f"model.lora_rank={model.lora_rank} with model.trainable={model.trainable}: adapters are trained by "
            "\"lora\" there; 0 is accepted without it"
        )
    if model.lora_rank and "decoder" in model.trainable:
        raise ConfigError(
            f"model.trainable={model.trainable} with model.lora_rank={model.lora_rank}: \"decoder\" or \"lora\" is "
            "accepted, the one in the other's place"
        )


def check_general(run: RunConfig) -> None:
    share = run.data.imagewikiqa_share
    if not 0 <= share < 1:
        raise ConfigError(f"data.imagewikiqa_share={share}: 0 to below 1 is accepted")
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
        if value not in words and not (value.isascii() and value.isdigit() and int(value)):
            raise ConfigError(f"study.{name}={value!r}: {', '.join(words)} or a number of at least 1 is accepted")
    counts = study.efficiency_records
    if not counts or counts[0] < 0 or list(counts) != sorted(set(counts)):
        raise ConfigError(f"study.efficiency_records={counts}: rising numbers of at least 0 are accepted")


def check_training(part: str, train: TrainConfig) -> None:
    for name in ("steps", "checkpoint_every_steps", "keep_every_steps", "weight_decay", "clip_norm", "epochs"):
        at_least(f"{part}.{name}", getattr(train, name), 0)
    at_least(f"{part}.log_every_steps", train.log_every_steps, 1)
    at_least(f"{part}.keep_checkpoints", train.keep_checkpoints, 1)
    at_least(f"{part}.batch_size", train.batch_size, 1)
    at_least(f"{part}.accumulation_steps", train.accumulation_steps, 1)
    if train.batch_size % train.accumulation_steps:
        raise ConfigError(
            f"{part}.accumulation_steps={train.accumulation_steps} does not divide "
            f"{part}.batch_size={train.batch_size}; a divisor of it is accepted"
        )
    for name in ("param_dtype", "moment_dtype"):
        one_of(f"{part}.{name}", getattr(train, name), DTYPES)
    for name in ("warmup_frac", "end_learning_rate_frac", "b1", "b2"):
        value = getattr(train, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{part}.{name}={value}: 0 to 1 is accepted")
    for name in ("learning_rate", "eps"):
        if not 0 < getattr(train, name) < math.inf:
            raise ConfigError(f"{part}.{name}={getattr(train, name)}: a number above 0 is accepted")


def profile_steps(text: str, num_steps: int) -> tuple[int, int]:
    """(first, last) of `log.profile_steps`, numbered from 1, both included. num_steps: of the run; 0: not known yet.

    Raises:
      ConfigError: it is no range, or no range of the run's steps.
    """
    first, colon, last = text.partition(":")
    numbers = [int(part) for part in (first, last) if part.isascii() and part.isdigit()]
    most = num_steps or math.inf
    if not colon or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= most:
        of = f", of the run's {num_steps} steps" if num_steps else ""
        raise ConfigError(f"log.profile_steps={text!r}: FIRST:LAST with 1 <= FIRST <= LAST is accepted{of}")
    return numbers[0], numbers[1]


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: one of {', '.join(choices)} is accepted")


def at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(f"{name}={value}: a finite number of at least {least} is accepted")
