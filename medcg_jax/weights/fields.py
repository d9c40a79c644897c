"""Fields of a config.json, each checked against what the port computes."""

from medcg_jax.weights.files import WeightsError


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


def rope_of(found: dict, prefix: str, *kinds: str) -> dict:
    """The fields of rotary positions, in their new place (`rope_parameters`) or their old one (`rope_scaling`).

    Raises:
      WeightsError: they are of another kind than `kinds`, or turn a part of each head alone.
    """
    places = {key: found.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    for key, rope in places.items():
        expect(rope, f"{prefix}{key}.", rope_type=kinds, type=kinds, partial_rotary_factor=1.0)
    return places["rope_parameters"] or places["rope_scaling"]
