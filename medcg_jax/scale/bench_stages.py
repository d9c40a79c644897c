"""The stages of `bench_gpu`: each finds out one thing, and writes it down as it goes."""

import contextlib
import gc
import importlib.util
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from medcg_jax.run_config import ModelConfig, TrainConfig
from medcg_jax.scale.bench_gpu import ROOT, write_json

# Text tokens of a row, least and most: Med-MAT's questions with LLaVA's system prompt.
TEXT_TOKENS = {"llava15_tiny": (24, 48)}
DEFAULT_TEXT_TOKENS = (64, 128)
NUM_TARGETS = 8
REPEATS = 5


def run(name: str, out: Path, model: str, batch_sizes: tuple[int, ...]) -> int:
    """Runs one stage; what it finds is in `out`, its error too. Returns the exit status."""
    found: dict = {}

    def save(**values) -> None:
        found.update(values)
        write_json(out, found)

    # The default three quarters of the memory would not hold the state of a 7B model on one device; the other
    # stages take only what they use, and leave the rest to the processes that they start.
    if name == "step":
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    stages: dict[str, Callable] = {"machine": machine, "step": step, "attention": attention, "parity": parity}
    try:
        stages[name](save, model, batch_sizes)
    except Exception as error:  # whatever it is, it belongs into the record
        traceback.print_exc()
        save(error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return 1
    return 0


def machine(save, model: str, batch_sizes) -> None:
    """Saves date, versions, devices and the memory that programs may use."""
    import jax

    from medcg_jax.scale.bench import about_here

    stats = jax.devices()[0].memory_stats() or {}
    about = about_here()
    save(platform=jax.default_backend(), memory_limit_bytes=stats.get("bytes_limit"), driver=driver(), **about)
    print(f"   {about['num_devices']} x {about['device']}, {about['versions']}")


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def step(save, model: str, batch_sizes) -> None:
    """Saves, for each batch size up to the first that does not fit, compile time, bytes, step time, rates and MFU.

    Where not even the smallest fits with everything trained that LLaVA trains, the projector alone is tried.
    """
    rows: list[dict] = []
    for trainable in (("projector", "decoder"), ("projector",)):
        for batch_size in batch_sizes:
            row = {"trainable": list(trainable), "batch_size": batch_size}
            rows.append(row)
            try:
                row |= time_step(model, trainable, batch_size)
            except Exception as error:  # jaxlib's own class; only memory is expected
                if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                    raise
                row["does_not_fit"] = " ".join(str(error).split())[:300]
            save(rows=rows)
            if "does_not_fit" in row:
                print(f"   batch {batch_size}: does not fit")
                break
        PORTS.clear()
        gc.collect()
        if any("step_s" in row for row in rows):
            return
    raise RuntimeError(f"no batch size of {batch_sizes} fits")


# The model and its state, made once and used for every batch size.
PORTS: dict = {}


def time_step(model: str, trainable: tuple[str, ...], batch_size: int) -> dict:
    """One row: the step with this batch size, timed `REPEATS` times."""
    from medcg_jax.mesh import make_mesh
    from medcg_jax.scale import bench

    settings = step_settings(model, trainable)
    if trainable not in PORTS:
        PORTS[trainable] = bench.Port(bench.architecture(settings), make_mesh(), TrainConfig(), settings)
    port = PORTS[trainable]
    batch = bench.example_batch(
        port.config, batch_size=batch_size, text_tokens=TEXT_TOKENS.get(model, DEFAULT_TEXT_TOKENS),
        num_targets=NUM_TARGETS,
    )  # fmt: skip
    compiled = port.compile(batch)
    times = bench.take_turns({"port": port.seconds}, REPEATS)["port"]
    needed = bench.step_flops(port.config, batch, trainable)
    peak = bench.memory(port.compiled.call)["peak_bytes"]
    row = compiled | {"peak_bytes": peak, "loss": port.loss}
    row |= bench.describe(batch) | bench.rates(times, batch, needed)
    if not math.isfinite(port.loss):
        raise RuntimeError(f"the loss of batch size {batch_size} is {port.loss} after random weights")
    gigabytes = (peak or compiled["program_bytes"] or 0) / 1e9
    print(f"   batch {batch_size}: {bench.line(row)}  {gigabytes:.1f} GB  compiled in {compiled['compile_s']:.0f} s",
          flush=True)  # fmt: skip
    return row


def step_settings(model: str, trainable: tuple[str, ...]) -> ModelConfig:
    if model == "llava15_tiny":
        return ModelConfig(name=model, trainable=trainable)
    return ModelConfig(name=model, compute_dtype="bfloat16", remat="full", trainable=trainable)


def attention(save, model: str, batch_sizes) -> None:
    """Saves which implementation "auto" takes here, how far it and its gradients are from plain, and both times.

    Reference: plain attention in float32 on the same bfloat16 numbers. Errors are the largest, over real positions,
    relative to the largest number of the reference; plain in bfloat16 beside it measures what is inevitable.
    """
    import jax
    import jax.numpy as jnp

    from medcg_jax.mesh import make_mesh
    from medcg_jax.nn.attention import attention as attend
    from medcg_jax.scale.bench import architecture, attention_in

    text = architecture(step_settings(model, ("decoder",))).text
    rows, length = 4, 704 if model != "llava15_tiny" else 64
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
            seconds = statistics.median(timed(lambda: jax.block_until_ready(compiled(*args))) for _ in range(10))
        values = {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}
        return values, {"uses": attention_in(compiled.as_text()), "forward_and_backward_s": seconds}

    with jax.default_matmul_precision("highest"):
        reference, _ = both("plain", jnp.float32)
    results = {}
    for implementation in ("auto", "plain"):
        values, found = both(implementation, jnp.bfloat16)
        errors = {
            name: float(jnp.abs(values[name] - right).max() / jnp.abs(right).max()) for name, right in reference.items()
        }
        results[implementation] = {**found, "relative_error": errors}
        print(f"   {implementation} ({found['uses']}): largest error {max(errors.values()):.2e} of the largest number, "
              f"{found['forward_and_backward_s'] * 1e3:.2f} ms", flush=True)  # fmt: skip
        save(shape=list(shape), dtype="bfloat16", results=results)


def timed(function: Callable) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def parity(save, model: str, batch_sizes) -> None:
    """Saves how far JAX on this device is from PyTorch on the CPU: stages, logits, loss, gradients, ten steps.

    Two tiny random models, one of them with grouped-query attention; then the tests of parity, where pytest is there.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        save(status="skipped", why=f"not installed: {', '.join(missing)}")
        return
    from medcg_jax.scale.parity import parity as compare

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
    tests = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*parity*.py"))]
    if tests and importlib.util.find_spec("pytest"):
        run_pytest(save, tests)


def write_tiny_reference(directory: Path, num_kv_heads: int) -> None:
    """A tiny HF model with random weights in `directory`, scaled so that its logits are of order 1 to 10."""
    import torch
    import transformers

    from medcg_jax.models.llava import llava15_tiny
    from medcg_jax.weights.llava import config_to_json

    config = llava15_tiny(vocab_size=128, image_token_id=127, num_kv_heads=num_kv_heads)
    torch.manual_seed(0)
    reference = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig.from_dict(config_to_json(config, "float32"))
    )
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    reference.save_pretrained(directory)


def run_pytest(save, tests: list[str]) -> None:
    import jax

    # Without this the tests' own settings would choose the CPU.
    platforms = "cuda,cpu" if jax.default_backend() == "gpu" else "cpu"
    env = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    tail = done.stdout.strip().splitlines()[-25:] or done.stderr.strip().splitlines()[-5:]
    print("\n".join(f"   {text}" for text in tail), flush=True)
    save(tests={"files": tests, "exit_status": done.returncode, "output": tail})
    if done.returncode:
        raise RuntimeError(f"parity tests: pytest ended with {done.returncode}: {tail[-1] if tail else 'no output'}")
