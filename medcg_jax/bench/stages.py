"""The stages of `bench_gpu`: what each is given, how it writes down what it finds, and the first of them, the machine.

A stage is `stage(ask, save)`: it calls `save(name=value)` for everything as soon as it is known.
"""

import importlib
import math
import os
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medcg_jax.bench.gpu import write_json

# Stage -> its function, by module of this package.
WHERE = {
    "machine": "stages.machine",
    "train": "stage_train.train",
    "train_fp32": "stage_train.train_fp32",
    "lora": "stage_train.lora",
    "trace": "stage_best.trace",
    "flags": "stage_best.flags",
    "eval": "stage_eval.evaluate",
    "torch": "stage_torch.torch",
    "torch_fp32": "stage_torch.torch_fp32",
    "attention": "stage_checks.attention",
    "numerics": "stage_checks.numerics",
    "parity": "stage_checks.parity",
}
# Those whose arrays would not fit the three quarters of the memory that JAX takes by default.
WHOLE_DEVICE = ("train", "train_fp32", "lora", "trace", "flags", "eval")
MEMORY_FRACTION = "0.95"


@dataclass(frozen=True)
class Ask:
    """What a stage is asked.

    batches: batch sizes of the stage's first case, in place of its cases. limit_s: seconds that it has, from now.
    scratch: folder that the stages of one run share. so_far: what earlier stages found, by stage.
    """

    model: str
    batches: tuple[int, ...] = ()
    limit_s: float = math.inf
    scratch: Path = Path(".")
    so_far: dict = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.began)

    def matrix_rate(self) -> float | None:
        """FLOP/s of the best product that was measured on this machine in this run."""
        return self.so_far.get("machine", {}).get("matmul", {}).get("flops_per_s")


def run(name: str, out: Path, ask: Ask) -> int:
    """Runs one stage; what it finds is in `out`, its error too. Returns the exit status."""
    found: dict = {}

    def save(**values) -> None:
        found.update(values)
        write_json(out, found)

    prepare(name, ask)
    try:
        module, function = WHERE[name].split(".")
        getattr(importlib.import_module(f"medcg_jax.bench.{module}"), function)(ask, save)
    except Exception as error:  # whatever it is, it belongs into the record
        traceback.print_exc()
        save(error=f"{type(error).__name__}: {short(error)}")
        return 1
    return 0


