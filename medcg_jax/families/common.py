"""What families share: fields of their configurations, tiny sizes, and the body of the models.

A body is a tower, a projector and a decoder; image features replace image tokens (LLaVA-1.5, MiniGPT-v2, NExT-Chat).
Qwen2-VL and Llama-3.2-Vision feed images to their decoders differently, and have their own `hidden`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families import decoder
from medcg_jax.families.clip import ClipVision, ClipVisionConfig
from medcg_jax.families.decoder import Decoder, DecoderConfig
from medcg_jax.families.merge import merge_images
from medcg_jax.nn.base import Base
from medcg_jax.nn.lora import Adapters, LoraConfig


@dataclass(frozen=True)
class FamilyConfig:
    """Architecture, special tokens, and how a model runs. A family's own class gives its defaults and adds fields."""

    # Name in `registry.FAMILIES`.
    family: ClassVar[str]

    vision: Any = ClipVisionConfig()
    text: Any = DecoderConfig()
    # May lie outside the vocabulary, because its row of the embedding is never read.
    image_token_id: int = 32000
    pad_token_id: int = 0
    eos_token_id: int = 2
    # As `ModelConfig`'s fields of these names.
    compute_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    scan_unroll: int = 0
    matmul: str = ""
    # Adapters on the decoder's products; None: none.
    lora: LoraConfig | None = None
    base: Base = Base()

    @property
    def num_image_tokens(self) -> int:
        """The largest number of text tokens that one image takes."""
        return self.vision.num_patches

    @property
    def image_size_px(self) -> int:
        return self.vision.image_size_px

    @property
    def tower_lengths(self) -> set[int]:
        """Lengths of the token sequences in the tower."""
        return {self.vision.num_patches, self.vision.num_patches + 1}

    def image_flops(self, vit: Callable[[int, int, int, int], float]) -> tuple[float, float]:
        """FLOPs of the tower and of the projector for one image. vit: `flops.vit`."""
        vision, tokens, out = self.vision, self.vision.num_patches, self.text.embed_dim
        tower = 2.0 * tokens * 3 * vision.patch_size_px**2 * vision.embed_dim
        tower += vit(vision.num_run_layers, vision.embed_dim, vision.mlp_dim, tokens + 1)
        return tower, 2.0 * tokens * (vision.embed_dim * out + out**2)


def tiny(
    config: type[FamilyConfig],
    vocab_size: int,
    image_token_id: int,
    *,
    pad_token_id: int = 0,
    eos_token_id: int = 2,
    image_size_px: int | None = 32,
    patch_size_px: int = 8,
    embed_dim: int = 64,
    num_vision_layers: int = 3,
    num_vision_heads: int = 2,
    vision_mlp_dim: int = 192,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    mlp_dim: int = 128,
    rope_theta: float = 20.0,
    vision: dict | None = None,
    text: dict | None = None,
    **fields,
):
    """A family's architecture in small, for thousands of steps on a CPU.

    image_size_px: None for a tower without this field. vision, text: further fields of the tower's and the decoder's
    configuration. fields: further fields of the configuration itself.
    """
    whole = config()
    size = {} if image_size_px is None else {"image_size_px": image_size_px}
    vision = dataclasses.replace(
        whole.vision, patch_size_px=patch_size_px, num_layers=num_vision_layers, embed_dim=embed_dim,
        num_heads=num_vision_heads, mlp_dim=vision_mlp_dim, **size, **(vision or {}),
    )  # fmt: skip
    text = dataclasses.replace(
        whole.text, vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=embed_dim // num_heads, mlp_dim=mlp_dim, rope_theta=rope_theta,
        max_positions=512, **(text or {}),
    )  # fmt: skip
    fields |= {"image_token_id": image_token_id, "pad_token_id": pad_token_id, "eos_token_id": eos_token_id}
    return dataclasses.replace(whole, vision=vision, text=text, **fields)


def bench(config: type[FamilyConfig], vocab_size: int, image_token_id: int, *, vision: dict, text: dict, **fields):
    """A family's architecture at a size that two CPU cores train in half a second a step, for comparisons of speed.

    The vocabulary has 4,096 rows at least. vision, text: further fields of the tower's and the decoder's configuration.
    """
    whole = config()
    size = {"patch_size_px": 8, "embed_dim": 128, "num_heads": 4, "mlp_dim": 512, **vision}
    text = {
        "vocab_size": max(vocab_size, 4096), "num_layers": 6, "embed_dim": 256, "num_heads": 8, "num_kv_heads": 8,
        "head_dim": 32, "mlp_dim": 688, "max_positions": 512, **text,
    }  # fmt: skip
    parts = {"vision": dataclasses.replace(whole.vision, **size), "text": dataclasses.replace(whole.text, **text)}
    return dataclasses.replace(whole, **{**parts, "image_token_id": image_token_id, **fields})


