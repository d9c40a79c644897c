"""Fields of a config.json, read and checked; every error names the field, its value and what is expected.

The limits of an architecture's numbers and names (`LIMITS`, `CHOICES`) apply to our model.json too.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from medcg_jax.config import ATTENTION, BASE_DTYPES, DTYPES, MATMUL, REMAT
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.nn.layers import ACTIVATIONS
from medcg_jax.nn.rope import Llama3Scaling
from medcg_jax.untrusted import FileError, article_of, check_number, shown

CONFIG_FILE = "config.json"
# Kinds of scaling of rotary positions that this port computes.
SCALED = ("linear", "llama3")
# In the order of `Llama3Scaling`'s fields.
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Fields that may be one number, or one for each side if they are equal; fields for which null means the default.
SIDES, NULLABLE = ("image_size_px", "patch_size_px", "num_frames"), ("num_kv_heads", "head_dim")
MAX_LAYERS = 1024
MAX_SIDE_PX = 2**14
MAX_TOKEN_ID = 2**31 - 1
# -1 stands for a missing token, which an image's token may not be.
_LIMITS = (
    (1, MAX_SIDE_PX, "image_size_px patch_size_px window_size"),
    (1, 64, "num_frames merge"),
    (1, MAX_LAYERS, "num_layers num_decoder_layers num_iou_layers"),
    (0, MAX_LAYERS, "num_global_layers intermediate_layers cross_layers global_layers scan_unroll"),
    (-MAX_LAYERS, MAX_LAYERS, "feature_layer"),
    (1, 2**20, "embed_dim mlp_dim decoder_mlp_dim prompt_dim mask_prompt_dim iou_dim"),
    (1, 2**12, "num_heads num_kv_heads num_decoder_heads mrope_sections num_masks num_mask_prompts patches_per_token"),
    (1, 2**12, "max_boxes"),
    (1, 2**14, "head_dim"),
    (1, 2**24, "vocab_size"),
    (1, 2**30, "max_positions"),
    (0, 2**30, "original_positions"),
    (1, MAX_SIDE_PX**2, "min_pixels max_pixels"),
    (1e-15, 1.0, "norm_eps out_norm_eps decoder_norm_eps"),
    (1.0, 1e15, "rope_theta"),
    (1e-3, 1e6, "factor low high"),
    (1e-3, 1e3, "mlp_ratio"),
    (1, 2**16, "rank"),
    (1e-6, 1e6, "alpha"),
    (1e-3, 1e4, "image_std"),
    (-1e4, 1e4, "image_mean"),
    (0, MAX_TOKEN_ID, "image_token_id"),
    (-1, MAX_TOKEN_ID, "pad_token_id eos_token_id video_token_id vision_start_token_id vision_end_token_id"),
    (-1, MAX_TOKEN_ID, "at_token_id box_token_id"),
)
# Field of an architecture's dataclass -> (least, most). Checked first: with a thousand million layers the list of their
# names alone would fill a host's memory.
LIMITS: dict[str, tuple[float, float]] = {
    field: (least, most) for least, most, names in _LIMITS for field in names.split()
}
# Field that holds a name -> the names.
CHOICES: dict[str, tuple[str, ...]] = {
    "activation": tuple(ACTIVATIONS),
    "projector_activation": tuple(ACTIVATIONS),
    "compute_dtype": tuple(DTYPES),
    "attention": ATTENTION,
    "remat": REMAT,
    "matmul": MATMUL,
    "dtype": BASE_DTYPES,
    "intermediate_from": ("input", "output"),
}


def keys(text: str) -> dict[str, str]:
    """Our field -> its name in a config.json, from words `ours=theirs`."""
    return dict(word.split("=") for word in text.split())


# Field of a decoder -> its name in every config.json of transformers.
TEXT_KEYS = keys(
    "vocab_size=vocab_size num_layers=num_hidden_layers embed_dim=hidden_size num_heads=num_attention_heads "
    "num_kv_heads=num_key_value_heads mlp_dim=intermediate_size norm_eps=rms_norm_eps "
    "max_positions=max_position_embeddings activation=hidden_act"
)


def first(*values):
    """The first value that is not None; None if all are."""
    return next((value for value in values if value is not None), None)


def expect(stated: dict, prefix: str, *, file: str = CONFIG_FILE, **accepted) -> None:
    """Raises WeightsError if a field of `stated` is present, not null, and not an accepted value.

    accepted: field -> value, or a tuple of values. prefix: before the fields' names in the message ("text_config.").
    """
    for key, value in accepted.items():
        values = value if isinstance(value, tuple) else (value,)
        if stated.get(key) is not None and stated[key] not in values:
            expected = " or ".join(map(repr, values))
            raise WeightsError(f"{file} has {prefix}{key}={quoted(stated[key])}; expected {expected}")


def quoted(value: Any, limit: int = 100) -> str:
    """A value of a file for a message, at most `limit` characters."""
    try:
        text = repr(value)
    except RecursionError:
        return "..."
    return text if len(text) <= limit else text[: limit - 3] + "..."


def section(stated: dict, prefix: str, key: str) -> dict:
    """The object in a field; an empty one if it is absent or null.

    Raises:
      WeightsError: the field is not an object.
    """
    value = first(stated.get(key), {})
    if not isinstance(value, dict):
        raise WeightsError(f"config.json has {prefix}{key}={quoted(value)} ({article_of(value)}); expected an object")
    return value


def number(stated: dict, prefix: str, key: str, default, field: str, *, kind: type = int, null=False, file=CONFIG_FILE):
    """The number in a field, of the type `kind`; `default` if it is absent, or null and `null`.

    field: of our dataclass, which has `LIMITS`.

    Raises:
      WeightsError: it is no such number, or outside its limits.
    """
    if key not in stated or (null and stated[key] is None):
        return default
    return checked(stated[key], f"{file} has {prefix}{key}", field, kind)


def flag(stated: dict, prefix: str, key: str, default: bool) -> bool:
    """Whether a field is true; `default` if it is absent or null.

    Raises:
      WeightsError: it is neither true nor false.
    """
    value = first(stated.get(key), default)
    if not isinstance(value, bool):
        raise WeightsError(f"config.json has {prefix}{key}={quoted(value)}; expected true or false")
    return value


def token(stated: dict, prefix: str, key: str, default: int | None = None) -> Any:
    """The token id in a field; `default` if it is absent or null. Raises WeightsError as `number`."""
    limits = "image_token_id" if key.startswith("image_token") else "pad_token_id"
    return number(stated, prefix, key, default, limits, null=True)


def image_token(stated: dict, default: int) -> Any:
    """The id of the image token, under either of its names. Raises WeightsError as `number`."""
    return first(token(stated, "", "image_token_id"), token(stated, "", "image_token_index"), default)


def end_of(stated: dict, prefix: str, default: int | None = None, *, last: bool = True) -> Any:
    """`eos_token_id`; of several the last (the end of a turn) or the first. Raises WeightsError as `number`."""
    value = stated.get("eos_token_id")
    if isinstance(value, list) and value:
        for each in value:
            checked(each, f"config.json has {prefix}eos_token_id", "eos_token_id")
        return value[-1 if last else 0]
    return token(stated, prefix, "eos_token_id", default)


def whole_numbers(stated: dict, prefix: str, key: str, default: tuple[int, ...], field: str) -> Any:
    """The list of whole numbers in a field; `default` if it is absent or null.

    Raises:
      WeightsError: it is no list of whole numbers within the `LIMITS` of `field`.
    """
    value = first(stated.get(key), default)
    if not isinstance(value, list | tuple):
        raise WeightsError(f"config.json has {prefix}{key}={quoted(value)}; expected a list of whole numbers")
    return tuple(checked(each, f"config.json has {prefix}{key}", field) for each in value)


def activation(stated: dict, prefix: str, key: str, default: str) -> str:
    """The name of the activation in a field.

    Raises:
      WeightsError: it is none of `ACTIVATIONS`.
    """
    accepted: dict[str, Any] = {key: tuple(ACTIVATIONS)}
    expect(stated, prefix, **accepted)
    return first(stated.get(key), default)


def size(stated: dict, prefix: str, key: str, default: int, field: str = "patch_size_px") -> int:
    """The number in a field, or in a list of equal ones, one for each side; `default` if it is absent or null.

    Raises:
      WeightsError: the sides differ, or are no whole numbers within the `LIMITS` of `field`.
    """
    value = first(stated.get(key), default)
    sides = value if isinstance(value, list | tuple) and value else [value]
    if any(side != sides[0] for side in sides):
        raise WeightsError(f"config.json has {prefix}{key}={value!r}; expected a whole number, the same for all sides")
    return checked(sides[0], f"config.json has {prefix}{key}", field)


def refused(error: ValueError, prefix: str) -> WeightsError:
    """A ValueError of an architecture's dataclass as a WeightsError that names the file."""
    if isinstance(error, WeightsError):
        return error
    return WeightsError(f"config.json, {prefix.rstrip('.') or 'top'}: {error}")


