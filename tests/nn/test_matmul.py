"""Products in 8 bits: their error is what rounding allows, gradients pass, and a model runs them where it should."""

import ast
import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.config import MODELS, ConfigError, MeshConfig, ModelConfig, RunConfig, TrainConfig, replace
from medcg_jax.config_checks import check
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import batch_sharding, make_mesh
from medcg_jax.nn import matmul
from medcg_jax.nn.layers import Dense
from medcg_jax.train.losses import token_loss
from medcg_jax.train.optim import hparams_from, make_optimizer, stack_hparams
from medcg_jax.train.step import make_step

pytest.importorskip("qwix", reason="qwix is not installed")
PACKAGE = Path(matmul.__file__).parents[1]
# Half a step of each kind, of a row's largest number (int8) or of the number itself (fp8: 3 bits of mantissa; what is
# below 2**-6 of the largest 448 has fewer).
HALF_STEP = {"int8": (0.5 / 127, 0.0), "fp8": (2**-10 / 448, 2**-4)}
# Equation, shapes: of projections to heads, back, and of the MLP.
EQUATIONS = [
    ("btd,dnh->btnh", (2, 3, 32), (32, 4, 8)),
    ("btnh,nhd->btd", (2, 3, 4, 8), (4, 8, 16)),
    ("btd,df->btf", (2, 3, 32), (32, 24)),
]