class VisionLanguageModel(nnx.Module):
    """Submodules: `vision`, `projector`, `decoder`, and `lora`, adapters on the decoder (None without `config.lora`).

    A family overrides the `make_` methods, and `tower_features` and `project_features` where images differ. The order in
    which submodules are made decides what a seed draws for each.
    """

    # Keys of a batch that `encode_images` takes.
    image_keys: tuple[str, ...] = ("pixels",)

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "encode_images" in vars(cls):
            raise TypeError(
                f"{cls.__name__}.encode_images: override tower_features and project_features, its two steps"
            )

    def __init__(self, config: FamilyConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        params = {"rngs": rngs, "param_dtype": param_dtype}
        runs = {"unroll": config.scan_unroll, "remat": config.remat}
        self.config = config
        self.dtype = jnp.dtype(config.compute_dtype)
        self.vision = self.make_vision(**params, **runs)
        self.projector = self.make_projector(**params)
        self.decoder = self.make_decoder(**params, **runs)
        self.lora = self.make_adapters(config.lora, **params) if config.lora else None

    def make_vision(self, **options) -> Any:
        return ClipVision(self.config.vision, **options)

    def make_projector(self, **params) -> Any:
        raise NotImplementedError

    def make_decoder(self, **options) -> Any:
        return Decoder(self.config.text, **options)

    def make_adapters(self, lora: LoraConfig, **params) -> nnx.Module:
        return Adapters(self.config.text, lora, self.config.text.num_layers, **params)

    def encode_images(self, images: dict[str, jax.Array]) -> Any:
        """float[B, I * P, D] features of each row's images, one image after the other; as `tower_features` takes them."""
        return self.project_features(self.tower_features(images))

    def tower_features(self, images: dict[str, jax.Array]) -> Any:
        """float[B, I, P', E] what the tower alone makes of each row's images; it reads the part "vision" and no other.

        images: `pixels`, uint8[B, I, h, w, 3], or float[B, I, h, w, 3] already normalised.

        Raises:
          ValueError: images that are not `image_size_px` square with three channels.
        """
        size, pixels = self.config.image_size_px, images["pixels"]
        if pixels.ndim != 5 or pixels.shape[2:] != (size, size, 3):
            raise ValueError(f"pixels {pixels.shape}; expected [batch, images, {size}, {size}, 3]")
        rows, num = pixels.shape[:2]
        flat = pixels.reshape(rows * num, size, size, 3)
        features = self.vision(flat, dtype=self.dtype, attention=self.config.attention)
        return features.reshape(rows, num, *features.shape[1:])

    def project_features(self, features: Any) -> Any:
        """What `encode_images` gives, of `tower_features`; it reads the part "projector" and no other."""
        rows, num = features.shape[:2]
        projected = self.project(features.reshape(rows * num, *features.shape[2:]))
        return projected.reshape(rows, num * self.config.num_image_tokens, -1)

    def project(self, features: jax.Array) -> jax.Array:
        """float[B, P, D]: the tower's features as the decoder takes them."""
        return self.projector(features)

    def image_tokens(self, images: dict[str, jax.Array], side: int) -> tuple[jax.Array, jax.Array]:
        """(float[B, P, D], int[B, P]): the features of each row's only image, and the cell of the image that each shows.

        Cells are those of a division of the image into `side` x `side`, row by row from the top left; `side`**2 stands
        for the whole image (a class token), -1 for no image.
        """
        features = self.encode_images(images)
        rows = math.isqrt(self.config.vision.num_patches)
        class_tokens = features.shape[1] % rows
        cells = cells_of(jnp.arange(features.shape[1] - class_tokens), rows, features.shape[1] // rows, side)
        cells = jnp.concatenate([jnp.full(class_tokens, side * side), cells])
        return features, jnp.broadcast_to(cells, features.shape[:2])

    def hidden(
        self, tokens, images=None, *, segment_ids=None, positions=None, cache=None, image_features=None, at=None
    ) -> tuple[jax.Array, dict | None]:
        """(float[B, T, D] after the final norm, the cache with these tokens in it or None).

        tokens: int[B, T], every image as `num_image_tokens` copies of `image_token_id`.
        images: as in `encode_images`; or image_features: its result. Neither: the rows hold no image token.
        segment_ids, positions, cache, at: as in `Decoder`; at: float[B, L, D] comes back.

        Raises:
          ValueError: shapes that do not fit each other.
        """
        check_shapes(tokens, segment_ids=segment_ids, positions=positions)
        x = self.embed(tokens, self.encode_images(images) if images is not None else image_features)
        return self.decode(x, segment_ids=segment_ids, positions=positions, cache=cache, at=at)

    def decode(self, x: jax.Array, **options) -> tuple[jax.Array, Any]:
        """The decoder with the model's adapters over embedded tokens; options: as `Decoder`'s."""
        return self.decoder(x, attention=self.config.attention, lora=self.lora, **options)

    def embed(self, tokens: jax.Array, image_features=None) -> jax.Array:
        """float[B, T, D]: the input of the decoder's first layer, with image features in place of image tokens."""
        is_image = tokens == self.config.image_token_id
        # Image and padding ids may lie outside the table; their rows are replaced, or never attended to.
        ids = jnp.where(is_image, 0, jnp.minimum(tokens, self.config.text.vocab_size - 1))
        x = self.decoder.embed(ids, self.dtype)
        return x if image_features is None else merge_images(x, image_features, is_image)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V] for hidden[..., D]."""
        return self.decoder.logits(hidden)

    def init_cache(self, batch: int, length: int, dtype=None) -> dict[str, Any]:
        return decoder.init_cache(self.config.text, batch, length, self.dtype if dtype is None else dtype)

    def __call__(self, tokens, images=None, **options) -> jax.Array:
        """float32[B, T, V]: logits at every position; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, images, **options)[0])


def cells_of(places: jax.Array, rows, columns, side: int) -> jax.Array:
    """The cells (`VisionLanguageModel.image_tokens`) of tokens at these places of a grid, counted row by row."""
    return (places // columns * side // rows) * side + places % columns * side // columns


def check_shapes(tokens: jax.Array, **arrays: jax.Array | None) -> None:
    """Raises ValueError if `tokens` is not [batch, length], or another array has another shape."""
    for name, array in [("tokens", tokens), *arrays.items()]:
        if array is not None and (array.shape != tokens.shape or tokens.ndim != 2):
            raise ValueError(f"{name} {array.shape} beside tokens {tokens.shape}; expected [batch, length]")
