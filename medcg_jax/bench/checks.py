"""Stages about the machine, which need only jax, flax and optax: its rates, its attention, its numerics.

A stage is `stage(ask, save)`, in a process of its own (`run`).
"""

import contextlib
import importlib.util
import io
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.bench.clock import matrix_rate, memory_rate, seconds_of
from medcg_jax.bench.run import Ask
from medcg_jax.bench.steps import Port, architecture, example_batch
from medcg_jax.chips import peak_of
from medcg_jax.config import ModelConfig, TrainConfig, replace
from medcg_jax.families import build
from medcg_jax.families.llava.model import llava15_tiny
from medcg_jax.mesh import make_mesh, put_batch
from medcg_jax.nn.attention import attention as attend
from medcg_jax.plan.hlo import attention_in
from medcg_jax.plan.topology import about_here
from medcg_jax.train.optim import hparams_from

# Largest difference of the tiny model's numbers on a device from the CPU's, relative to the largest number. Two CPUs'
# orders of summation differ by 1e-6; bfloat16 has 8 bits, and there are ten steps.
NEAR, NEAR_16_BITS = 1e-4, 5e-2
NUM_STEPS = 10
# (rows, width, columns): squares, and a decoder's largest product at 32 rows of 704 tokens.
PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 16384), (22528, 4096, 11008))
TINY_PRODUCTS = ((128, 128, 128), (256, 256, 256))


def lacks_torch(save: Callable) -> bool:
    """Whether PyTorch or transformers is missing; if so, saves the status "skipped"."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        save(status="skipped", why=f"not installed: {', '.join(missing)}")
    return bool(missing)


def machine(ask: Ask, save: Callable) -> None:
    """Saves date, versions, devices, memory, and the best rates of bfloat16 products and of memory measured here."""
    device, tiny = jax.devices()[0], ask.run.model.name in build.TINY
    peak = peak_of(device.device_kind)
    save(
        about=about_here(), platform=jax.default_backend(), driver=driver(),
        memory_limit_bytes=(device.memory_stats() or {}).get("bytes_limit"),
        published_flops_per_s=peak and peak.bf16_flops_per_s,
        published_memory_bytes_per_s=peak and peak.memory_bytes_per_s,
    )  # fmt: skip
    save(matmul=matrix_rate("bfloat16", sizes=ask.matrix_sizes or (TINY_PRODUCTS if tiny else PRODUCTS)))
    save(memory_bytes_per_s=memory_rate(2**20 if tiny else 2**30))


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def attention(ask: Ask, save: Callable) -> None:
    """Saves which implementation "auto" chooses here, its errors and those of its gradients, and times; plain beside it.

    The reference is plain attention in float32 on the same bfloat16 numbers. Errors are the largest over real positions,
    relative to the reference's largest number; those of plain attention in bfloat16 show the inevitable rounding.
    """
    name = ask.run.model.name
    text = architecture(replace(ask.run.model, compute_dtype="bfloat16")).text
    rows, length = 4, 64 if name in build.TINY else 704
    shape = (rows, length, text.num_heads, text.head_dim)
    mesh = make_mesh(devices=jax.devices()[:1])
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, out_grad = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    lengths = length - 32 * jnp.arange(rows) // rows
    segment_ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
    real = segment_ids[..., None, None] != 0

    def both(implementation, dtype):
        def loss(q, k, v):
            out = attend(q, k, v, causal=True, segment_ids=segment_ids, implementation=implementation)
            return jnp.where(real, out.astype(jnp.float32) * out_grad.astype(jnp.float32), 0).sum(), out

        def run(q, k, v):
            (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
            return {"out": jnp.where(real, out, 0), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

        with jax.set_mesh(mesh):
            args = jax.device_put([x.astype(dtype) for x in (q, k, v)], jax.devices()[0])
            compiled = jax.jit(run).lower(*args).compile()
            values = jax.block_until_ready(compiled(*args))

            def steps(count):
                jax.block_until_ready([compiled(*args) for _ in range(count)])

            seconds = statistics.median(seconds_of(steps, 5))
        values = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
        return values, {"uses": attention_in(compiled.as_text() or ""), "forward_and_backward_s": seconds}

    with jax.default_matmul_precision("highest"):
        reference, _ = both("plain", jnp.float32)
    results: dict = {}
    for implementation in ("auto", "plain"):
        values, facts = both(implementation, jnp.bfloat16)
        errors = {
            name: float(jnp.abs(values[name] - right).max() / jnp.abs(right).max()) for name, right in reference.items()
        }
        results[implementation] = {**facts, "relative_error": errors}
        print(f"   {implementation} ({facts['uses']}): largest error {max(errors.values()):.2e} of the largest number, "
              f"{facts['forward_and_backward_s'] * 1e3:.2f} ms", flush=True)  # fmt: skip
        save(shape=list(shape), dtype="bfloat16", results=results)


def numerics(ask: Ask, save: Callable) -> None:
    """Saves how far the tiny model's losses, gradient norms and trained weights in ten steps are from the CPU's.

    The reference is the CPU in float32. Compared are float32 with full precision, float32 with JAX's default precision
    (TensorFloat-32 on some GPUs), and bfloat16 here and on the CPU; only the first and the third have a tolerance.
    """
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    reference = ten_steps(cpu, "float32", "highest")
    ways = {
        "float32": (here, "float32", "highest", NEAR),
        "bfloat16": (here, "bfloat16", None, NEAR_16_BITS),
        "float32, default products": (here, "float32", None, None),
        "bfloat16 on the CPU": (cpu, "bfloat16", None, None),
    }
    rows, wrong = {}, []
    for name, (device, dtype, precision, near) in ways.items():
        values = ten_steps(device, dtype, precision)
        differences = {key: farthest(values[key], reference[key]) for key in reference}
        rows[name] = {"device": device.device_kind, "tolerance": near, **differences}
        worst = max(differences, key=lambda key: differences[key])
        print(f"   {name} on {device.device_kind}: at most {differences[worst]:.1e} of the largest ({worst})",
              flush=True)  # fmt: skip
        save(steps=NUM_STEPS, rows=rows)
        # `not <=`: a NaN is wrong too.
        if near is not None and not max(differences.values()) <= near:
            wrong.append(f"{name}: {worst} {differences[worst]:.1e} above {near:.0e}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def ten_steps(device, dtype: str, precision: str | None) -> dict[str, Any]:
    """Losses and gradient norms of `NUM_STEPS` steps of the tiny model on a device, and the decoder's weights after
    them. First weights and batch are the same on every device."""
    model = ModelConfig(compute_dtype=dtype, trainable=("projector", "decoder"), scan_unroll=1)
    config = architecture(model)
    first = build.create(config, make_mesh(devices=jax.devices("cpu")[:1]), seed=0)[1]
    batch = example_batch(config, batch_size=4, text_tokens=(12, 24), num_targets=4)
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        train = TrainConfig(steps=NUM_STEPS, learning_rate=1e-3, warmup_frac=0.0)
        port = Port(config, make_mesh(devices=[device]), train, model)
        hparams = port.program.put_hparams(hparams_from(train, num_records=0))
        trainable, frozen = port.split(jax.device_put(first, build.shardings(config, port.mesh)))
        state, on_device = port.program.start(trainable), put_batch(batch, port.program.batch_sharding)
        losses, norms = [], []
        for _ in range(NUM_STEPS):
            state, metrics = port.program(state, frozen, hparams, on_device)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    weights = np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(state.params)])
    return {"losses": losses, "grad_norms": norms, "weights": weights}


def farthest(values, reference) -> float:
    """The largest difference, relative to the reference's largest number."""
    return float(np.abs(np.asarray(values) - np.asarray(reference)).max() / np.abs(np.asarray(reference)).max())