def prepare(name: str, ask: Ask) -> None:
    """Sets what JAX and XLA read when they start, where the user has not."""
    if name in WHOLE_DEVICE:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    else:
        # Takes what it uses, and leaves the rest to PyTorch and to the processes that it starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A program that one stage has compiled is loaded by the next.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ask.scratch / "compiled"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def timed(function: Callable) -> float:
    """Seconds that a call took."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def short(error: BaseException | str, characters: int = 400) -> str:
    return " ".join(str(error).split())[:characters]


def out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def in_turn(ask: Ask, cases: Iterable, one: Callable, *, larger: Callable, save: Callable) -> list[dict]:
    """A row for every case: what `one(case, row)` adds to it as it goes, or why there is none. Each is saved at once.

    A case is left out where less time is left than the longest so far took, and where one that needs less memory did
    not fit: larger(case, other) says that `other` needs no less than `case`. Any other error is a row's own.
    """
    rows, too_large, longest = [], [], 0.0
    for case in cases:
        row = {"case": case.name}
        rows.append(row)
        if ask.left_s() < longest * 1.2 + 3:
            row["left_out"] = "no time left"
        elif any(larger(small, case) for small in too_large):
            row["left_out"] = "a smaller one did not fit"
        else:
            began = time.monotonic()
            try:
                one(case, row)
            except Exception as error:
                if out_of_memory(error):
                    row["does_not_fit"] = short(error, 300)
                else:
                    traceback.print_exc()
                    row["error"] = f"{type(error).__name__}: {short(error)}"
            if "does_not_fit" in row:
                too_large.append(case)
            longest = max(longest, time.monotonic() - began)
        why = next((f"{key.replace('_', ' ')}: {row[key]}"[:160] for key in
                    ("does_not_fit", "left_out", "error") if key in row), "")  # fmt: skip
        if why:
            print(f"   {case.name}: {why}", flush=True)
        save(rows=rows)
    return rows


def check_rows(rows: Sequence[dict]) -> None:
    """Raises RuntimeError where a row has an error, or where none of them was measured."""
    wrong = [f"{row['case']}: {row['error']}" for row in rows if "error" in row]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    if rows and all({"does_not_fit", "left_out"} & set(row) for row in rows):
        raise RuntimeError(f"nothing of {', '.join(row['case'] for row in rows)} could be run")


# ------------------------------------------------------------------ the machine

# Rows, width, and out: squares, and a decoder's largest product at 32 rows of 704 tokens.
PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 16384), (22528, 4096, 11008))
TINY_PRODUCTS = ((128, 128, 128), (256, 256, 256))


def machine(ask: Ask, save: Callable) -> None:
    """Saves date, versions, devices, memory, and the best rates of bfloat16 products and of memory measured here."""
    import jax

    from medcg_jax.bench.steps import about_here
    from medcg_jax.chips import peak_of

    device = jax.devices()[0]
    stats, about, peak = device.memory_stats() or {}, about_here(), peak_of(device.device_kind)
    save(platform=jax.default_backend(), memory_limit_bytes=stats.get("bytes_limit"), driver=driver(), **about)
    print(f"   {about['num_devices']} x {about['device']}, {about['versions']}", flush=True)
    tiny = ask.model == "llava15_tiny"
    found = matmul(TINY_PRODUCTS if tiny else PRODUCTS, save)
    published = peak and peak.bf16_flops_per_s
    of_peak = f", {found['flops_per_s'] / published:.1%} of the published {published / 1e12:.0f}" if published else ""
    print(f"   products in bfloat16: {found['flops_per_s'] / 1e12:.1f} TFLOP/s{of_peak}", flush=True)
    rate = memory_rate(2**20 if tiny else 2**30)
    save(memory_bytes_per_s=rate, published_flops_per_s=published,
         published_memory_bytes_per_s=peak and peak.memory_bytes_per_s)  # fmt: skip
    print(f"   memory, read and written: {rate / 1e12:.2f} TB/s", flush=True)


def matmul(shapes: Sequence[tuple[int, int, int]], save: Callable) -> dict:
    """{"flops_per_s" of the best, "shapes": {"MxKxN": FLOP/s}} of bfloat16 products, saved after each.

    Of random numbers: a GPU draws less power for constants, and is faster with them than a model ever is.
    """
    import jax
    import jax.numpy as jnp

    found: dict = {"flops_per_s": 0.0, "shapes": {}}
    product = jax.jit(lambda a, b: a @ b)
    for m, k, n in shapes:
        a, b = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(((m, k), (k, n))))
        work = 2.0 * m * k * n
        seconds = best_seconds(lambda a=a, b=b: product(a, b), at_least_s=0.3)
        found["shapes"][f"{m}x{k}x{n}"] = work / seconds
        found["flops_per_s"] = max(found["flops_per_s"], work / seconds)
        save(matmul=found)
    return found


def memory_rate(count: int) -> float:
    """Bytes/s that are read and written together by an addition to `count` float32 numbers."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((count,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 8.0 * count / best_seconds(lambda: add(x), at_least_s=0.2)


def best_seconds(call: Callable, *, at_least_s: float, repeats: int = 5) -> float:
    """Seconds of one call, of the best of `repeats` rows of calls which the host does not wait between."""
    import jax

    def row(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            out = call()
        jax.block_until_ready(out)
        return time.perf_counter() - began

    row(1)
    count = max(1, math.ceil(at_least_s / repeats / max(statistics.median(row(1) for _ in range(3)), 1e-6)))
    return min(row(count) for _ in range(repeats)) / count


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
