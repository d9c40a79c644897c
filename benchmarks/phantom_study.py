"""The three worlds of the phantom study side by side.

`python -m benchmarks.phantom_study STUDY NEGATIVE NULL [--json=FILE] [--picture=FILE]`: the arguments are the workdirs of `configs/phantom.py:study`, `:negative` and `:null`. Printed as Markdown: each world's
verdict by table and direction, the accuracy of each arm beside its ceiling, the ablation beside its random removals, and
what the grid cost. The picture shows the arms of pairs in all three worlds. Everything is from the grids' own files.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks.records import write_record
from medcg_jax.study.report.drawing import BLUE, GREEN, GREY, INK, MUTED, ORANGE, RED, STYLE
from medcg_jax.study.report.load_grid import arm_name
from medcg_jax.study.stats.grid_files import read_cells, read_results, training_of
from medcg_jax.study.stats.paired import Unit, estimate
from medcg_jax.study.stats.results import read_config_file
from medcg_jax.study.stats.stats import summarise
from medcg_jax.train import goodput

WORLDS = {
    "study": "all three elements are needed",
    "negative": "the task is enough",
    "null": "nothing can be transferred",
}
# Arm of pairs -> (what it was trained on, colour), from the top of the picture to its foot.
BARS = {
    "baseline_plus": ("unrelated data", GREY),
    "words_only": ("the task elsewhere", RED),
    "single_1": ("first subset alone", GREEN),
    "single_2": ("second subset alone", ORANGE),
    "trained": ("both subsets", BLUE),
}


def world_figures(workdir: Path) -> dict:
    """What a grid shows and cost, for the record.

    {"verdicts": as of `stats.summarise`, "accuracy": [{"table", "part", "arm", "accuracy", "ci_low", "ci_high", "ceiling",
     "n"}], "ablation": [effects of the removals], "seeds": [7, 8, 9], "cells": 1662, "trainings": 1016,
     "process_s": 7800.0}               # the sum over processes of the time that each ran
    """
    config = read_config_file(workdir)
    summary = summarise(workdir)
    results, cells = read_results(workdir), read_cells(workdir, int(config["cells"]))
    time = goodput.summarise(goodput.read_starts(workdir / goodput.FILE))
    accuracy = []
    for line in summary["accuracy"]:
        units = [
            Unit(row["target"], row["seed"], row["n"], row["correct"], row["correct"])
            for row in results
            if (row["table"], row["arm"]) == (line["table"], line["arm"]) and line["part"] in ("", row["part"])
        ]
        low, high = estimate(units).interval()
        accuracy.append(line | {"ci_low": max(0.0, low), "ci_high": min(1.0, high)})
    return {
        "verdicts": summary["verdicts"],
        "accuracy": accuracy,
        "ablation": [effect for effect in summary["effects"] if effect["table"] == "ablation"],
        "seeds": sorted({row["seed"] for row in results}),
        "cells": len(cells),
        "trainings": len({training_of(cell) for cell in cells if cell["related"]}),
        "process_s": time["wall_s"],
    }


def markdown(worlds: Mapping[str, dict]) -> str:
    """The figures as Markdown tables."""
    parts = []
    for name, world in worlds.items():
        seeds, minutes = ", ".join(map(str, world["seeds"])), world["process_s"] / 60
        parts.append(
            f"## `:{name}`: {WORLDS[name]}\n\nSeeds {seeds}; {world['cells']:,} cells, {world['trainings']:,} trainings, "
            f"{minutes:.0f} minutes of processes."
        )
        parts.append(_verdict_table(world["verdicts"]))
        parts.append(_accuracy_table(world["accuracy"]))
        if world["ablation"]:
            parts.append(_ablation_table(world["ablation"]))
    return "\n\n".join(parts) + "\n"


def _verdict_table(verdicts: Sequence[dict]) -> str:
    most = max(len(line["over"]) for line in verdicts)
    singles = [f"single_{i + 1}" for i in range(most)]
    over = [f"over {arm_name(arm).lower()}" for arm in singles]
    titles = ["table, direction", "verdict", "p", "gain", *over, "interaction"]
    rows = [
        [_where(line), line["verdict"], _p(line["p_holm"]), _contrast(line["gain"])]
        + [_contrast(line["over"].get(arm)) for arm in singles]
        + [_contrast(line["interaction"])]
        for line in verdicts
    ]
    return _table(titles, rows)


def _accuracy_table(accuracy: Sequence[dict]) -> str:
    rows = [
        [_where(line), arm_name(line["arm"]), f"{line['accuracy']:.3f} [{line['ci_low']:.3f}, {line['ci_high']:.3f}]",
         f"{line['ceiling']:.3f}", f"{line['n']:,}"]
        for line in accuracy
        if not line["part"]
    ]  # fmt: skip
    return _table(["table", "arm", "accuracy", "ceiling", "n"], rows)


def _ablation_table(effects: Sequence[dict]) -> str:
    rows = [
        [f"{arm_name(effect['arm'])} - {arm_name(effect['against'])}", _contrast(effect), _p(effect["p_overall"])]
        for effect in effects
    ]
    return _table(["difference", "mean", "p"], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(line: Mapping) -> str:
    return ", ".join(filter(None, (line["table"], line["part"].replace("_", " "))))


def _p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _contrast(effect: Mapping | None) -> str:
    return f"{effect['mean']:+.3f} [{effect['ci_low']:+.3f}, {effect['ci_high']:+.3f}]" if effect else ""


def draw(worlds: Mapping[str, dict], path: Path) -> None:
    """The arms of pairs in each world, with their ceilings, as one picture."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(worlds), figsize=(9.2, 2.7), sharey=True, layout="constrained")
        for axes, (name, world) in zip(panels, worlds.items(), strict=True):
            arms = {line["arm"]: line for line in world["accuracy"] if (line["table"], line["part"]) == ("pairs", "")}
            for y, (arm, (_, colour)) in enumerate(BARS.items()):
                line = arms[arm]
                value, low, high, ceiling = (100 * line[key] for key in ("accuracy", "ci_low", "ci_high", "ceiling"))
                axes.barh(y, value, 0.62, color=colour)
                axes.plot([low, high], [y, y], color=INK, linewidth=1.4)
                axes.plot([ceiling] * 2, [y - 0.4, y + 0.4], color=MUTED, linewidth=1.4)
                axes.text(103, y, f"{value:.0f}", va="center", fontsize=9, color=INK)
            axes.axvline(50, color=INK, linestyle="--", linewidth=0.9)
            axes.set_xlim(0, 113)
            axes.set_xticks([0, 25, 50, 75, 100])
            axes.grid(False, axis="y")
            axes.set_xlabel("accuracy, %")
            verdict = next(line["verdict"] for line in world["verdicts"] if not line["part"])
            axes.set_title(f"{WORLDS[name].capitalize()}\nverdict: {verdict}", loc="left", fontsize=9.5, color=INK)
        panels[0].set_yticks(range(len(BARS)), [words for words, _ in BARS.values()], color=INK, fontsize=9.5)
        panels[0].invert_yaxis()
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in WORLDS:
        parser.add_argument(name, type=Path, help=f"workdir of configs/phantom.py:{name}")
    parser.add_argument("--json", default="", help="file for the figures")
    parser.add_argument("--picture", default="", help="PNG file for the picture")
    flags = parser.parse_args(argv)
    worlds = {name: world_figures(getattr(flags, name)) for name in WORLDS}
    print(markdown(worlds), end="")
    write_record(flags.json, worlds)
    if flags.picture:
        draw(worlds, Path(flags.picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
