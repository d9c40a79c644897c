"""SAM's image encoder (windowed and global attention with relative positions) and prompt encoder.

Source: NExT-ChatV/NExT-Chat:mllm/models/sam/modeling_sam.py at 1e6c20f; arXiv 2304.02643.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.nn.blocks import run_stack
from medcg_jax.nn.context import constrain
from medcg_jax.nn.layers import Dense, LayerNorm, Stack, constant, gelu, normal, param


@dataclass(frozen=True)
class SamConfig:
    """The defaults are SAM ViT-H."""

    image_size_px: int = 1024
    patch_size_px: int = 16
    num_layers: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_dim: int = 5120
    # Side of a window, in patches; layers in `global_layers` have none.
    window_size: int = 14
    global_layers: tuple[int, ...] = (7, 15, 23, 31)
    norm_eps: float = 1e-6
    # Width of prompts, of the encoder's output and of the mask decoder.
    prompt_dim: int = 256
    mask_prompt_dim: int = 16
    num_decoder_layers: int = 2
    num_decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    decoder_norm_eps: float = 1e-5
    # Only the first, for prompts that are not ambiguous, is computed.
    num_masks: int = 4
    iou_dim: int = 256
    num_iou_layers: int = 3
    # Of bytes.
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self):
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px={self.image_size_px} is no multiple of patch_size_px={self.patch_size_px}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"sam embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}")
        if self.prompt_dim % (2 * self.num_decoder_heads) or self.prompt_dim % 8:
            raise ValueError(
                f"prompt_dim={self.prompt_dim}: no multiple of 8 and of 2 * num_decoder_heads={self.num_decoder_heads}"
            )
        if sorted(set(self.global_layers)) != list(self.global_layers) or not all(
            0 <= layer < self.num_layers for layer in self.global_layers
        ):
            raise ValueError(f"global_layers={self.global_layers}; expected ascending numbers below {self.num_layers}")

    @property
    def grid_size(self) -> int:
        return self.image_size_px // self.patch_size_px

    @property
    def windowed_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.global_layers)


def sam_tiny(**fields) -> SamConfig:
    """The same architecture in small: 64 pixels, an 8 x 8 grid, windows that do not divide it."""
    sizes: dict[str, Any] = dict(
        image_size_px=64, patch_size_px=8, num_layers=3, embed_dim=32, num_heads=2, mlp_dim=128, window_size=3,
        global_layers=(1,), prompt_dim=32, num_decoder_heads=4, decoder_mlp_dim=64, iou_dim=32,
    )  # fmt: skip
    return SamConfig(**sizes | fields)


class Conv(nnx.Module):
    """A square convolution, float[B, h, w, Cin] to float[B, h', w', Cout]; its kernel is [size * size * Cin, Cout].

    axis: logical name of the output channels; "norm" where they are a handful.
    """

    def __init__(
        self, size: int, inputs: int, outputs: int, *, use_bias: bool, stride: int = 1, axis: str = "vision_embed",
        rngs, param_dtype,
    ):  # fmt: skip
        self.size, self.stride = size, stride
        shape = (size * size * inputs, outputs)
        self.kernel = param(normal(shape[0] ** -0.5), shape, ("patch", axis), rngs=rngs, param_dtype=param_dtype)
        self.bias = param(constant(0.0), (outputs,), (axis,), rngs=rngs, param_dtype=param_dtype) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Zeros around x where the stride is 1, so that its size stays; none otherwise."""
        kernel = self.kernel[...].astype(x.dtype).reshape(self.size, self.size, x.shape[3], -1)
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), "SAME" if self.stride == 1 else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class SamBlock(nnx.Module):
    """Pre-norm block over a grid of patches; attention with a learned bias by row and by column distance.

    size: side of what attends, in patches: the window, or the whole grid.
    """

    def __init__(self, config: SamConfig, size: int, *, rngs, param_dtype, stack: Stack = ()):
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        width, heads = config.embed_dim, config.num_heads
        head_dim = width // heads
        self.size = size
        self.norm1 = LayerNorm(width, eps=config.norm_eps, **init)
        self.qkv = Dense(
            "bhwd,dcnk->bhwcnk", (width, 3, heads, head_dim), ("vision_embed", "norm", "vision_heads", "head_dim"),
            use_bias=True, **init,
        )  # fmt: skip
        self.rows = param(normal(head_dim**-0.5), (2 * size - 1, head_dim), ("pos", "head_dim"), **init)
        self.columns = param(normal(head_dim**-0.5), (2 * size - 1, head_dim), ("pos", "head_dim"), **init)
        out = (heads, head_dim, width), ("vision_heads", "head_dim", "vision_embed")
        self.out = Dense("bhwnk,nkd->bhwd", *out, use_bias=True, **init)
        self.norm2 = LayerNorm(width, eps=config.norm_eps, **init)
        mlp = config.mlp_dim
        self.up = Dense("bhwd,df->bhwf", (width, mlp), ("vision_embed", "vision_mlp"), use_bias=True, **init)
        self.down = Dense("bhwf,fd->bhwd", (mlp, width), ("vision_mlp", "vision_embed"), use_bias=True, **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float[B, g, g, E]; a grid that is not whole windows is filled with zeros behind the norm, which attend."""
        grid, size = x.shape[1], self.size
        windows = _windows(self.norm1(x), size)
        q, k, v = jnp.moveaxis(self.qkv(windows), 3, 0)
        y = self.out(_attend(q, k, v, self.rows[...].astype(x.dtype), self.columns[...].astype(x.dtype)))
        x = x + _grid(y, grid)
        x = x + self.down(gelu(self.up(self.norm2(x))))
        return constrain(x, "act_batch", None, None, "act_embed")


class SamEncoder(nnx.Module):
    """Pixels to features, float[B, g, g, C]. Windowed and global layers are two stacks, run in the layers' order."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32, unroll: int, remat: str):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config, self.unroll, self.remat = config, unroll, remat
        width, grid, out = config.embed_dim, config.grid_size, config.prompt_dim
        size, num = config.patch_size_px, len(config.global_layers)
        self.patch = Conv(size, 3, width, use_bias=True, stride=size, **init)
        self.positions = param(normal(width**-0.5), (grid, grid, width), ("pos", "pos", "vision_embed"), **init)
        num_windowed = config.num_layers - num
        self.windowed = SamBlock(config, config.window_size, stack=(num_windowed,), **init) if num_windowed else None
        self.whole = SamBlock(config, grid, stack=(num,), **init) if num else None
        self.neck1 = Conv(1, width, out, use_bias=False, **init)
        self.norm1 = LayerNorm(out, eps=config.norm_eps, **init)
        self.neck2 = Conv(3, out, out, use_bias=False, **init)
        self.norm2 = LayerNorm(out, eps=config.norm_eps, **init)

    def embed(self, pixels: jax.Array, extent: jax.Array | None, dtype) -> jax.Array:
        """float[B, g, g, E]: the input of the first layer. Arguments as in `__call__`."""
        size = self.config.image_size_px
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"sam_pixels {pixels.shape}; expected [batch, {size}, {size}, 3]")
        x = self.patch(normalise(pixels, extent, self.config).astype(dtype))
        return constrain(x + self.positions[...].astype(dtype), "act_batch", None, None, "act_embed")

    def runs(self):
        """(stack, first layer, end) of each run of consecutive layers of one kind, in order."""
        done = {True: 0, False: 0}
        kinds = (layer in self.config.global_layers for layer in range(self.config.num_layers))
        for whole, group in itertools.groupby(kinds):
            start = done[whole]
            done[whole] += len(list(group))
            yield (self.whole if whole else self.windowed), start, done[whole]

    def neck(self, x: jax.Array) -> jax.Array:
        return self.norm2(self.neck2(self.norm1(self.neck1(x))))

    def __call__(self, pixels: jax.Array, extent: jax.Array | None = None, *, dtype) -> jax.Array:
        """pixels: uint8[B, s, s, 3] with extent int[B, 2], the height and width of the image in the middle,
        around which normalised pixels are 0; or float[B, s, s, 3], already normalised.

        Raises:
          ValueError: images that are not `image_size_px` square with three channels, or bytes without `extent`.
        """
        x = self.embed(pixels, extent, dtype)
        for blocks, start, stop in self.runs():
            graphdef, params = nnx.split(blocks)
            layers = nnx.merge(graphdef, jax.tree.map(lambda w, a=start, b=stop: w[a:b], params))
            x, _ = run_stack(layers, lambda block, x, _: (block(x), None), x, unroll=self.unroll, remat=self.remat)
        return self.neck(x)