def rope(
    stated: dict, prefix: str, theta: float, *, plain=("default",), scaled=SCALED
) -> tuple[dict, float, Llama3Scaling | None]:
    """(fields of rotary positions, their base, their scaling) from a text model's fields, in any version's spelling.

    theta: the default base. plain, scaled: names of the accepted kinds without and with a scaling.

    Raises:
      WeightsError: another kind, rotation of a part of each head, a missing number, or contradicting fields, of which
        versions of transformers take different ones.
    """
    # The new field (transformers 5) and the old one.
    objects = {key: section(stated, prefix, key) for key in ("rope_parameters", "rope_scaling")}
    scalings = [_rope_of(values, f"{prefix}{key}.", plain, scaled) for key, values in objects.items() if values]
    expect(stated, prefix, partial_rotary_factor=1.0)
    bases: dict[str, float] = {}
    for path, values in ((prefix, stated), *((f"{prefix}{key}.", values) for key, values in objects.items())):
        base = number(values, path, "rope_theta", None, "rope_theta", kind=float, null=True)
        bases |= {} if base is None else {f"{path}rope_theta": base}
    sections = [values["mrope_section"] for values in objects.values() if values.get("mrope_section") is not None]
    if any(each != scalings[0] for each in scalings) or any(each != sections[0] for each in sections):
        raise WeightsError(
            f"config.json has {prefix}rope_parameters={quoted(objects['rope_parameters'])} and "
            f"{prefix}rope_scaling={quoted(objects['rope_scaling'])}: versions of transformers take the one or the "
            "other; expected the same in both, or only one"
        )
    if len(set(bases.values())) > 1:
        both = " and ".join(f"{name}={value:g}" for name, value in bases.items())
        raise WeightsError(f"config.json has {both}; expected the same number in all places")
    fields = {**objects["rope_scaling"], **objects["rope_parameters"]}
    return fields, next(iter(bases.values()), theta), next(iter(scalings), None)


