"""Checks that the tokenizer belongs to the model, and that the model sees its images. Neither fault would show
otherwise: nothing fails, losses fall, and the model answers from the text alone.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medcg_jax.config import ConfigError
from medcg_jax.data.records import DataError
from medcg_jax.data.tokenizer import Tokenizer, load_tokenizer
from medcg_jax.data.tokenizer_limits import MAX_CONFIG_BYTES, added_in_config
from medcg_jax.families import registry
from medcg_jax.families.build import Config
from medcg_jax.families.weights.convert import MODEL_FILE, WeightsError, read_config
from medcg_jax.families.weights.families import family_of
from medcg_jax.families.weights.files import has_tokenizer
from medcg_jax.processes import gather
from medcg_jax.untrusted import FileError, read_json, shown

# Tokens that end a text or a turn. The one that a checkpoint states may differ from the one in its prompts.
ENDS = ("</s>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
# Other names of fields in a released config.json.
ALSO = {"image_token_id": ("image_token_id", "image_token_index")}
# Least relative change of a number by other pixels: far more than rounding, far less than any image causes.
LEAST_CHANGE = 1e-6

Batch = Mapping[str, np.ndarray]


class BlindModel(ConfigError):
    """The model does not see its images."""


def check_tokens(tokenizer: Tokenizer, family: str, model: Config) -> None:
    """Raises ConfigError if the model's embedding table has no row for a token that prompts may contain.

    Two tokens need no row: the image token is replaced, and padding is never attended to.
    """
    placed = {"end of a turn": tokenizer.eos_id, "opening": tokenizer.bos_id}
    placed |= {
        name: number
        for name, number in registry.family(family).token_ids(tokenizer).items()
        if name not in ("image_token_id", "pad_token_id")
    }
    rows, name = model.text.vocab_size, tokenizer.path
    if tokenizer.text_ids > rows:
        raise ConfigError(
            f"tokenizer {name}: ids of text up to {tokenizer.text_ids - 1:,}, and the model has {rows:,} rows; give "
            "the tokenizer of the model's own release"
        )
    for field, number in placed.items():
        if number is not None and number >= rows:
            raise ConfigError(f"tokenizer {name}: {field} {number:,}, and the model has only {rows:,} rows")


def check_token_ids(tokenizer: Tokenizer, family: str, directory: Path) -> None:
    """Raises ConfigError for the first special token whose id in the checkpoint is not the tokenizer's."""
    if not directory.is_dir():
        return
    ids = registry.family(family).token_ids(tokenizer)
    for field, number, name in _stated(directory, family, [*ids, "bos_token_id"]):
        ours = {**ids, "bos_token_id": tokenizer.bos_id}[field.rpartition(".")[2].replace("_index", "_id")]
        accepted = [number] if isinstance(number, int) else number
        if field.endswith("eos_token_id") and {tokenizer.known(end) for end in ENDS} & {*accepted}:
            continue
        if ours is not None and ours not in accepted:
            raise ConfigError(_message(name, field, number, tokenizer, ours))
    try:
        for number, content, source in added_in_config(directory):
            ours = tokenizer.known(content)
            if ours is not None and ours != number:
                raise ConfigError(_message(source, shown(content), number, tokenizer, ours))
    except DataError as error:
        raise ConfigError(str(error)) from error


def ids_beside(directory: Path) -> dict[str, int]:
    """{field of the architecture: id in the tokenizer of a checkpoint's directory}, for ids that its config lacks.

    If the tokenizer cannot be read, a line says so, and the result is empty.

    Raises:
      ConfigError: the config states the image token's id, and the tokenizer has another one.
    """
    if not has_tokenizer(directory):
        return {}
    family = family_of(read_config(directory)) if _has_config(directory) else ""
    if not family:
        return {}
    try:
        tokenizer = load_tokenizer(directory)
        ids = registry.family(family).token_ids(tokenizer)
    except DataError as error:
        print(f"{error}; it is carried as it is")
        return {}
    stated = {}
    for field, number, name in _stated(directory, family, list(ids)):
        stated[field.rpartition(".")[2].replace("_index", "_id")] = number
        if "image_token" in field and number != ids["image_token_id"]:
            raise ConfigError(_message(name, field, number, tokenizer, ids["image_token_id"]))
    return {field: number for field, number in ids.items() if field not in stated}


