"""The page of one or several results of `medcg bench`: ratios to the reference, samples/s, and what was measured where."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medcg_jax.config import ConfigError
from medcg_jax.study.report.drawing import BLUE, GREY, INK, MUTED, ORANGE, SMALL_PT, Figure, beside, draw, legend
from medcg_jax.study.report.escape import one_line, short_label
from medcg_jax.study.report.folders import added_files, write_tables, write_text
from medcg_jax.study.report.layout import Section, page_html
from medcg_jax.study.report.table import Table
from medcg_jax.untrusted import FileError, check_number, read_json, shown

# A result file has some 20 kB.
MAX_RESULT_BYTES = 2**24
# Ratio -> what it compares.
RATIOS = {
    "train_vs_eager": "training step / HF eager",
    "train_vs_compile": "training step / HF compiled",
    "train_vs_flash": "training step / HF FlashAttention",
    "eval_vs_forward": "letters / HF forward",
    "eval_vs_generate": "letters / HF generate",
    "generate_vs_generate": "generation / HF generate",
}
# Section of a result -> (title, its runners in their order).
RUNNERS = {
    "train": ("Training", ("port", "torch eager", "torch compile", "torch eager flash")),
    "answers": ("Answers", ("port letters", "port generate", "torch forward", "torch generate")),
}
# Runner -> what it does.
DOES = {
    "port": "one training step of this port, as compiled by medcg train",
    "torch eager": "one training step of Hugging Face's model with fused AdamW",
    "torch compile": "the same by torch.compile",
    "torch eager flash": "the same with FlashAttention 2",
    "port letters": "which option's letter is likeliest, as medcg eval asks: nothing is generated",
    "port generate": "the same, and new tokens for every row",
    "torch forward": "Hugging Face's forward pass, the letters' probabilities taken from it",
    "torch generate": "Hugging Face's greedy generation with its cache",
}
UNITS = {"cpu": "CPU-second", "wall": "second"}
SIDES = {"port": ("this port", BLUE), "torch": ("PyTorch", ORANGE)}
DEFINED = (
    "The same model, batch and records on both sides, in one run, in turns. A training step is forward, backward and "
    "update; letters are the probabilities of the option letters, which is how the study reads an answer. Bars are "
    "medians, their lines the least and the most."
)


class Bar(NamedTuple):
    """label: beside the axis. side: key of `SIDES`. middle, least, most: of n measurements."""

    label: str
    side: str
    middle: float
    least: float
    most: float
    n: int


def write_bench_page(files: list[Path], out: Path | None = None) -> Path:
    """Writes `index.html` with its plots and tables into `out` (None: NAME_report beside the first file), and returns it.

    Raises:
      FileError: a file is no result of `medcg bench`.
      ConfigError: no file has ratios, a training step or answers.
    """
    results = labelled(files)
    folder = out or files[0].with_name(f"{files[0].stem}_report")
    tables = [table for table in (ratio_table(results), rate_table(results)) if table.rows]
    if not tables:
        raise ConfigError(
            f"{', '.join(map(str, files))}: nothing to plot; expected results with the stage train, eval or generate"
        )
    with added_files(folder) as draft:
        (draft / "plots").mkdir()
        write_tables(draft, tables)
        sections = [
            Section(
                id="ratios",
                title="This port over Hugging Face's PyTorch",
                paragraphs=[DEFINED],
                figures=ratio_plots(draft / "plots", results),
                tables=[t for t in tables if t.name == "ratios"],
            ),
            Section(
                id="rates",
                title="Samples per second",
                figures=rate_plots(draft / "plots", results),
                tables=[t for t in tables if t.name == "rates"],
            ),
            *(
                Section(
                    id=f"result-{number}",
                    title=f"How it was measured: {label}",
                    facts=facts(result, path),
                    items=[*texts_in(result, "notes"), *texts_in(result.get("conclusions"), "lines")],
                )
                for number, ((label, result), path) in enumerate(zip(results.items(), files, strict=True), 1)
            ),
        ]
        sub = "; ".join(dict.fromkeys(f"{label}: {where(result)}" for label, result in results.items()))
        text = page_html("Throughput, measured", sub, sections, title="medcg bench", tables=tables)
        write_text(draft / "index.html", text)
    return folder / "index.html"


def ratio_table(results: dict[str, dict]) -> Table:
    rows = [
        {"what": RATIOS.get(name, one_line(name)), "result": label, "ratio": f"{ratio['median']:.2f}"}
        | {"least": f"{ratio['min']:.2f}", "most": f"{ratio['max']:.2f}", "by": UNITS[ratio["by"]], "n": ratio.get("n")}
        for label, result in results.items()
        for name, ratio in result["ratios"].items()
    ]
    caption = (
        "Samples of this port over those of the reference in the same time; above 1 this port is faster. Median, least and "
        "most of n pairs of measurements. By CPU-second on a CPU, whose cores others share, else by second."
    )
    return Table("ratios", "Ratios", caption, rows, {"ratio": "Median", "by": "Per", "what": "Compared"})


def rate_table(results: dict[str, dict]) -> Table:
    rows = [
        {"runner": name, "result": label, "samples": f"{bar.middle:.1f}", "least": f"{bar.least:.1f}"}
        | {"most": f"{bar.most:.1f}", "step": f"{1e3 * row['step_s']['median']:.1f}", "n": bar.n or None}
        | {"does": DOES.get(name)}
        for label, result in results.items()
        for section in RUNNERS
        for name, row in result.get(section, {}).get("runners", {}).items()
        for bar in [bar_of(result, name, row)]
        if isinstance(row.get("step_s"), dict)
    ]
    caption = f"Samples per {_unit(results)}, and the wall time of a step in ms; median, least and most of n."
    titles = {"samples": "Samples/s", "step": "ms a step", "does": "What it does"}
    return Table("rates", "Every runner", caption, rows, titles)


def ratio_plots(folder: Path, results: dict[str, dict]) -> list[Figure]:
    bars = [
        Bar(
            f"{RATIOS.get(name, one_line(name))}, {short}",
            "port",
            *(ratio[key] for key in ("median", "min", "max")),
            ratio.get("n") or 0,
        )
        for name in dict.fromkeys([*RATIOS, *(name for result in results.values() for name in result["ratios"])])
        for short, result in short_labels(results).items()
        if (ratio := result["ratios"].get(name))
    ]
    axis = f"times the reference's samples per {_unit(results)}"
    caption = "Above 1 this port is faster; bar: median, line: least to most."
    return _drawn(folder, "bench_ratios", "This port over PyTorch", caption, bars, axis, results, line_at_1=True)


def rate_plots(folder: Path, results: dict[str, dict]) -> list[Figure]:
    """Training and answers each in a plot of its own: their samples are not the same work."""
    figures = []
    for section, (title, runners) in RUNNERS.items():
        bars = [
            bar_of(result, name, row)._replace(label=f"{name}, {short}")
            for name in runners
            for short, result in short_labels(results).items()
            if (row := result.get(section, {}).get("runners", {}).get(name))
        ]
        caption = f"{title}: samples per {_unit(results)}; bar: the median step, line: the slowest to the fastest."
        name = f"bench_{section}"
        figures += _drawn(folder, name, f"{title}, samples per {_unit(results)}", caption, bars, "samples", results)
    return figures


def _drawn(folder, name, title, caption, bars, axis, results, *, line_at_1: bool = False) -> list[Figure]:
    if not bars:
        return []
    machines = "; ".join(dict.fromkeys(where(result) for result in results.values()))
    paint = partial(_paint, bars=bars, x_label=f"{axis}\n{short_label(machines, 90)}", line_at_1=line_at_1)
    return [draw(folder, name, title, f"{caption} {machines}.", 1.5 + 0.5 * len(bars), paint)]


def labelled(files: list[Path]) -> dict[str, dict]:
    """Label -> result. A label is the model and its batch, with the file's name where it would occur twice."""
    results = [read(path) for path in files]
    labels = [f"{r['model']}, batch {r['train']['batch']['size']}" if "train" in r else r["model"] for r in results]
    return {
        label if labels.count(label) == 1 else f"{label} ({path.stem}, {number})": result
        for number, (label, path, result) in enumerate(zip(labels, files, results, strict=True), start=1)
    }


