"""Matrix products read from compiled programs: known programs, XLA's own count of each, and the calls of kernels."""

from math import prod

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.plan.hlo_products import products

LAYERS, ROWS, LENGTH, WIDTH = 5, 2, 24, 16
X = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32)
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)


def layer(x, w):
    """One product with the weights, and two of attention without a softmax."""
    y = jnp.tanh(x @ w)
    scores = jnp.tanh(jnp.einsum("btd,bsd->bts", y, y))
    return x + jnp.tanh(jnp.einsum("bts,bsd->btd", scores, y)), None


def flops_of(f, *args, **rest) -> int:
    return products(jax.jit(f).lower(*args).compile().as_text(), **rest).flops


WEIGHT_FLOPS, PAIR_FLOPS = 2 * ROWS * LENGTH * WIDTH**2, 2 * ROWS * LENGTH**2 * WIDTH
FORWARD = LAYERS * (WEIGHT_FLOPS + 2 * PAIR_FLOPS)


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_of_products_forward_backward_and_again(remat):
    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer

    def loss(x, weights):
        return jax.lax.scan(body, x, weights)[0].sum()

    assert flops_of(loss, X, WEIGHTS) == FORWARD
    assert flops_of(jax.value_and_grad(loss, argnums=(0, 1)), X, WEIGHTS) == FORWARD * (4 if remat else 3)
    # The weights alone: the product that gives the gradient of the first layer's input is in the loop all the same.
    assert flops_of(jax.grad(loss, argnums=1), X, WEIGHTS) == FORWARD * (4 if remat else 3)


def test_work_done_twice_is_seen():
    """The planted fault: every layer's product is made a second time, of other numbers so that nothing is shared."""

    def wasteful(x, w):
        return layer(x, w)[0] + 1e-3 * ((x + 1.0) @ w), None

    def forward(body):
        return flops_of(lambda x, weights: jax.lax.scan(body, x, weights)[0], X, WEIGHTS)

    assert forward(wasteful) == forward(layer) + LAYERS * WEIGHT_FLOPS


def test_loops_in_loops_and_loops_without_an_end():
    def twice(x, weights):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.scan(layer, x, weights)[0], x)

    assert flops_of(twice, X, WEIGHTS) == 3 * FORWARD

    def until(x, weights):
        return jax.lax.while_loop(lambda x: x.sum() > -1e3, lambda x: jax.lax.scan(layer, x, weights)[0], x)

    assert flops_of(until, X, WEIGHTS, open_trips=7) == 7 * FORWARD
    with pytest.raises(ValueError, match="unknown trips"):
        flops_of(until, X, WEIGHTS)


def test_both_branches_count():
    def either(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: jnp.tanh(x) @ w @ w)

    assert flops_of(either, X, jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)) == 3 * WEIGHT_FLOPS


def test_what_no_program_is_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        products("")


# ------------------------------------------------------------------ against XLA's count of one product


def both_counts(f, *shapes) -> tuple[int, float]:
    """(ours, XLA's) of a program as it was lowered, without anything that XLA counts beside the product."""
    lowered = jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return products(lowered.as_text(dialect="hlo")).flops, lowered.cost_analysis().get("flops", 0)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_dot_is_counted_as_xla_counts_it(data):
    sizes = {letter: data.draw(st.integers(1, 5)) for letter in "abcdef"}
    left, right = (data.draw(st.permutations("abcdef")) for _ in range(2))
    left, right = left[: data.draw(st.integers(1, 4))], right[: data.draw(st.integers(1, 4))]
    shared = set(left) & set(right)
    out = "".join(x for x in left + right if x not in shared or data.draw(st.booleans()))
    out = "".join(dict.fromkeys(out))
    # A letter of one side alone that is not in the result would be a sum, and no product's.
    equation = f"{''.join(left)},{''.join(right)}->{out}"
    shapes = [tuple(sizes[x] for x in side) for side in (left, right)]
    ours, _ = both_counts(lambda x, y: jnp.einsum(equation, x, y), *shapes)
    assert ours in (0, 2 * prod(sizes[x] for x in {*left, *right}))
    # jax writes a product without a sum as a multiplication.
    assert ours or not set(left) & set(right) - set(out)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 9), kernel=st.integers(1, 5), stride=st.integers(1, 4), hole=st.integers(1, 3),
    gap=st.integers(1, 3), low=st.integers(0, 6), high=st.integers(0, 6), groups=st.sampled_from((1, 3)),
    grouped=st.sampled_from(("feature_group_count", "batch_group_count")),
)  # fmt: skip
def test_any_convolution_is_counted_as_xla_counts_it(length, kernel, stride, hole, gap, low, high, groups, grouped):
    """Padding and the holes of a dilated side are no products: so a TPU writes a batched product."""
    if (length - 1) * gap + 1 + low + high < (kernel - 1) * hole + 1:
        return
    batch, features = 2 * (groups if grouped == "batch_group_count" else 1), 3
    fan_in = features // groups if grouped == "feature_group_count" else features

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, 1), ((low, high), (0, 0)), lhs_dilation=(gap, 1), rhs_dilation=(hole, 1),
            dimension_numbers=("HWNC", "HWIO", "NHWC"), **{grouped: groups},
        )  # fmt: skip

    ours, theirs = both_counts(convolve, (length, 2, batch, features), (kernel, 2, fan_in, 6))
    assert ours == theirs