def draw(seed: int, shape, spread: float):
    """Normal numbers, times a power of ten for each place of the first two axes: rows and columns of unlike sizes."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-spread, spread, shape[:2] + (1,) * (len(shape) - 2))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def bound(kind: str, equation: str, x, w):
    """The most that rounding both sides may change each number of the result by."""
    left, right, out = equation.replace("->", ",").split(",")

    def step(value, letters):
        summed = tuple(axis for axis, letter in enumerate(letters) if letter not in out)
        of_largest, of_each = HALF_STEP[kind]
        return of_largest * np.abs(value).max(axis=summed, keepdims=True) + of_each * np.abs(value)

    dx, dw, ax, aw = step(x, left), step(w, right), np.abs(x), np.abs(w)
    total = np.einsum(equation, dx * np.ones_like(x), aw + dw) + np.einsum(equation, ax, dw * np.ones_like(w))
    return 1.01 * total + 1e-30


def check_product(product, kind: str, equation: str, x, w) -> None:
    exact = np.einsum(equation, x.astype(np.float64), w.astype(np.float64))
    found = np.asarray(product(kind, equation, x, w), np.float64)
    assert (np.abs(found - exact) <= bound(kind, equation, x, w)).all()
    # And it is not the exact product.
    assert np.abs(found - exact).max() > 1e-6 * np.abs(exact).max()


einsum = jax.jit(matmul.einsum, static_argnums=(0, 1))


@given(st.sampled_from(EQUATIONS), st.sampled_from(sorted(matmul.KINDS)), st.integers(0, 10**6), st.floats(0, 2))
@settings(max_examples=15, deadline=None)
def test_errors_are_within_what_rounding_allows(case, kind, seed, spread):
    equation, left, right = case
    # Sizes differ from row to row; along what is summed over they would make the bound worthless.
    check_product(einsum, kind, equation, draw(seed, left, spread), draw(seed + 1, right, 0.0))


def test_one_scale_for_the_whole_matrix_is_seen():
    def coarse(kind, equation, x, w):
        step = np.abs(x).max() / 127
        return np.einsum(equation, np.round(x / step) * step, w)

    with pytest.raises(AssertionError):
        check_product(coarse, "int8", EQUATIONS[2][0], draw(0, (2, 3, 32), 2.0), draw(1, (32, 24), 0.0))


@pytest.mark.parametrize("kind", matmul.KINDS)
def test_gradients(kind):
    """Of the activations within some percent; of the weights exact, given what comes in; of rows of zeros zero."""
    for equation, left, right in EQUATIONS:
        x, w = draw(2, left, 0.0), draw(3, right, 0.0)
        x[0, 0] = 0
        y, pull = jax.vjp(lambda x, w, e=equation: einsum(kind, e, x, w), x, w)
        y0, exact = jax.vjp(lambda x, w, e=equation: jnp.einsum(e, x, w), x, w)
        g = draw(4, y.shape, 0.0)
        g[1, 2] = 0
        (dx, dw), (dx0, dw0) = pull(g), exact(g)
        relative = np.linalg.norm(dx - dx0) / np.linalg.norm(dx0)
        assert 1e-4 < relative < {"int8": 0.02, "fp8": 0.08}[kind]
        assert not np.asarray(y)[0, 0].any() and not np.asarray(dx)[1, 2].any()
        assert np.allclose(dw, dw0, atol=1e-5)
        half = einsum(kind, equation, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
        assert half.dtype == jnp.bfloat16 and np.linalg.norm(half - y0) < 0.06 * np.linalg.norm(y0)


# ------------------------------------------------------------------ in models and steps


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("tiny")])
def test_every_family_takes_its_decoders_layers_and_nothing_else(name):
    for kind in ("", "int8"):
        ids = {"image_token_id": 100}
        ids |= {"at_token_id": 101, "box_token_id": 102} if name == "next_chat_tiny" else {}
        config = build.architecture(ModelConfig(name, matmul=kind), vocab_size=128, **ids)
        module = nnx.merge(*build.abstract(config))
        found = [(path, m.matmul) for path, m in nnx.iter_modules(module) if isinstance(m, Dense)]
        inside = {path for path, one in found if one}
        expected = {path for path, _ in found if path[0] == "decoder"} if kind else set()
        assert inside == expected and len(inside) != 1


CONFIG = llava15_tiny(
    64, 39, image_size_px=16, embed_dim=16, num_vision_layers=2, vision_mlp_dim=32, num_layers=2, mlp_dim=32,
    scan_unroll=1,
)  # fmt: skip
TRAIN = TrainConfig(learning_rate=1e-2, steps=10, batch_size=8)
TRAINABLE = ("projector", "decoder")


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 39, (8, 16)).astype(np.int32)
    tokens[:, 1 : 1 + CONFIG.num_image_tokens] = 39
    return {
        "tokens": tokens, "segment_ids": np.ones_like(tokens),
        "pixels": rng.integers(0, 256, (8, 1, 16, 16, 3)).astype(np.uint8),
        "target_positions": np.full((8, 2), (13, 14), np.int32), "target_weights": np.ones((8, 2), np.float32),
        "targets": rng.integers(3, 39, (8, 2)).astype(np.int32),
    }  # fmt: skip


def make(config, mesh_config=None, **fields):
    mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
    graphdef, params = build.create(config, mesh, seed=0)
    places = build.split_trainable(build.shardings(config, mesh), TRAINABLE)
    program = make_step(mesh, graphdef, *places, make_optimizer(TRAIN), **fields)
    return program, *build.split_trainable(params, TRAINABLE)


def losses(program, trainable, frozen, steps: int = 4) -> np.ndarray:
    """[steps, cells] where there are several."""
    hparams, rows = hparams_from(TRAIN, 1), batch()
    if (cells := program.num_cells) > 1:
        hparams, rows = stack_hparams([hparams] * cells), {key: np.stack([x] * cells) for key, x in rows.items()}
    state, rows = program.start(trainable), jax.device_put(rows, batch_sharding(program.mesh, cells=cells > 1))
    found = []
    for _ in range(steps):
        state, metrics = program(state, frozen, program.put_hparams(hparams), rows)
        found.append(np.asarray(metrics["loss"]))
    return np.stack(found)


@pytest.fixture(scope="module")
def exact():
    return losses(*make(CONFIG))


@pytest.mark.parametrize("kind", matmul.KINDS)
def test_a_step_learns_as_it_does_without(kind, exact):
    """Under the scan over layers and full remat, on one device, and on a mesh for two cells at once.

    Not the same on both: where sums in another order change a last digit, a number is rounded to the other side, and
    its row with it. Each is as near to the exact losses.
    """
    config = dataclasses.replace(CONFIG, matmul=kind, remat="full")
    alone = losses(*make(config))
    split = losses(*make(config, MeshConfig(cell=2, data=1, fsdp=2, tensor=2), num_cells=2))
    assert exact[-1] < exact[0] - 0.3 and (split[:, 0] == split[:, 1]).all()
    for found in (alone, split[:, 0]):
        assert 1e-5 < np.abs(found - exact).max() < {"int8": 0.02, "fp8": 0.1}[kind]


@pytest.mark.parametrize("kind", matmul.KINDS)
def test_products_of_a_step_are_of_eight_bits(kind):
    """In a layer seven forward and seven for the gradients of what comes in; without remat, and none without a kind."""

    def count(config) -> Counter:
        graphdef, params = build.abstract(config)

        def loss(params, rows):
            return token_loss(nnx.merge(graphdef, params), rows)[0]

        return Counter(dots(jax.make_jaxpr(jax.grad(loss))(params, batch()).jaxpr))

    forward, backward = (str(jnp.dtype(dtype)) for dtype in matmul.KINDS[kind])
    found = count(dataclasses.replace(CONFIG, matmul=kind))
    narrow = {pair: number for pair, number in found.items() if "8" in pair[0]}
    # Which side comes first is qwix's affair.
    assert {frozenset(pair) for pair in narrow} == {frozenset({forward}), frozenset({forward, backward})}
    assert sum(narrow.values()) == 14
    assert set(count(CONFIG)) == {("float32", "float32")}


def dots(jaxpr):
    """dtypes of both sides of every product in a jaxpr and what it calls; a loop's body counts once."""
    for one in jaxpr.eqns:
        if one.primitive.name == "dot_general":
            yield tuple(str(x.aval.dtype) for x in one.invars)
        for value in one.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    yield from dots(item)


# ------------------------------------------------------------------ as an option


def test_values_and_what_is_missing(monkeypatch):
    with pytest.raises(ConfigError, match="model.matmul='int4': expected one of .*int8, fp8"):
        check(replace(RunConfig(), model__matmul="int4"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="model.matmul='fp8' needs qwix, which is not installed: `pip install"):
        build.architecture(ModelConfig(matmul="fp8"), vocab_size=64, image_token_id=5)
    build.architecture(ModelConfig(), vocab_size=64, image_token_id=5)


def test_qwix_is_imported_where_it_is_used_alone():
    for path in PACKAGE.rglob("*.py"):
        names = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("qwix" in ast.unparse(node) for node in names), path
