"""The dtype of the parameters that a run does not train."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """dtype: of parameters outside the submodules `trained`, one of `config.BASE_DTYPES`; "float32": unchanged.

    "int8" and "nf4" apply to the matrices of stacked blocks (`nn.quant`); norms, biases and tables are then bfloat16.
    """

    dtype: str = "float32"
    trained: tuple[str, ...] = ()