def _message(name, field: str, number, tokenizer: Tokenizer, ours: int) -> str:
    return (
        f"{name}: {field} is {number}, and {ours} in the tokenizer {tokenizer.path}; give the "
        "tokenizer that the checkpoint was trained with (model.tokenizer)"
    )


def _has_config(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (MODEL_FILE, "config.json"))


def _stated(directory: Path, family: str, fields: Iterable[str]) -> list[tuple[str, int | list[int], str]]:
    """(field, id or ids, file) of those fields that a checkpoint's config states; a nested one as "text_config.x"."""
    if not _has_config(directory):
        return []
    path = directory / (MODEL_FILE if (directory / MODEL_FILE).is_file() else "config.json")
    config = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    stated: list[tuple[str, int | list[int], str]] = []
    for prefix, section in (("", config), ("text_config.", config.get("text_config"))):
        for field in fields if isinstance(section, dict) else ():
            for name in ALSO.get(field, (field,)):
                number = _number(section.get(name), f"{path}: {prefix}{name}")
                if number is not None:
                    stated.append((prefix + name, number, str(path)))
    if family == "next_chat" and path.name != MODEL_FILE:
        # A released config.json gives these ids only through its number of rows.
        try:
            model = read_config(directory)
        except WeightsError as error:
            raise FileError(str(error)) from error
        stated += [(f, getattr(model, f), str(path)) for f in ("image_token_id", "at_token_id", "box_token_id")]
    return stated


def _number(value: Any, name: str) -> int | list[int] | None:
    """An id, or several; None if there is none (null, [], or in old files a negative number)."""
    numbers = value if isinstance(value, list) else [value]
    if value is None or value == []:
        return None
    if not all(type(number) is int for number in numbers):
        raise FileError(f"{name}={shown(value)}: expected a whole number or null")
    return None if min(numbers) < 0 else value


def pixel_keys(blank: Batch) -> tuple[str, ...]:
    """Keys of a format's images (`Format.blank`) that the language model sees; SAM's images are not among them."""
    return tuple(key for key, x in blank.items() if x.dtype == np.uint8 and not key.startswith("sam_"))


def check_sees(score: Callable[[Batch], list[np.ndarray]], batch: Batch, keys: tuple[str, ...], what: str) -> bool:
    """True if the model sees the images of the batch; False if the batch has no image on any process.

    score: gives the model's numbers for a batch, the same on every process; also called with the negative images.
    keys: of the pixels, uint8. what: the run or its subset, for the message.

    Raises:
      BlindModel: the batch has images, and the numbers of their negatives are the same.
    """
    if not any(gather("whether a batch has images", any(bool(batch[key].any()) for key in keys))):
        return False
    negative = {**batch, **{key: 255 - batch[key] for key in keys}}
    for seen, other in zip(score(batch), score(negative), strict=True):
        finite = np.isfinite(seen) & np.isfinite(other)
        # Numbers that are not finite are another fault, reported elsewhere.
        with np.errstate(invalid="ignore"):
            near = np.abs(np.where(finite, seen - other, np.inf)) <= LEAST_CHANGE * np.maximum(np.abs(seen), 1e-3)
        if not (near | (seen == other)).all():
            return True
    raise BlindModel(
        f"{what}: the model does not see images (other pixels change none of its numbers); give a model.tokenizer with "
        "the checkpoint's own image token, and weights whose vision tower and projector are trained"
    )


def has_closed_gates(params) -> bool:
    """Whether the decoder's cross-attention still adds nothing, as in a Llama-3.2-Vision with random weights."""
    cross = params["decoder"].get("cross") if "decoder" in params else None
    return cross is not None and "attention_gate" in cross and not np.any(np.asarray(cross["attention_gate"]))