class SamPrompt(nnx.Module):
    """Encodes boxes as two corner tokens, and positions; parameters for prompts by points and masks are never used."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        width, small = config.prompt_dim, config.mask_prompt_dim
        self.config = config
        # A buffer of the original: random, and never trained.
        self.frequencies = param(normal(1.0), (2, width // 2), ("pos", "norm"), **init)
        # Added to points outside and inside of the object, and to a box's corners.
        self.points = param(normal(1.0), (4, width), ("pos", "norm"), **init)
        self.not_a_point = param(normal(1.0), (width,), ("norm",), **init)
        self.no_mask = param(normal(1.0), (width,), ("norm",), **init)
        self.mask1 = Conv(2, 1, small // 4, use_bias=True, stride=2, axis="norm", **init)
        self.mask_norm1 = LayerNorm(small // 4, eps=config.norm_eps, **init)
        self.mask2 = Conv(2, small // 4, small, use_bias=True, stride=2, axis="norm", **init)
        self.mask_norm2 = LayerNorm(small, eps=config.norm_eps, **init)
        self.mask3 = Conv(1, small, width, use_bias=True, **init)

    def corners(self, boxes: jax.Array) -> jax.Array:
        """float32[..., 2, C] tokens of the upper left and lower right corner of boxes[..., 4] in 0 to 1."""
        # Shifted by half a pixel, to the middle of the corner's pixel.
        points = boxes.astype(jnp.float32).reshape(*boxes.shape[:-1], 2, 2) + 0.5 / self.config.image_size_px
        return self._code(points) + self.points[...][2:].astype(jnp.float32)

    def grid(self) -> jax.Array:
        """float32[g, g, C]: the code of the middle of every patch."""
        middle = (jnp.arange(self.config.grid_size, dtype=jnp.float32) + 0.5) / self.config.grid_size
        return self._code(jnp.stack(jnp.meshgrid(middle, middle), axis=-1))

    def _code(self, points: jax.Array) -> jax.Array:
        """float32[..., C] sines and cosines of random projections of points[..., 2], x and y in 0 to 1."""
        frequencies = jax.lax.stop_gradient(self.frequencies[...]).astype(jnp.float32)
        angles = 2 * jnp.pi * ((2 * points - 1) @ frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def normalise(pixels: jax.Array, extent: jax.Array | None, config: SamConfig) -> jax.Array:
    """float32 pixels, (x - mean) / std in the middle `extent` of each image and 0 around it; floats as they are."""
    if pixels.dtype != jnp.uint8:
        return pixels
    if extent is None:
        raise ValueError("sam_pixels are bytes without sam_extent; expected sam_extent, or normalised floats")
    x = (pixels.astype(jnp.float32) - jnp.asarray(config.image_mean)) / jnp.asarray(config.image_std)
    start = (config.image_size_px - extent) // 2
    position = jnp.arange(config.image_size_px)
    inside = (position >= start[..., None]) & (position < (start + extent)[..., None])
    return jnp.where((inside[:, 0, :, None] & inside[:, 1, None, :])[..., None], x, 0.0)


def _windows(x: jax.Array, size: int) -> jax.Array:
    """float[B * windows, size, size, E] of x[B, g, g, E], row by row; zeros where windows exceed the grid."""
    batch, grid, _, width = x.shape
    num = -(-grid // size)
    x = jnp.pad(x, ((0, 0), (0, num * size - grid), (0, num * size - grid), (0, 0)))
    x = x.reshape(batch, num, size, num, size, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * num * num, size, size, width)


def _grid(windows: jax.Array, grid: int) -> jax.Array:
    """float[B, g, g, E]: the inverse of `_windows`."""
    size, width = windows.shape[1], windows.shape[3]
    num = -(-grid // size)
    x = windows.reshape(-1, num, num, size, size, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, num * size, num * size, width)[:, :grid, :grid]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """float[B, s, s, N, H]: attention between all positions.

    q, k, v: float[B, s, s, N, H]. rows, columns: float[2 s - 1, H], by distance from -(s - 1): their products with the
    query, unscaled, are added to its scores.
    """
    size, head_dim = q.shape[1], q.shape[4]
    distance = jnp.arange(size)[:, None] - jnp.arange(size) + size - 1
    fp32 = dict(preferred_element_type=jnp.float32)
    scores = jnp.einsum("bhwnk,bijnk->bnhwij", q, k, **fp32) * head_dim**-0.5
    scores += jnp.einsum("bhwnk,hik->bnhwi", q, rows[distance], **fp32)[..., None]
    scores += jnp.einsum("bhwnk,wjk->bnhwj", q, columns[distance], **fp32)[..., None, :]
    weights = jax.nn.softmax(scores.reshape(*scores.shape[:4], -1), axis=-1).reshape(scores.shape)
    return jnp.einsum("bnhwij,bijnk->bhwnk", weights.astype(v.dtype), v)