def short_labels(results: dict[str, dict]) -> dict[str, dict]:
    """The labels without the model, where all have the same."""
    models = {result["model"] for result in results.values()}
    prefix = f"{models.pop()}, " if len(models) == 1 else ""
    return {label.removeprefix(prefix): result for label, result in results.items()}


def read(path: Path) -> dict:
    """A result of `medcg bench`, with checked ratios and checked numbers for `bar_of`.

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


def bar_of(result: dict, name: str, row: dict) -> Bar:
    """A runner's samples per CPU-second on a CPU, else per second: of the median, slowest and fastest step."""
    times = row[timed(result)]
    middle, least, most = (row["num_samples"] / times[key] for key in ("median", "max", "min"))
    number = times.get("n")
    return Bar(name, name.partition(" ")[0], middle, least, most, number if isinstance(number, int) else 0)


def where(result: dict) -> str:
    """Such as "2 x NVIDIA H200, bfloat16, jax 0.10.2, torch 2.13.0"."""
    versions = result.get("versions")
    packages = [
        f"{name} {one_line(versions[name])}"
        for name in ("jax", "torch")
        if isinstance(versions, dict) and name in versions
    ]
    number = result.get("num_devices")
    devices = f"{number} x {result['device']}" if isinstance(number, int) and number > 1 else result["device"]
    return ", ".join([devices, *texts_in([result.get("compute_dtype")]), *packages])


