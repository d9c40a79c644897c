"""Fields of a config.json, read and checked; every refusal names the field, its value and what is accepted."""

from medcg_jax.nn.layers import ACTIVATIONS
from medcg_jax.nn.rope import Llama3Scaling
from medcg_jax.weights.files import WeightsError

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
            raise WeightsError(f"{file} has {prefix}{key}={found[key]!r}; {' or '.join(map(repr, values))} is accepted")


def activation(found: dict, prefix: str, key: str, default: str) -> str:
    """The activation that a field names.

    Raises:
      WeightsError: it is none of `ACTIVATIONS`.
    """
    expect(found, prefix, **{key: tuple(ACTIVATIONS)})
    return first(found.get(key), default)


def size(found: dict, prefix: str, key: str, default: int) -> int:
    """The number that a field holds, by itself or for each side alike.

    Raises:
      WeightsError: it differs between the sides, or is no whole number.
    """
    value = first(found.get(key), default)
    sides = set(value) if isinstance(value, list | tuple) and value else {value}
    number = sides.pop()
    if sides or isinstance(number, bool) or not isinstance(number, int):
        raise WeightsError(
            f"config.json has {prefix}{key}={value!r}; a whole number, the same for all sides, is accepted"
        )
    return number


def refused(error: ValueError, prefix: str) -> WeightsError:
    """The refusal of an architecture by the model, as one of the file that states it."""
    if isinstance(error, WeightsError):
        return error
    return WeightsError(f"config.json, {prefix.rstrip('.') or 'top'}: {error}")


def rope(found: dict, prefix: str, *, plain=("default",), scaled=SCALED) -> tuple[dict, Llama3Scaling | None]:
    """(the fields of rotary positions, how they are scaled) of a text model's fields, in any version's spelling.

    plain, scaled: names of kinds that are accepted, without and with a scaling.

    Raises:
      WeightsError: they are of another kind, turn a part of each head alone, or a number of the scaling is missing.
    """
    # In their new place, or their old one; where both are there, neither may ask for what is not computed.
    places = {key: found.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    for key, values in places.items():
        kinds = (*plain, *scaled)
        expect(values, f"{prefix}{key}.", rope_type=kinds, type=kinds, partial_rotary_factor=1.0)
    fields = places["rope_parameters"] or places["rope_scaling"]
    kind = next((fields[key] for key in ("rope_type", "type") if fields.get(key) in scaled), None)
    if kind is None:
        return fields, None
    names = LLAMA3_ROPE if kind == "llama3" else LLAMA3_ROPE[:1]
    missing = [name for name in names if name not in fields]
    if missing:
        raise WeightsError(f"config.json's {kind!r} rotary positions lack {', '.join(missing)}")
    if kind == "linear":
        # Every wavelength is above a length of 0, so that all are stretched alike.
        return fields, Llama3Scaling(float(fields["factor"]), original_positions=0)
    factor, low, high, original = (fields[name] for name in names)
    return fields, Llama3Scaling(float(factor), float(low), float(high), original)


def rope_fields(scaling: Llama3Scaling | None) -> dict:
    """The fields that `rope` reads, without the base."""
    if scaling is None:
        return {"rope_type": "default"}
    if not scaling.original_positions:
        return {"rope_type": "linear", "factor": scaling.factor}
    values = (scaling.factor, scaling.low, scaling.high, scaling.original_positions)
    return {"rope_type": "llama3", **dict(zip(LLAMA3_ROPE, values, strict=True))}


def last_of(ends) -> int | None:
    """Of several ends the last, which is that of a turn."""
    return ends[-1] if isinstance(ends, list) and ends else ends
