"""Fields of a released config.json, read and checked; every refusal names the field, its value and what is accepted."""

from medcg_jax.nn.layers import ACTIVATIONS
from medcg_jax.nn.rope import Llama3Scaling
from medcg_jax.weights.files import WeightsError

# In the order of `Llama3Scaling`'s fields.
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def first(*values):
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def expect(found: dict, prefix: str, **accepted) -> None:
    """Raises WeightsError where a field is there and has another value; prefix: where the fields stand."""
    for key, value in accepted.items():
        if found.get(key, value) != value:
            raise WeightsError(f"config.json has {prefix}{key}={found[key]!r}; {value!r} is accepted")


def activation(found: dict, prefix: str, key: str, default: str) -> str:
    """The activation that a field names.

    Raises:
      WeightsError: it is none of `ACTIVATIONS`.
    """
    name = first(found.get(key), default)
    if name not in ACTIVATIONS:
        raise WeightsError(f"config.json has {prefix}{key}={name!r}; accepted: {', '.join(ACTIVATIONS)}")
    return name


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
    return (
        error
        if isinstance(error, WeightsError)
        else WeightsError(f"config.json, {prefix.rstrip('.') or 'top'}: {error}")
    )


def rope(found: dict, prefix: str, *, accepted: tuple[str, ...] = ("default",)) -> tuple[dict, Llama3Scaling | None]:
    """(the fields of rotary positions, how they are scaled) of a text model's fields, in any version's spelling.

    accepted: names of what is not scaled.

    Raises:
      WeightsError: they are scaled in another way than "linear" or "llama3", or a number of the scaling is missing.
    """
    fields = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kinds = {fields[key] for key in ("rope_type", "type") if fields.get(key) is not None} - set(accepted)
    if not kinds:
        return fields, None
    kind = kinds.pop()
    names = {"linear": LLAMA3_ROPE[:1], "llama3": LLAMA3_ROPE}.get(kind, ())
    if kinds or not names:
        listed = ", ".join(repr(name) for name in (*accepted, "linear", "llama3"))
        raise WeightsError(f"config.json scales rotary positions ({prefix}rope_type={kind!r}); accepted: {listed}")
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
