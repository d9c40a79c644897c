"""SAM's mask decoder: prompt tokens and image features attend to each other, then a mask and its expected quality.

Source: NExT-ChatV/NExT-Chat:mllm/models/sam/modeling_sam.py at 1e6c20f; arXiv 2304.02643.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from medcg_jax.families.next_chat.sam import SamConfig
from medcg_jax.nn.attention import attention
from medcg_jax.nn.layers import Dense, LayerNorm, Stack, constant, gelu, normal, param

# The width divided by this is the inner width of attention between tokens and image.
DOWNSAMPLE = 2


class CrossAttention(nnx.Module):
    """Multi-head attention of queries to keys, at `inner` of the model's width."""

    def __init__(self, width: int, inner: int, num_heads: int, *, rngs, param_dtype, stack: Stack = ()):
        init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype, stack=stack)
        head_dim = inner // num_heads
        heads = (width, num_heads, head_dim), ("vision_embed", "vision_heads", "head_dim")
        self.q = Dense("btd,dnh->btnh", *heads, **init)
        self.k = Dense("btd,dnh->btnh", *heads, **init)
        self.v = Dense("btd,dnh->btnh", *heads, **init)
        out = (num_heads, head_dim, width), ("vision_heads", "head_dim", "vision_embed")
        self.out = Dense("btnh,nhd->btd", *out, **init)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # The kernels do not take queries and keys of different lengths.
        return self.out(attention(self.q(q), self.k(k), self.v(v), causal=False, implementation="plain"))


class TwoWayBlock(nnx.Module):
    """Post-norm: tokens to tokens, tokens to image, MLP of the tokens, image to tokens."""

    def __init__(self, config: SamConfig, *, rngs, param_dtype, stack: Stack = ()):
        init = dict(rngs=rngs, param_dtype=param_dtype, stack=stack)
        width, heads, mlp = config.prompt_dim, config.num_decoder_heads, config.decoder_mlp_dim
        self.tokens = CrossAttention(width, width, heads, **init)
        self.to_image = CrossAttention(width, width // DOWNSAMPLE, heads, **init)
        self.up = Dense("btd,df->btf", (width, mlp), ("vision_embed", "vision_mlp"), use_bias=True, **init)
        self.down = Dense("btf,fd->btd", (mlp, width), ("vision_mlp", "vision_embed"), use_bias=True, **init)
        self.to_tokens = CrossAttention(width, width // DOWNSAMPLE, heads, **init)
        norms = (LayerNorm(width, eps=config.decoder_norm_eps, **init) for _ in range(4))
        self.norm1, self.norm2, self.norm3, self.norm4 = norms

    def __call__(self, x, image, token_code, image_code, *, first: bool):
        """(tokens, image) after the block. The first block adds no codes in its first attention, and no residual."""
        if first:
            x = self.norm1(self.tokens(x, x, x))
        else:
            coded = x + token_code
            x = self.norm1(x + self.tokens(coded, coded, x))
        x = self.norm2(x + self.to_image(x + token_code, image + image_code, image))
        x = self.norm3(x + self.down(jax.nn.relu(self.up(x))))
        return x, self.norm4(image + self.to_tokens(image + image_code, x + token_code, x))


class Mlp(nnx.Module):
    """Dense layers `layer0`, `layer1`, ... with ReLU between them; widths: of the input and of every layer."""

    def __init__(self, widths: tuple[int, ...], *, rngs, param_dtype, stack: Stack = ()):
        self.num = len(widths) - 1
        for i, shape in enumerate(zip(widths, widths[1:], strict=False)):
            # The last layer may be as narrow as the number of masks.
            axes = ("vision_embed", "norm" if i == self.num - 1 else "vision_mlp")
            init = dict(use_bias=True, rngs=rngs, param_dtype=param_dtype, stack=stack)
            setattr(self, f"layer{i}", Dense("...d,df->...f", shape, axes, **init))

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num):
            x = getattr(self, f"layer{i}")(x if i == 0 else jax.nn.relu(x))
        return x


class Upscale(nnx.Module):
    """Every position becomes 2 x 2: float[B, h, w, Cin] to float[B, 2 h, 2 w, Cout]."""

    def __init__(self, inputs: int, outputs: int, *, rngs, param_dtype):
        axes = ("vision_embed", "patch", "patch", "norm")
        self.kernel = param(normal(inputs**-0.5), (inputs, 2, 2, outputs), axes, rngs=rngs, param_dtype=param_dtype)
        self.bias = param(constant(0.0), (outputs,), ("norm",), rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, _ = x.shape
        y = jnp.einsum("bhwi,iaco->bhawco", x, self.kernel[...].astype(x.dtype))
        return y.reshape(batch, 2 * height, 2 * width, -1) + self.bias[...].astype(x.dtype)


class MaskDecoder(nnx.Module):
    """Has the parameters of all masks; computes the first mask only."""

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        init = dict(rngs=rngs, param_dtype=param_dtype)
        self.config = config
        width, heads, masks = config.prompt_dim, config.num_decoder_heads, config.num_masks
        self.iou_token = param(normal(1.0), (width,), ("norm",), **init)
        self.mask_tokens = param(normal(1.0), (masks, width), ("pos", "norm"), **init)
        self.blocks = TwoWayBlock(config, stack=(config.num_decoder_layers,), **init)
        self.to_image = CrossAttention(width, width // DOWNSAMPLE, heads, **init)
        # Both norms have a fixed epsilon, whatever that of the blocks.
        self.norm = LayerNorm(width, eps=1e-5, **init)
        self.upscale1 = Upscale(width, width // 4, **init)
        self.upscale_norm = LayerNorm(width // 4, eps=1e-6, **init)
        self.upscale2 = Upscale(width // 4, width // 8, **init)
        self.mask_mlps = Mlp((width, width, width, width // 8), stack=(masks,), **init)
        self.iou_mlp = Mlp((width, *[config.iou_dim] * (config.num_iou_layers - 1), masks), **init)

    def __call__(self, image: jax.Array, image_code: jax.Array, prompts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(float32[B, 4 g, 4 g] logits of the mask, float32[B] its expected IoU).

        image: float[B, g, g, C] features with the dense prompt added. image_code: float[g, g, C] codes of positions.
        prompts: float[B, P, C] tokens.
        """
        batch, grid, _, width = image.shape
        outputs = jnp.concatenate([self.iou_token[...][None], self.mask_tokens[...]]).astype(image.dtype)
        outputs = jnp.broadcast_to(outputs, (batch, *outputs.shape))
        code = jnp.concatenate([outputs, prompts.astype(image.dtype)], axis=1)
        x, image_code = code, image_code.astype(image.dtype).reshape(1, grid * grid, width)
        image = image.reshape(batch, grid * grid, width)
        for layer in range(self.config.num_decoder_layers):
            x, image = _slice(self.blocks, layer)(x, image, code, image_code, first=layer == 0)
        x = self.norm(x + self.to_image(x + code, image + image_code, image))
        y = gelu(self.upscale_norm(self.upscale1(image.reshape(batch, grid, grid, width))))
        y = gelu(self.upscale2(y))
        weights = _slice(self.mask_mlps, 0)(x[:, 1])
        masks = jnp.einsum("bhwc,bc->bhw", y, weights, preferred_element_type=jnp.float32)
        return masks, self.iou_mlp(x[:, 0])[:, 0].astype(jnp.float32)


def _slice(blocks: nnx.Module, index: int) -> nnx.Module:
    """One module of a stack."""
    graphdef, params = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda w: w[index], params))
