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


def expect_plain_rope(rope: dict, prefix: str, *kinds: str) -> None:
    """Raises WeightsError where `rope` (`rope_parameters` or `rope_scaling`) is of another kind than `kinds`."""
    expect(rope, prefix, rope_type=kinds, type=kinds, partial_rotary_factor=1.0)
