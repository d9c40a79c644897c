"""Fields of a config.json, read and checked; every refusal names the field, its value and what is accepted."""

from typing import Any

from medcg_jax.families.weights.files import WeightsError
from medcg_jax.families.weights.limits import checked
from medcg_jax.nn.layers import ACTIVATIONS
from medcg_jax.nn.rope import Llama3Scaling
from medcg_jax.untrusted import article_of

# Kinds of scaling of rotary positions that are computed.
SCALED = ("linear", "llama3")
# In the order of `Llama3Scaling`'s fields.
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def first(*values):
    """The first value that is not None; None where all are."""
    return next((value for value in values if value is not None), None)


def expect(found: dict, prefix: str, *, file: str = "config.json", **accepted) -> None:
    """Raises WeightsError where a field of `found` is neither absent, nor null, nor what is accepted.

    accepted: field -> value, or a tuple of values. prefix: of the fields' names in the message ("text_config.").
    """
    for key, value in accepted.items():
        values = value if isinstance(value, tuple) else (value,)
        if found.get(key) is not None and found[key] not in values:
            raise WeightsError(
                f"{file} has {prefix}{key}={quoted(found[key])}; {' or '.join(map(repr, values))} is accepted"
            )


def quoted(value: Any, limit: int = 100) -> str:
    """A value of a file for a message, at most `limit` characters."""
    try:
        text = repr(value)
    except RecursionError:
        return "..."
    return text if len(text) <= limit else text[: limit - 3] + "..."


def section(found: dict, prefix: str, key: str) -> dict:
    """The object that a field holds; an empty one where it is absent or null.

    Raises:
      WeightsError: it holds something else.
    """
    value = first(found.get(key), {})
    if not isinstance(value, dict):
        raise WeightsError(
            f"config.json has {prefix}{key}={quoted(value)} ({article_of(value)}); an object is accepted"
        )
    return value


def number(
    found: dict, prefix: str, key: str, default, field: str, *, kind: type = int, null: bool = False,
    file: str = "config.json",
):  # fmt: skip
    """The number that a field holds, of the type `kind`.

    field: of our dataclass, whose `LIMITS` it must keep. null: whether that stands for `default`.

    Raises:
      WeightsError: it is no such number.
    """
    if key not in found or (null and found[key] is None):
        return default
    return checked(found[key], f"{file} has {prefix}{key}", field, kind)


def flag(found: dict, prefix: str, key: str, default: bool) -> bool:
    """Whether a field is true; `default` where it is absent or null.

    Raises:
      WeightsError: it is neither true nor false.
    """
    value = first(found.get(key), default)
    if not isinstance(value, bool):
        raise WeightsError(f"config.json has {prefix}{key}={quoted(value)}; true or false is accepted")
    return value


def token(found: dict, prefix: str, key: str, default: int | None = None) -> int | None:
    """The id of a token that a field holds; `default` where it is absent or null. Raises WeightsError as `number`."""
    limits = "image_token_id" if key.startswith("image_token") else "pad_token_id"
    return number(found, prefix, key, default, limits, null=True)


def end_of(found: dict, prefix: str, default: int | None = None, *, last: bool = True) -> int | None:
    """`eos_token_id`; of several the last, which is that of a turn, or the first. Raises WeightsError as `number`."""
    value = found.get("eos_token_id")
    if isinstance(value, list) and value:
        for each in value:
            checked(each, f"config.json has {prefix}eos_token_id", "eos_token_id")
        return value[-1 if last else 0]
    return token(found, prefix, "eos_token_id", default)


def whole_numbers(found: dict, prefix: str, key: str, default: tuple[int, ...], field: str) -> tuple[int, ...]:
    """The list of whole numbers that a field holds; `default` where it is absent or null.

    Raises:
      WeightsError: it is no list of such numbers within the `LIMITS` of `field`.
    """
    value = first(found.get(key), default)
    if not isinstance(value, list | tuple):
        raise WeightsError(f"config.json has {prefix}{key}={quoted(value)}; a list of whole numbers is accepted")
    return tuple(checked(each, f"config.json has {prefix}{key}", field) for each in value)