def _rope_of(values: dict, prefix: str, plain, scaled) -> Llama3Scaling | None:
    """The scaling in one object of rotary fields."""
    expect(values, prefix, rope_type=(*plain, *scaled), type=(*plain, *scaled), partial_rotary_factor=1.0)
    kinds = {"default" if values[key] in plain else values[key] for key in ("rope_type", "type") if values.get(key)}
    if len(kinds) > 1:
        raise WeightsError(
            f"config.json has {prefix}rope_type and {prefix}type of two kinds: {', '.join(sorted(kinds))}"
        )
    kind = next(iter(kinds), "default")
    if kind == "default":
        return None
    names = LLAMA3_ROPE if kind == "llama3" else LLAMA3_ROPE[:1]
    missing = [name for name in names if name not in values]
    if missing:
        raise WeightsError(f"config.json's {kind!r} rotary positions lack {', '.join(missing)}")
    types = (float, float, float, int)
    limits = ("factor", "low", "high", "original_positions")
    numbers = [
        number(values, prefix, name, None, limit, kind=kind_of)
        for name, limit, kind_of in zip(names, limits, types, strict=False)
    ]
    if kind == "linear":
        # Every wavelength is above a length of 0, so all are stretched.
        return Llama3Scaling(numbers[0], original_positions=0)
    if not numbers[1] < numbers[2] or not numbers[3]:
        raise WeightsError(
            f"config.json has {prefix}low_freq_factor={numbers[1]:g}, high_freq_factor={numbers[2]:g}, "
            f"original_max_position_embeddings={numbers[3]}; expected rising factors and a length above 0"
        )
    return Llama3Scaling(*numbers)


