"""Plots of what `medcg bench` measured, of one or several of its JSON files: ratios to the reference, and samples/s."""

from pathlib import Path

import numpy as np

from medcg_jax.config import ConfigError
from medcg_jax.study.report.escape import one_line, short_label
from medcg_jax.study.report.page import added_files
from medcg_jax.study.report.plots import BLUE, GREEN, GREY, INK, ORANGE, PINK, PURPLE, RED, SKY, draw
from medcg_jax.untrusted import FileError, check_number, read_json, shown

# A result has some 20 kB.
MAX_RESULT_BYTES = 2**24
COLOURS = (BLUE, ORANGE, GREEN, SKY, RED, PINK, PURPLE, GREY)
# Ratio -> what it compares.
RATIOS = {
    "train_vs_eager": "training step / HF eager",
    "train_vs_compile": "training step / HF compiled",
    "train_vs_flash": "training step / HF FlashAttention",
    "eval_vs_forward": "letters / HF forward",
    "eval_vs_generate": "letters / HF generate",
    "generate_vs_generate": "generation / HF generate",
}
RUNNERS = (
    "port", "torch eager", "torch compile", "torch eager flash", "port letters", "port generate", "torch forward",
    "torch generate",
)  # fmt: skip


def write_plots(files: list[Path], out: Path | None = None) -> list[Path]:
    """Draws `bench_ratios` and `bench_throughput` (png and svg) of the files into `out` (None: beside the first file).

    Returns the files written; the plot of ratios is left out where no file has any.

    Raises:
      ConfigError: a file that is no result of `medcg bench`, or files with neither ratios nor a training step.
    """
    results = {label: result for label, result in _labelled([(path, read(path)) for path in files])}
    folder = out or files[0].parent
    with added_files(folder) as part:
        names = _draw(part, results)
    if not names:
        raise ConfigError(
            f"{', '.join(map(str, files))}: nothing to plot; results with the stage train, eval or generate are "
            "accepted"
        )
    return [folder / name for name in names]


def _draw(folder: Path, results: dict[str, dict]) -> list[str]:
    """Names of the files drawn."""
    written: list[str] = []
    names = [name for name in RATIOS if any(name in result["ratios"] for result in results.values())]
    if names:
        title = "Samples per second, this port over HF transformers"
        written += _save(folder, "bench_ratios", title, _height(names, results),
                         lambda axes: _ratios(axes, names, results))  # fmt: skip
    runners = [name for name in RUNNERS if any(name in rates(result) for result in results.values())]
    if runners:
        written += _save(folder, "bench_throughput", "Samples per second", _height(runners, results),
                         lambda axes: _throughput(axes, runners, results))  # fmt: skip
    return written


def read(path: Path) -> dict:
    """A result of `medcg bench`: its ratios, and of each runner the numbers that `rates` takes, are numbers.

    Raises:
      FileError: the file holds something else.
    """
    result = read_json(path, max_bytes=MAX_RESULT_BYTES)
    if not {"ratios", "stages", "model"} <= set(result):
        raise FileError(f"{path} is no result of `medcg bench`, which has ratios, stages and model")
    for key in ("model", "device"):
        if not isinstance(result.get(key), str):
            raise FileError(f"{path}: {key}={shown(result.get(key))}: text is accepted")
    for name, ratio in _section(result, "ratios", path).items():
        _check_spread(ratio, f"{path}: ratios.{one_line(name)[:40]}")
        if ratio.get("by") not in ("cpu", "wall"):
            by = shown(ratio.get("by"))
            raise FileError(f"{path}: ratios.{one_line(name)[:40]}: by={by}: cpu or wall is accepted")
    for section in ("train", "answers"):
        if section in result:
            _check_runners(_section(result, section, path), _timed(result), f"{path}: {section}")
    if "train" in result:
        size = _section(result["train"], "batch", f"{path}: train").get("size")
        check_number(size, f"{path}: train.batch.size", least=1, whole=True)
    return result


def _section(value: dict, key: str, name: str | Path) -> dict:
    if not isinstance(value.get(key), dict):
        raise FileError(f"{name}: {key}={shown(value.get(key))}: an object is accepted")
    return value[key]