# ------------------------------------------------------------------ calls of kernels, as the compilers write them


def program(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_f, is_scheduled=true\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def parameters(*shapes: str) -> list[str]:
    return [f"%p.{i} = {shape} parameter({i})" for i, shape in enumerate(shapes)]


def call(name: str, shape: str, num: int, target: str, rest: str = "") -> str:
    given = ", ".join(("/*index=5*/" if i == 5 else "") + f"%p.{i}" for i in range(num))
    return f'%{name} = {shape} custom-call({given}), custom_call_target="{target}"{rest}'


@pytest.mark.parametrize("target", ["__cublas$lt$matmul", "__cublas$gemm"])
def test_cublas(target):
    config = (
        ', metadata={op_name="jit(f)/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
    )
    lines = parameters("bf16[4,24,32]{2,1,0}", "bf16[4,32,48]{2,1,0}")
    (found,) = products(program(*lines, call("g", "(bf16[4,24,48]{2,1,0}, s8[1024]{0})", 2, target, config))).counted
    assert (found.kind, found.total, found.where) == ("gemm", 2 * 4 * 24 * 48 * 32, "jit(f)/dot_general")
    with pytest.raises(ValueError, match="unknown product"):
        products(program(*lines, call("g", "(bf16[4,24,48]{2,1,0}, s8[1024]{0})", 2, target)))


@pytest.mark.parametrize(
    ("target", "mask", "count"),
    [
        ("", "NO_MASK", 2), ("", "PADDING_CAUSAL", 1), ("", "CAUSAL", 1), ("", "PADDING", 2),
        ("Backward", "NO_MASK", 5), ("Backward", "PADDING_CAUSAL", 2.5),
    ],
)  # fmt: skip
def test_cudnn_attention(target, mask, count):
    lines = parameters(*["bf16[4,768,32,128]{3,2,1,0}"] * 3)
    config = (
        ', backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", '
        f'"dimensions": ["4", "32", "768", "768"]}}, "mask_type": "{mask}"}}}}'
    )
    line = call("a", "(bf16[4,32,768,128]{3,1,2,0}, u8[0]{0})", 3, f"__cudnn$fmhaSoftmax{target}", config)
    (found,) = products(program(*lines, line)).counted
    assert (found.kind, found.flops) == ("cudnn", count * 2 * 4 * 32 * 768 * 768 * 128)
    with pytest.raises(ValueError, match="unknown attention"):
        products(program(*lines, line.replace("mask_type", "masks")))


POSITIONS = {"fwd": "s32[768,128]{1,0}", "dq": "s32[768,128]{1,0}", "dkv": "s32[8,768]{1,0}"}


def splash(phase: str, *, causal: bool, rows: str = "", segmented: bool = True) -> str:
    head = f"bf16[{rows}16,768,128]{{2,1,0}}"
    shapes = ["s8[1,3,3]{2,1,0}", "s8[1,3,3]{2,1,0}", head, head, head]
    shapes += [f"s32[{rows}768,128]{{1,0}}", f"s32[{rows}8,768]{{1,0}}"] * segmented
    if phase != "fwd":  # logsumexp, the gradient of the output, and their products, by head
        shapes += [f"f32[{rows}16,8,768]{{2,1,0}}", head, f"f32[{rows}16,1,768]{{2,1,0}}"]
    shapes += [POSITIONS[phase]] * causal
    name = f"splash_mha_{phase}{'_segmented' if segmented else ''}_residuals.1"
    return program(*parameters(*shapes), call(name, f"(f32[256,128]{{1,0}}, {head})", len(shapes), "tpu_custom_call"))


@pytest.mark.parametrize(("phase", "count"), [("fwd", 2), ("dkv", 4), ("dq", 3)])
@pytest.mark.parametrize("segmented", [True, False])
def test_splash_attention(phase, count, segmented):
    square = count * 2 * 16 * 768 * 768 * 128
    (found,) = products(splash(phase, causal=False, segmented=segmented)).counted
    assert (found.kind, found.flops) == ("splash", square)
    # Six of nine blocks touch the diagonal or lie below it.
    assert products(splash(phase, causal=True, segmented=segmented)).flops == square * 6 // 9
    assert products(splash(phase, causal=True, rows="2,", segmented=segmented)).flops == 2 * square * 6 // 9


def test_splash_attention_of_other_arrays_is_an_error():
    with pytest.raises(ValueError, match="unknown splash"):
        products(splash("fwd", causal=True).replace("s8[1,3,3]", "s8[9]"))


def test_kernels_that_are_not_known_are_named():
    lines = parameters("bf16[8,8]{1,0}")
    known = call("a", "u32[8]{0}", 0, "AllocateBuffer")
    unknown = [call("fancy_kernel.3", "bf16[8,8]{1,0}", 1, "tpu_custom_call"), call("b", "f32[8]{0}", 1, "my$matmul")]
    found = products(program(*lines, known, *unknown))
    assert found.unread == ("tpu_custom_call (fancy_kernel)", "my$matmul") and not found.counted