def rope_fields(scaling: Llama3Scaling | None) -> dict:
    """The fields that `rope` reads, without the base."""
    if scaling is None:
        return {"rope_type": "default"}
    if not scaling.original_positions:
        return {"rope_type": "linear", "factor": scaling.factor}
    values = (scaling.factor, scaling.low, scaling.high, scaling.original_positions)
    return {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, values, strict=True))}


def old_rope_fields(scaling: Llama3Scaling) -> dict:
    """`rope_scaling` for transformers 4, which before 4.43 knows only linear scaling, as `type`."""
    fields = rope_fields(scaling)
    return fields if scaling.original_positions else {"type": fields["rope_type"], "factor": fields["factor"]}


def read_dataclass(
    keys: Mapping[str, str], defaults, stated: dict, prefix: str = "", absent: Mapping[str, Any] | None = None, **values
):
    """The dataclass of an architecture, from the fields of a config.json.

    keys: our field -> its name there. defaults: a dataclass of that kind with the values of absent fields; `absent`
      overrides some. values: further fields.

    Raises:
      WeightsError: an invalid number or name, or fields that contradict each other.
    """
    kind = type(defaults)
    hints = typing.get_type_hints(kind)
    for field, key in keys.items():
        default = (absent or {}).get(field, getattr(defaults, field))
        if field in SIDES and key in stated:
            values[field] = size(stated, prefix, key, default, field)
        elif field == "activation":
            values[field] = activation(stated, prefix, key, default)
        elif hints[field] is bool:
            values[field] = flag(stated, prefix, key, default)
        elif hints[field] in (int, float):
            null = field in NULLABLE
            values[field] = number(stated, prefix, key, default, field, kind=hints[field], null=null)
        else:
            values[field] = whole_numbers(stated, prefix, key, default, field)
    try:
        return kind(**values)
    except ValueError as error:
        raise refused(error, prefix) from error


def written(config, keys: Mapping[str, str]) -> dict:
    """The fields of `keys` under their names in a config.json."""
    return {
        key: list(value) if isinstance(value := getattr(config, field), tuple) else value for field, key in keys.items()
    }


def checked(value: Any, name: str, field: str, kind: type = int) -> Any:
    """A number of the file as the type `kind` (int or float), within the `LIMITS` of `field`.

    name: of the file and its field, for the message.

    Raises:
      WeightsError: it is no such number.
    """
    least, most = LIMITS[field]
    try:
        return kind(check_number(value, name, least=least, most=most, whole=kind is int))
    except FileError as error:
        raise WeightsError(str(error)) from error


def dataclass_of(kind: type, values: dict[str, Any], name: str):
    """The (nested) dataclass of an architecture from the JSON of its `asdict`.

    name: of the file, and of the object in it, for the message.

    Raises:
      WeightsError: a field is unknown, missing, of another type or beyond its limits.
    """
    hints = typing.get_type_hints(kind)
    # A tower or a decoder declared as `Any` has the type of its default.
    hints |= {field.name: type(field.default) for field in dataclasses.fields(kind) if hints[field.name] is Any}
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise WeightsError(f"{name}: unknown fields of {kind.__name__}: {', '.join(unknown)[:200]}")
    return kind(**{field: _of_type(hints[field], value, f"{name}: {field}", field) for field, value in values.items()})


def _of_type(hint: Any, value: Any, name: str, field: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind: Any = next(each for each in kinds if each is not types.NoneType)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return dataclass_of(kind, value, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list) and len(value) <= MAX_LAYERS:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis or len(inner) == len(value):
            return tuple(_of_type(inner[0], item, name, field) for item in value)
    if kind in (int, float):
        return checked(value, name, field, kind)
    if kind in (bool, str) and isinstance(value, kind):
        if kind is str and value not in CHOICES.get(field, (value,)):
            raise WeightsError(f"{name}={shown(value)}; accepted: {', '.join(map(shown, CHOICES[field]))}")
        return value
    raise WeightsError(f"{name}={shown(value)} ({article_of(value)}) is not what this field holds")