def _check_runners(section: dict, timed: str, name: str) -> None:
    for runner, row in _section(section, "runners", name).items():
        where = f"{name}.runners.{one_line(runner)[:40]}"
        if not isinstance(row, dict):
            raise FileError(f"{where}={shown(row)}: an object is accepted")
        check_number(row.get("num_samples"), f"{where}.num_samples", least=1, most=1e12)
        _check_spread(row.get(timed), f"{where}.{timed}")


def _check_spread(value: object, name: str) -> None:
    if not isinstance(value, dict):
        raise FileError(f"{name}={shown(value)}: an object with median, min and max is accepted")
    for key in ("median", "min", "max"):
        check_number(value.get(key), f"{name}.{key}", least=1e-12, most=1e12)
    if not value["min"] <= value["median"] <= value["max"]:
        raise FileError(f"{name}: median={value['median']:g} is not between {value['min']:g} and {value['max']:g}")


def _timed(result: dict) -> str:
    """The time that rates are by: a CPU's own seconds, elsewhere those that pass."""
    return "cpu_s" if result["device"].lower().startswith("cpu") else "step_s"


def rates(result: dict) -> dict[str, tuple[float, float, float]]:
    """Samples per CPU-second on a CPU, per second elsewhere, of each runner: (by the median, least, most)."""
    found = {}
    for section in ("train", "answers"):
        for name, row in result.get(section, {}).get("runners", {}).items():
            step = row[_timed(result)]
            found[name] = tuple(row["num_samples"] / step[key] for key in ("median", "max", "min"))
    return found


def _labelled(results: list[tuple[Path, dict]]) -> list[tuple[str, dict]]:
    """A short name for each: the model with its batch, and the file's where that is not enough."""
    labels = [f"{r['model']}, batch {r['train']['batch']['size']}" if "train" in r else r["model"] for _, r in results]
    return [
        (label if labels.count(label) == 1 else f"{label} ({path.stem}, {place + 1})", result)
        for place, (label, (path, result)) in enumerate(zip(labels, results, strict=True))
    ]


def _height(names: list[str], results: dict) -> float:
    return 1.3 + len(names) * (0.16 + 0.2 * len(results))


def _save(folder: Path, name: str, title: str, height_in: float, paint) -> list[str]:
    draw(folder, name, title, "", height_in, paint, width_in=7.0)
    return [f"{name}.png", f"{name}.svg"]


def _bars(axes, names: list[str], results: dict, values: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    """Horizontal bars of (middle, least, most) for each name, one beside the other for the results."""
    height = 0.8 / len(results)
    for place, label in enumerate(results):
        rows = [(i, values[label][name]) for i, name in enumerate(names) if name in values[label]]
        at = np.array([i for i, _ in rows]) + (place - (len(results) - 1) / 2) * height
        middle, least, most = np.array([row for _, row in rows]).reshape(-1, 3).T
        axes.barh(at, middle, 0.85 * height, color=COLOURS[place % len(COLOURS)], label=short_label(label))
        within = [middle - least, most - middle]
        axes.errorbar(middle, at, xerr=within, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
        for y, x, end in zip(at, middle, most, strict=True):
            at_end = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
            behind = dict(facecolor="#ffffff", edgecolor="none", pad=0.5)
            axes.annotate(f"{x:.3g}", (end, y), **at_end, bbox=behind)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    if len(results) > 1:
        axes.figure.legend(loc="outside lower center", ncols=2)


def _ratios(axes, names: list[str], results: dict) -> None:
    values = {
        label: {name: tuple(row[key] for key in ("median", "min", "max")) for name, row in result["ratios"].items()}
        for label, result in results.items()
    }
    _bars(axes, names, results, values)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), [RATIOS[name] for name in names])
    by = {row["by"] for result in results.values() for row in result["ratios"].values()}
    axes.set_xlabel(f"above 1 the port is faster; per {_unit(by)}, median with least and most of the pairs")


def _throughput(axes, names: list[str], results: dict) -> None:
    _bars(axes, names, results, {label: rates(result) for label, result in results.items()})
    axes.set_yticks(range(len(names)), names)
    by = {"cpu" if result["device"].lower().startswith("cpu") else "wall" for result in results.values()}
    axes.set_xlabel(f"samples per {_unit(by)}, by the median step, with the slowest and the fastest")


def _unit(by: set[str]) -> str:
    return {frozenset({"cpu"}): "CPU-second", frozenset({"wall"}): "second"}.get(frozenset(by), "CPU-second or second")
