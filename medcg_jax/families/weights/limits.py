"""What the numbers of an architecture may be, in a config.json as in our model.json; none of it fits nowhere."""

import dataclasses
import types
import typing
from typing import Any

from medcg_jax.config import ATTENTION, BASE_DTYPES, DTYPES, MATMUL, REMAT
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.nn.layers import ACTIVATIONS
from medcg_jax.untrusted import FileError, article_of, check_number, shown

MAX_LAYERS = 1024
MAX_SIDE_PX = 2**14
MAX_TOKEN_ID = 2**31 - 1
_COUNT, _WIDTH, _TOKEN, _EPS = (1, 2**12), (1, 2**20), (-1, MAX_TOKEN_ID), (1e-15, 1.0)
# Field of an architecture's dataclass -> (least, most). What no table of weights could have is refused before anything
# is made of it: with a thousand million layers the list of their names alone fills a host's memory.
LIMITS: dict[str, tuple[float, float]] = {
    "image_size_px": (1, MAX_SIDE_PX),
    "patch_size_px": (1, MAX_SIDE_PX),
    "num_frames": (1, 64),
    "merge": (1, 64),
    "num_layers": (1, MAX_LAYERS),
    "num_global_layers": (0, MAX_LAYERS),
    "num_decoder_layers": (1, MAX_LAYERS),
    "num_iou_layers": (1, MAX_LAYERS),
    "feature_layer": (-MAX_LAYERS, MAX_LAYERS),
    "intermediate_layers": (0, MAX_LAYERS),
    "cross_layers": (0, MAX_LAYERS),
    "global_layers": (0, MAX_LAYERS),
    "embed_dim": _WIDTH,
    "mlp_dim": _WIDTH,
    "decoder_mlp_dim": _WIDTH,
    "prompt_dim": _WIDTH,
    "mask_prompt_dim": _WIDTH,
    "iou_dim": _WIDTH,
    "num_heads": _COUNT,
    "num_kv_heads": _COUNT,
    "num_decoder_heads": _COUNT,
    "head_dim": (1, 2**14),
    "mrope_sections": _COUNT,
    "num_masks": _COUNT,
    "num_mask_prompts": _COUNT,
    "patches_per_token": _COUNT,
    "window_size": (1, MAX_SIDE_PX),
    "vocab_size": (1, 2**24),
    "max_positions": (1, 2**30),
    "max_boxes": _COUNT,
    "min_pixels": (1, MAX_SIDE_PX**2),
    "max_pixels": (1, MAX_SIDE_PX**2),
    "norm_eps": _EPS,
    "out_norm_eps": _EPS,
    "decoder_norm_eps": _EPS,
    "rope_theta": (1.0, 1e15),
    "factor": (1e-3, 1e6),
    "low": (1e-3, 1e6),
    "high": (1e-3, 1e6),
    "original_positions": (0, 2**30),
    "mlp_ratio": (1e-3, 1e3),
    "rank": (1, 2**16),
    "alpha": (1e-6, 1e6),
    "scan_unroll": (0, MAX_LAYERS),
    "image_std": (1e-3, 1e4),
    "image_mean": (-1e4, 1e4),
    # Of a token that is never looked for, -1 is stated at times; an image's place is.
    "image_token_id": (0, _TOKEN[1]),
    **dict.fromkeys(
        ("pad_token_id", "eos_token_id", "video_token_id", "vision_start_token_id",
         "vision_end_token_id", "at_token_id", "box_token_id"), _TOKEN
    ),
}  # fmt: skip
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


def checked(value: Any, name: str, field: str, kind: type = int) -> Any:
    """A number of the file, where it is one of the type `kind` (int or float) that `field` may hold; as that type.

    name: of the file and its field, for the message. field: of `LIMITS`.

    Raises:
      WeightsError: it is not.
    """
    least, most = LIMITS[field]
    try:
        return kind(check_number(value, name, least=least, most=most, whole=kind is int))
    except FileError as error:
        raise WeightsError(str(error)) from error


def dataclass_of(kind: type, values: dict[str, Any], name: str):
    """The (nested) dataclass of an architecture whose `asdict` was written as JSON.

    name: of the file, and of the object in it, for the message.

    Raises:
      WeightsError: a field is unknown, missing, of another type or beyond its limits.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise WeightsError(f"{name}: unknown fields of {kind.__name__}: {', '.join(unknown)[:200]}")
    return kind(**{field: _of_type(hints[field], value, f"{name}: {field}", field) for field, value in values.items()})


def _of_type(hint, value: Any, name: str, field: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(each for each in kinds if each is not types.NoneType)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
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
