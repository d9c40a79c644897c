"""Plots of what `medcg bench` measured, of one or several of its JSON files: ratios to the reference, and samples/s."""

import json
from pathlib import Path

import numpy as np

from medcg_jax.run_config import ConfigError
from medcg_jax.study.report_plots import BLUE, GREEN, GREY, INK, ORANGE, PINK, PURPLE, RED, SKY, draw

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
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    names = [name for name in RATIOS if any(name in result["ratios"] for result in results.values())]
    if names:
        title = "Samples per second, this port over HF transformers"
        written += _save(folder, "bench_ratios", title, _height(names, results),
                         lambda axes: _ratios(axes, names, results))  # fmt: skip
    runners = [name for name in RUNNERS if any(name in rates(result) for result in results.values())]
    if runners:
        written += _save(folder, "bench_throughput", "Samples per second", _height(runners, results),
                         lambda axes: _throughput(axes, runners, results))  # fmt: skip
    if not written:
        named = ", ".join(map(str, files))
        raise ConfigError(f"{named}: nothing to plot; results with the stage train, eval or generate are accepted")
    return written


def read(path: Path) -> dict:
    """A result of `medcg bench`.

    Raises:
      ConfigError: the file holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or not {"ratios", "stages", "model"} <= set(result):
        raise ConfigError(f"{path} is no result of `medcg bench`, which has ratios, stages and model")
    return result


def rates(result: dict) -> dict[str, tuple[float, float, float]]:
    """Samples per CPU-second on a CPU, per second elsewhere, of each runner: (by the median, least, most)."""
    on_cpu = result["device"].lower().startswith("cpu")
    found = {}
    for section in ("train", "answers"):
        for name, row in result.get(section, {}).get("runners", {}).items():
            step = row["cpu_s" if on_cpu else "step_s"]
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


def _save(folder: Path, name: str, title: str, height_in: float, paint) -> list[Path]:
    draw(folder, name, title, "", height_in, paint, width_in=7.0)
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def _bars(axes, names: list[str], results: dict, values: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    """Horizontal bars of (middle, least, most) for each name, one beside the other for the results."""
    height = 0.8 / len(results)
    for place, label in enumerate(results):
        rows = [(i, values[label][name]) for i, name in enumerate(names) if name in values[label]]
        at = np.array([i for i, _ in rows]) + (place - (len(results) - 1) / 2) * height
        middle, least, most = np.array([row for _, row in rows]).reshape(-1, 3).T
        axes.barh(at, middle, 0.85 * height, color=COLOURS[place % len(COLOURS)], label=label)
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