def facts(result: dict, path: Path) -> list[tuple[str, str]]:
    """(name, text) of what the result says of itself."""
    texts = [("file", path.name), ("model", result["model"]), ("device", where(result))]
    texts += [(name, one_line(result[name])) for name in ("name", "date", "remat") if isinstance(result.get(name), str)]
    if isinstance(result.get("mesh"), dict):
        texts.append(("mesh", ", ".join(f"{one_line(axis)} {size}" for axis, size in result["mesh"].items())))
    if trained := texts_in(result.get("trainable")):
        texts.append(("trained parts", ", ".join(trained)))
    if "train" in result:
        batch = result["train"]["batch"]
        tokens = [
            f"{batch[key]} {words}"
            for key, words in (("length", "tokens a row"), ("real_tokens", "of them real in all"))
            if isinstance(batch.get(key), int)
        ]
        texts.append(("batch", ", ".join([f"{batch['size']} rows", *tokens])))
    if isinstance(result.get("versions"), dict):
        texts.append(("versions", ", ".join(f"{one_line(n)} {one_line(v)}" for n, v in result["versions"].items())))
    return texts


def texts_in(values: object, key: str = "") -> list[str]:
    """The texts of a list, or of that under a key of an object; [] of anything else."""
    if key:
        values = values.get(key) if isinstance(values, dict) else None
    return [one_line(value) for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _unit(results: dict[str, dict]) -> str:
    units = {UNITS["cpu" if timed(result) == "cpu_s" else "wall"] for result in results.values()}
    return " or ".join(sorted(units))


def _paint(axes, bars: Sequence[Bar], x_label: str, line_at_1: bool) -> str:
    """Horizontal bars, one below the other, in their sides' colours."""
    sides = list(dict.fromkeys(bar.side for bar in bars))
    for side in sides:
        words, colour = SIDES.get(side, (side, GREY))
        of_side = [(y, bar) for y, bar in enumerate(bars) if bar.side == side]
        axes.barh(
            [y for y, _ in of_side], [bar.middle for _, bar in of_side], 0.6, color=colour, label=short_label(words)
        )
    middle, least, most = np.array([bar[2:5] for bar in bars], float).reshape(-1, 3).T
    places = np.arange(len(bars))
    axes.errorbar(
        middle, places, xerr=[middle - least, most - middle], fmt="none", ecolor=INK, elinewidth=1, capsize=2.5
    )
    for y, bar in enumerate(bars):
        axes.text(
            1.02,
            y,
            f"{bar.middle:.3g}" if bar.middle >= 100 else f"{bar.middle:.2f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=SMALL_PT,
        )
    if line_at_1:
        axes.axvline(1.0, color=INK, linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    names = [beside(bar.label, f"n {bar.n}" if bar.n else "", 38) for bar in bars]
    axes.set_yticks(places, names, color=INK, fontsize=SMALL_PT)
    axes.set_xlabel(x_label, color=MUTED, fontsize=SMALL_PT)
    axes.grid(visible=False, axis="y")
    if len(sides) > 1:
        legend(axes, 2)
    return "; ".join(f"{bar.label} {bar.middle:.3g} ({bar.least:.3g} to {bar.most:.3g})" for bar in bars)
