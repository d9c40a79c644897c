"""Plots of one or several results of `medcg bench`: ratios to the reference, and samples/s."""

from functools import partial
from pathlib import Path

import numpy as np

from medcg_jax.config import ConfigError
from medcg_jax.study.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PINK, PURPLE, RED, SKY, draw
from medcg_jax.study.report.escape import one_line, short_label
from medcg_jax.study.report.page import added_files
from medcg_jax.untrusted import FileError, check_number, read_json, shown

# A result file has some 20 kB.
MAX_RESULT_BYTES = 2**24
BAR_COLOURS = (BLUE, ORANGE, GREEN, SKY, RED, PINK, PURPLE, GREY)
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
UNITS = {"cpu": "CPU-second", "wall": "second"}
# Label of a result -> name of a bar -> (middle, minimum, maximum).
Bars = dict[str, dict[str, tuple[float, float, float]]]


def write_plots(files: list[Path], out: Path | None = None) -> list[Path]:
    """Draws `bench_ratios` and `bench_throughput` (png and svg) of the files into `out` (None: beside the first file).

    Returns the files written; the plot of ratios is left out where no file has any.

    Raises:
      ConfigError: a file is no result of `medcg bench`, or no file has ratios or a training step.
    """
    results = labelled(files)
    ratios = {
        label: {name: (row["median"], row["min"], row["max"]) for name, row in result["ratios"].items()}
        for label, result in results.items()
    }
    ratios_by = {row["by"] for result in results.values() for row in result["ratios"].values()}
    rates_by = {"cpu" if timed(result) == "cpu_s" else "wall" for result in results.values()}
    ratio_axis = f"above 1 the port is faster; per {_unit(ratios_by)}, median with least and most of the pairs"
    rate_axis = f"samples per {_unit(rates_by)}, by the median step, with the slowest and the fastest"
    by_runner = {label: rates(result) for label, result in results.items()}
    runners = {name: name for name in RUNNERS}
    plots = (
        ("bench_ratios", "Samples per second, this port over HF transformers", RATIOS, ratios, ratio_axis),
        ("bench_throughput", "Samples per second", runners, by_runner, rate_axis),
    )
    folder, written = out or files[0].parent, []
    with added_files(folder) as draft:
        for name, title, words, values, x_label in plots:
            rows = {row: text for row, text in words.items() if any(row in bars for bars in values.values())}
            if rows:
                paint = partial(_paint, rows=rows, values=values, x_label=x_label, line_at_1=name == "bench_ratios")
                height_in = 1.3 + len(rows) * (0.16 + 0.2 * len(results))
                draw(draft, name, title, "", height_in, paint, width_in=7.0)
                written += [folder / f"{name}.png", folder / f"{name}.svg"]
    if not written:
        raise ConfigError(
            f"{', '.join(map(str, files))}: nothing to plot; expected results with the stage train, eval or generate"
        )
    return written


def labelled(files: list[Path]) -> dict[str, dict]:
    """Label -> result. A label is the model and its batch, with the file's name where it would occur twice."""
    results = [read(path) for path in files]
    labels = [f"{r['model']}, batch {r['train']['batch']['size']}" if "train" in r else r["model"] for r in results]
    return {
        label if labels.count(label) == 1 else f"{label} ({path.stem}, {number})": result
        for number, (label, path, result) in enumerate(zip(labels, files, results, strict=True), start=1)
    }


def read(path: Path) -> dict:
    """A result of `medcg bench`, with checked ratios and checked numbers for `rates`.

    Raises:
      FileError: the file holds something else.
    """
    result = read_json(path, max_bytes=MAX_RESULT_BYTES)
    if not {"ratios", "stages", "model"} <= set(result):
        raise FileError(f"{path} is no result of `medcg bench`, which has ratios, stages and model")
    for key in ("model", "device"):
        if not isinstance(result.get(key), str):
            raise FileError(f"{path}: {key}={shown(result.get(key))}: expected text")
    for name, ratio in _object(result, "ratios", path).items():
        where = f"{path}: ratios.{one_line(name)[:40]}"
        _check_spread(ratio, where)
        if ratio.get("by") not in UNITS:
            raise FileError(f"{where}: by={shown(ratio.get('by'))}: expected 'cpu' or 'wall'")
    for section in [name for name in ("train", "answers") if name in result]:
        name = f"{path}: {section}"
        for runner, row in _object(_object(result, section, path), "runners", name).items():
            where = f"{name}.runners.{one_line(runner)[:40]}"
            if not isinstance(row, dict):
                raise FileError(f"{where}={shown(row)}: expected an object")
            check_number(row.get("num_samples"), f"{where}.num_samples", least=1, most=1e12)
            _check_spread(row.get(timed(result)), f"{where}.{timed(result)}")
    if "train" in result:
        size = _object(result["train"], "batch", f"{path}: train").get("size")
        check_number(size, f"{path}: train.batch.size", least=1, whole=True)
    return result


def _object(value: dict, key: str, name: str | Path) -> dict:
    if not isinstance(value.get(key), dict):
        raise FileError(f"{name}: {key}={shown(value.get(key))}: expected an object")
    return value[key]


def _check_spread(value: object, name: str) -> None:
    if not isinstance(value, dict):
        raise FileError(f"{name}={shown(value)}: expected an object with median, min and max")
    for key in ("median", "min", "max"):
        check_number(value.get(key), f"{name}.{key}", least=1e-12, most=1e12)
    if not value["min"] <= value["median"] <= value["max"]:
        raise FileError(f"{name}: median={value['median']:g} is not between {value['min']:g} and {value['max']:g}")


def timed(result: dict) -> str:
    """The key of the time behind rates: CPU-seconds on a CPU, else seconds."""
    return "cpu_s" if result["device"].lower().startswith("cpu") else "step_s"


def rates(result: dict) -> dict[str, tuple[float, float, float]]:
    """Runner -> samples per CPU-second on a CPU, else per second: (of the median, minimum, maximum)."""
    return {
        name: tuple(row["num_samples"] / row[timed(result)][key] for key in ("median", "max", "min"))
        for section in ("train", "answers")
        for name, row in result.get(section, {}).get("runners", {}).items()
    }


def _unit(by: set[str]) -> str:
    return UNITS[min(by)] if len(by) == 1 else "CPU-second or second"


def _paint(axes, rows: dict[str, str], values: Bars, x_label: str, line_at_1: bool) -> None:
    """Horizontal bars, grouped by row with a bar for each result. rows: name of a bar -> its label."""
    height = 0.8 / len(values)
    for number, (label, bars) in enumerate(values.items()):
        present = [(i, bars[name]) for i, name in enumerate(rows) if name in bars]
        y_of_bars = np.array([i for i, _ in present]) + (number - (len(values) - 1) / 2) * height
        middle, least, most = np.array([bar for _, bar in present]).reshape(-1, 3).T
        colour = BAR_COLOURS[number % len(BAR_COLOURS)]
        axes.barh(y_of_bars, middle, 0.85 * height, color=colour, label=short_label(label))
        spread = [middle - least, most - middle]
        axes.errorbar(middle, y_of_bars, xerr=spread, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
        for y, x, end in zip(y_of_bars, middle, most, strict=True):
            box = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.5}
            axes.annotate(
                f"{x:.3g}", (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box
            )
    if line_at_1:
        axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.set_xlabel(x_label)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    if len(values) > 1:
        axes.figure.legend(loc="outside lower center", ncols=2)
