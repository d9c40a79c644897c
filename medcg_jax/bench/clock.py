"""Measurements of a benchmark: wall and CPU time of runners that take turns, ratios, rates of products and memory."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Sizes of the square products: the largest takes about a second on two CPU cores, a few milliseconds on a GPU.
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "accelerator": (4096, 8192, 12288)}


@dataclass(frozen=True)
class Spent:
    """Seconds of the wall clock, of this process's CPU time (all threads), and of its ended children's CPU time."""

    wall_s: float
    cpu_s: float
    children_cpu_s: float = 0.0

    def since(self, began: "Spent", count: int = 1) -> "Spent":
        """The time from `began` to this, divided by `count`."""
        pairs = ((getattr(self, name), getattr(began, name)) for name in self.__dataclass_fields__)
        return Spent(*((after - before) / count for after, before in pairs))


def now() -> Spent:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(time.perf_counter(), time.process_time(), children.ru_utime + children.ru_stime)


def turns(
    runners: Mapping[str, Callable[[int], object]], repeats: int, steps: int = 0, *, clock: Callable[[], Spent] = now
) -> dict[str, list[Spent]]:
    """`repeats` times of a step of each runner; in every repeat all runners take their turn.

    runners: each takes a number of steps and returns when the last is finished. Each is first called twice to warm up.
    steps: in a turn; 0: for each runner as many as last about a second, at most 50.
    """
    numbers = {}
    for name, run in runners.items():
        run(1)  # warm: caches, lazy initialisation
        began = clock()
        run(1)
        numbers[name] = steps or min(50, max(1, round(1.0 / max(clock().since(began).wall_s, 1e-9))))
    spent: dict[str, list[Spent]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, run in runners.items():
            began = clock()
            run(numbers[name])
            spent[name].append(clock().since(began, numbers[name]))
    return spent


def spread(values: Sequence[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(ours: Sequence[Spent], theirs: Sequence[Spent], *, by: str) -> dict:
    """Ours over theirs in samples per CPU-second (by="cpu") or per second (by="wall"), for steps with equal samples.

    The spread over the repeats, whose pairs ran side by side; above 1 ours is faster. "wall" and "cpu" hold the spread
    by either time; "by" says which of the two stands at the top level.
    """
    both = {
        name: spread([getattr(t, field) / getattr(o, field) for o, t in zip(ours, theirs, strict=True)])
        for name, field in (("wall", "wall_s"), ("cpu", "cpu_s"))
    }
    return {**both[by], "by": by, **both}


def times(spent: Sequence[Spent], num_samples: int) -> dict:
    """Spread of a step's wall and CPU seconds, and samples per second of each from the medians."""
    wall, cpu = spread([s.wall_s for s in spent]), spread([s.cpu_s for s in spent])
    return {
        "step_s": wall,
        "cpu_s": cpu,
        "children_cpu_s": spread([s.children_cpu_s for s in spent]),
        "num_samples": num_samples,
        "samples_per_s": num_samples / wall["median"],
        "samples_per_cpu_s": num_samples / max(cpu["median"], 1e-9),
    }


def matrix_rate(dtype: str, *, sizes: Sequence[int | tuple[int, int, int]] = (), repeats: int = 5) -> dict:
    """FLOP/s that one device reaches in a product of two matrices: the best of `sizes` and repeats.

    {"flops_per_s", "flops_per_cpu_s", "size", "dtype", "by_size"}: the best rate by wall time, the best by this process's
    CPU time, and the size of the first. Products run back to back in JAX's default precision, as in a run.
    sizes: of square matrices, or (rows, width, columns); () takes `MATRIX_SIZES` of the platform.
    """
    platform = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    by_size, product = {}, jax.jit(jnp.matmul)
    for size in sizes or MATRIX_SIZES[platform]:
        rows, width, columns = size if isinstance(size, tuple) else (size,) * 3
        # Random numbers: with equal ones a GPU draws less power, and runs faster than in a model.
        keys = jax.random.split(jax.random.key(0))
        left = (jax.random.normal(keys[0], (rows, width)) * width**-0.5).astype(dtype)
        right = jax.random.normal(keys[1], (width, columns)).astype(dtype)

        def run(count, left=left, right=right):
            for _ in range(count):
                out = product(left, right)
            out.block_until_ready()

        # Many in a row on an accelerator, to hide the host's time.
        spent = turns({"product": run}, repeats, 0 if platform == "cpu" else 50)["product"]
        work = 2.0 * rows * width * columns
        name = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
        by_size[name] = {
            "flops_per_s": max(work / s.wall_s for s in spent),
            "flops_per_cpu_s": max(work / max(s.cpu_s, 1e-9) for s in spent),
        }
    best = max(by_size, key=lambda name: by_size[name]["flops_per_s"])
    by_cpu = max(row["flops_per_cpu_s"] for row in by_size.values())
    return {**by_size[best], "flops_per_cpu_s": by_cpu, "size": best, "dtype": dtype, "by_size": by_size}


def memory_rate(count: int) -> float:
    """Bytes/s, read and written together, of an addition to `count` float32 numbers; the best of five."""
    x, add = jnp.ones((count,), jnp.float32), jax.jit(lambda x: x + 1)

    def run(steps: int) -> None:
        for _ in range(steps):
            out = add(x)
        out.block_until_ready()

    return 8.0 * count / min(spent.wall_s for spent in turns({"add": run}, 5, 20)["add"])


def seconds_of(runner: Callable[[int], object], repeats: int) -> list[float]:
    """`repeats` wall seconds of a step of one runner, each measured over about a second (`turns`)."""
    return [spent.wall_s for spent in turns({"": runner}, repeats)[""]]
