"""NExT-Chat's losses and gradients against arrays recorded from the original code: text and boxes, and masks.

The folder is that of `parity_golden_next`.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.next_chat.model import NextChatConfig
from medcg_jax.families.weights import engine, next_chat
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.parity.golden_next_data import TOLERANCE, Arrays, batch_of, golden_row, mask_batch
from medcg_jax.parity.rows import Row, read_arrays
from medcg_jax.train import losses

# Of the masks' gradients, sums over a million pixels, and of norms that the original summed up in float32.
LONG_SUM_TOLERANCE = 1e-4
STAGES = {"base": ("projector", "decoder", "boxes"), "mask": ("mask_prompt", "mask_decoder")}


def base_loss_rows(folder: Path, graphdef, params) -> list[Row]:
    """Losses and gradients: the original's with either mock row, and those of the real rows alone, term by term."""
    inputs, expected = read_arrays(folder / "inputs.npz"), read_arrays(folder / "expected_base.npz")
    grads, names = read_arrays(folder / "grads_base.npz"), list(losses.TERMS)
    weights = jnp.asarray(list(losses.TERMS.values()))
    config = nnx.merge(graphdef, params).config
    trainable, frozen = build.split_trainable(params, STAGES["base"])

    def terms(trainable, batch, quirks: bool):
        model = nnx.merge(graphdef, build.join(trainable, frozen))
        found = losses.box_terms(model, batch, original_loss_quirks=quirks)
        return jnp.stack([found[name] for name in names])

    def total(trainable, batch):
        found = terms(trainable, batch, True)
        return weights @ found, found

    rows = []
    original = jax.jit(jax.value_and_grad(total, has_aux=True))
    for mock in ("mock_valid", "mock_invalid"):
        (value, found), gradient = original(trainable, batch_of(config, inputs, "", f"{mock}_"))
        rows += _loss_rows(f"{mock}/loss_original/", expected, dict(zip(names, found, strict=True)), value)
        rows += _gradient_rows(f"{mock}/original/", grads, _by_name(config, gradient))
    found, gradients = jax.jit(partial(_jacobian, partial(terms, batch=batch_of(config, inputs, ""), quirks=False)))(
        trainable
    )
    for mock in ("mock_valid", "mock_invalid"):
        rows += _loss_rows(f"{mock}/loss_clean/", expected, dict(zip(names, found, strict=True)), weights @ found)
    whole = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), gradients)
    rows += _gradient_rows("clean/", grads, _by_name(config, whole))
    for i, name in enumerate(names):
        own = _by_name(config, jax.tree.map(lambda g, i=i: g[i], gradients))
        rows += _norm_rows(f"clean_norm/{name}/", grads, own)
    return rows


def _jacobian(function, params):
    """(function(params): float[K], its gradients with a leading axis K)."""
    values, pull = jax.vjp(function, params)
    return values, jax.vmap(lambda one: pull(one)[0])(jnp.eye(len(values)))


def _loss_rows(prefix: str, expected: Arrays, terms: dict, total) -> list[Row]:
    return [
        golden_row(prefix + name, value, expected[prefix + name]) for name, value in {**terms, "total": total}.items()
    ]


def mask_loss_rows(folder: Path, graphdef, params) -> list[Row]:
    """Terms, totals and gradients of the loss of stage 3, as the original computes it and as it is meant."""
    inputs, expected = read_arrays(folder / "inputs.npz"), read_arrays(folder / "expected_mask.npz")
    grads, config = read_arrays(folder / "grads_mask.npz"), nnx.merge(graphdef, params).config
    batch = mask_batch(config, inputs)
    rows = []
    trained, _ = build.split_trainable(params, STAGES["mask"])
    # CLIP has no gradient in the original: it runs outside of it.
    others = tuple(name for name in params if name not in ("vision", "unused"))
    trainable, frozen = build.split_trainable(params, others)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(trainable, quirks):
        model = nnx.merge(graphdef, build.join(trainable, frozen))
        terms = losses.mask_terms(model, batch, original_loss_quirks=quirks)
        return losses.mask_total(*terms), terms

    for kind in ("original", "fixed"):
        (total, (focal, dice, iou, weights)), gradients = loss(trainable, kind == "original")
        found = {"focal": focal[:, 0], "dice": dice[:, 0], "total": total}
        rows += [
            golden_row(f"mask/loss/{kind}/{name}", x, expected[f"loss/{kind}/{name}"]) for name, x in found.items()
        ]
        own = _by_name(config, gradients)
        # A buffer there, so no gradient was recorded; here none arrives.
        own = {name: g for name, g in own.items() if "positional_encoding" not in name or np.any(g)}
        ours = set(_by_name(config, trained))
        rows += _gradient_rows(f"{kind}/", grads, {name: g for name, g in own.items() if name in ours}, "mask/")
        rows += _norm_rows(f"{kind}_norm/", grads, {name: g for name, g in own.items() if name not in ours}, "mask/")
    rows.append(golden_row("mask/loss/iou", iou[:, 0] / weights.sum(), expected["loss/iou"]))
    return rows


def _by_name(config: NextChatConfig, state) -> Arrays:
    """The arrays of some of the submodules by the original's names and in its layout."""
    table = [entry for entry in next_chat.table(config) if entry.path[0] in state]
    return {next_chat.released_name(name): array for name, array in engine.store(table, state)[1]}


def _gradient_rows(prefix: str, recorded: Arrays, ours: Arrays, shown: str = "") -> list[Row]:
    """A row per tensor, relative to its largest recorded number: gradients may be far below 1 everywhere."""
    theirs = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    if set(theirs) != set(ours):
        raise WeightsError(f"{prefix}: tensors differ: {sorted(set(theirs) ^ set(ours))[:8]}")
    largest = {name: max(float(np.abs(value).max()), 1e-12) for name, value in theirs.items()}
    rows = []
    for name, value in theirs.items():
        # All keys moved alike change no attention: what is recorded for their bias is rounding of its weight's.
        scale = largest[name.replace("k_proj.bias", "k_proj.weight")]
        tolerance = LONG_SUM_TOLERANCE if shown else TOLERANCE
        rows.append(golden_row(shown + prefix + name, ours[name] / scale, value / scale, tolerance))
    return rows


def _norm_rows(prefix: str, recorded: Arrays, ours: Arrays, shown: str = "") -> list[Row]:
    norms = {name: np.linalg.norm(np.asarray(value, np.float64)) for name, value in ours.items()}
    return _gradient_rows(prefix, recorded, norms, shown)