def parity(ask: Ask, save: Callable) -> None:
    """Saves how far JAX on this device is from PyTorch on the CPU: stages, logits, loss, gradients, ten steps.

    Two tiny random models, one of them with grouped-query attention.
    """
    if lacks_torch(save):
        return
    from medcg_jax.parity.verb import parity as compare

    models, wrong = {}, []
    for name, num_kv_heads in (("own_heads", 2), ("grouped_heads", 1)):
        with tempfile.TemporaryDirectory() as directory:
            write_tiny_reference(Path(directory), num_kv_heads)
            with contextlib.redirect_stdout(io.StringIO()):  # its table is in the record
                result = compare(Path(directory))
        rows = result["rows"]
        models[name] = result | {"src": f"random, {num_kv_heads} key heads"}
        wrong += [f"{name}: {row['stage']}" for row in rows if not row["ok"]]
        worst = max(rows, key=lambda row: row["difference"] / max(1.0, row["scale"]))
        within = sum(row["ok"] for row in rows)
        print(f"   {name}: {within} of {len(rows)} comparisons within tolerance; the farthest is {worst['stage']} "
              f"by {worst['difference']:.1e} of {worst['scale']:.3g}", flush=True)  # fmt: skip
        save(models=models)
    if wrong:
        raise RuntimeError(f"out of tolerance: {', '.join(wrong)}")


def write_tiny_reference(directory: Path, num_kv_heads: int) -> None:
    """A tiny HF model with random weights in `directory`, scaled so that its logits are of order 1 to 10."""
    import torch
    import transformers

    from medcg_jax.families.weights.llava import config_to_json

    config = llava15_tiny(vocab_size=128, image_token_id=127, num_kv_heads=num_kv_heads)
    torch.manual_seed(0)
    reference = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig.from_dict(config_to_json(config, "float32"))
    )
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    reference.save_pretrained(directory)
