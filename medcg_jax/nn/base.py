"""How the parameters that a run does not train are kept."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """dtype: of parameters outside the parts `trained`, of `run_config.BASE_DTYPES`; with "float32" all are that.

    "int8" and "nf4" are for the matrices of stacked blocks (`nn.quant`); norms, biases and tables are bfloat16 then.
    """

    dtype: str = "float32"
    trained: tuple[str, ...] = ()