def activation(found: dict, prefix: str, key: str, default: str) -> str:
    """The activation that a field names.

    Raises:
      WeightsError: it is none of `ACTIVATIONS`.
    """
    expect(found, prefix, **{key: tuple(ACTIVATIONS)})
    return first(found.get(key), default)


def size(found: dict, prefix: str, key: str, default: int, field: str = "patch_size_px") -> int:
    """The number that a field holds, by itself or for each side alike; null where the default is meant.

    Raises:
      WeightsError: it differs between the sides, or is no whole number within the `LIMITS` of `field`.
    """
    value = first(found.get(key), default)
    sides = value if isinstance(value, list | tuple) and value else [value]
    if any(side != sides[0] for side in sides):
        raise WeightsError(
            f"config.json has {prefix}{key}={value!r}; a whole number, the same for all sides, is accepted"
        )
    return checked(sides[0], f"config.json has {prefix}{key}", field)


def refused(error: ValueError, prefix: str) -> WeightsError:
    """The refusal of an architecture by the model, as one of the file that states it."""
    if isinstance(error, WeightsError):
        return error
    return WeightsError(f"config.json, {prefix.rstrip('.') or 'top'}: {error}")


def rope(
    found: dict, prefix: str, theta: float, *, plain=("default",), scaled=SCALED
) -> tuple[dict, float, Llama3Scaling | None]:
    """(fields of rotary positions, their base, how they are scaled) of a text model's fields, in any version's spelling.

    theta: the base where no field states it. plain, scaled: names of kinds that are accepted, without and with a
      scaling.

    Raises:
      WeightsError: they are of another kind, turn a part of each head alone, a number of the scaling is missing, or
        two places state different ones: versions of transformers do not take the same.
    """
    # In their new place (transformers 5), or their old one.
    places = {key: section(found, prefix, key) for key in ("rope_parameters", "rope_scaling")}
    stated = {key: _rope_of(values, f"{prefix}{key}.", plain, scaled) for key, values in places.items() if values}
    expect(found, prefix, partial_rotary_factor=1.0)
    scalings, bases = list(stated.values()), {}
    for place, values in ((prefix, found), *((f"{prefix}{key}.", values) for key, values in places.items())):
        base = number(values, place, "rope_theta", None, "rope_theta", kind=float, null=True)
        bases |= {} if base is None else {f"{place}rope_theta": base}
    sections = [values["mrope_section"] for values in places.values() if values.get("mrope_section") is not None]
    if any(each != scalings[0] for each in scalings) or any(each != sections[0] for each in sections):
        raise WeightsError(
            f"config.json has {prefix}rope_parameters={quoted(places['rope_parameters'])} and "
            f"{prefix}rope_scaling={quoted(places['rope_scaling'])}: versions of transformers take the one or the "
            "other; the same in both, or one of them, is accepted"
        )
    if len(set(bases.values())) > 1:
        both = " and ".join(f"{name}={value:g}" for name, value in bases.items())
        raise WeightsError(f"config.json has {both}: the same number in all places is accepted")
    fields = {**places["rope_scaling"], **places["rope_parameters"]}
    return fields, next(iter(bases.values()), theta), next(iter(scalings), None)


def _rope_of(values: dict, prefix: str, plain, scaled) -> Llama3Scaling | None:
    """The scaling that one object of rotary fields states."""
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
        # Every wavelength is above a length of 0, so that all are stretched alike.
        return Llama3Scaling(numbers[0], original_positions=0)
    if not numbers[1] < numbers[2] or not numbers[3]:
        raise WeightsError(
            f"config.json has {prefix}low_freq_factor={numbers[1]:g}, high_freq_factor={numbers[2]:g}, "
            f"original_max_position_embeddings={numbers[3]}; rising factors and a length above 0 are accepted"
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
    """The same for `rope_scaling`, which transformers 4 reads: before 4.43 it knows linear scaling alone, as `type`."""
    fields = rope_fields(scaling)
    return fields if scaling.original_positions else {"type": fields["rope_type"], "factor": fields["factor"]}
