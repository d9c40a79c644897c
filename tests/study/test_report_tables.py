"""The report's tables against the files they are made of; CSV and LaTeX; published rows."""

import csv
import dataclasses
import json
import re
import shutil
from collections import defaultdict

import pytest
from report_grids import CELLS, RESULTS, make_grid, run_of, write_csv

from medcg_jax.config import TABLES
from medcg_jax.study.design import mat
from medcg_jax.study.report.escape import latex
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.page import write_report
from medcg_jax.study.report.published import context, published
from medcg_jax.study.report.samples import letters_table
from medcg_jax.study.report.tables import Column, Table, Tables
from medcg_jax.study.stats import stats

TARGETS = ("mri-brain-state", "endoscopy-lung-grade")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = run_of(study__tables=TABLES, study__targets=TARGETS, study__seeds=(0, 1))
    workdir = make_grid(tmp_path_factory.mktemp("tables") / "w", run)
    grid = Grid(workdir)
    return workdir, {table.name: table for table in Tables(grid, stats.summarise(workdir)).all()} | {
        "answers": letters_table(grid)
    }


def read(text: str) -> list[dict]:
    return list(csv.DictReader(text.splitlines()))


def test_accuracies_are_those_of_results_csv(made):
    workdir, tables = made
    sums = defaultdict(lambda: [0, 0])
    for row in read((workdir / "results.csv").read_text()):
        part = row["row"] if row["table"] == "multi_task" else row["row"].split("/")[0]
        name = "ablation" if row["table"] == "ablation" else f"{row['table']}_{part}"
        sums[name, row["target"], row["arm"]][0] += int(row["correct"])
        sums[name, row["target"], row["arm"]][1] += int(row["n"])
    seen = 0
    for (name, target, arm), (correct, n) in sums.items():
        if name.startswith(("efficiency", "multi_task_out_of_distribution/")):
            continue  # shown as means alone
        row = next(r for r in read(tables[name].csv()) if r["target"] == target)
        assert float(row[arm]) == pytest.approx(correct / n)
        assert (float(row[f"{arm}_low"]), float(row[f"{arm}_high"])) == pytest.approx(stats.wilson(correct, n))
        assert int(row[f"{arm}_n"]) == n
        seen += 1
    assert seen > 60


def test_p_values_and_colours_are_those_of_the_pairing(made):
    workdir, tables = made
    right = defaultdict(dict)
    for cell in read((workdir / "cells.csv").read_text()):
        if cell["row"] == "fixed_area/mri-brain-state":
            for line in (workdir / "predictions" / f"{cell['cell']}.jsonl").read_text().splitlines():
                record = json.loads(line)
                right[cell["arm"]][cell["seed"], record["id"]] = record["predicted"] == record["answer"]
    one = stats.compare(right["trained"], right["baseline_plus"])
    table = tables["pairs_fixed_area"]
    row = next(row for row in table.rows if row["target"] == "mri-brain-state")
    assert row["p_plus"] == pytest.approx(one.p)
    for place, row in enumerate(table.rows):
        trained, others = row["trained"].accuracy, [row[arm].accuracy for arm in ("baseline", "baseline_plus")]
        state = "win" if trained > max(others) else "loss" if trained < min(others) else "even"
        assert table.colours[place, "trained"].removesuffix("-sure") == state == row["mark"].removesuffix("-sure")


@pytest.mark.parametrize(
    ("found", "mark"),
    [
        ([(0.1, 0.01), (0.2, 0.01)], "win-sure"),
        ([(0.1, 0.01), (0.2, 0.3)], "win"),
        ([(0.1, 0.01), (-0.2, 0.01)], "even"),
        ([(-0.1, 0.01), (-0.2, 0.01)], "loss-sure"),
        ([(-0.1, 0.01), (-0.2, 0.2)], "loss"),
        ([(0.0, 1.0)], "even"),
        ([], None),
    ],
)
def test_marks(made, found, mark):
    tables = Tables(Grid(made[0]), {"rows": []})
    assert tables.mark([{"difference": d, "p_holm": p} for d, p in found] + [None]) == mark


def test_chance_is_of_the_options(made):
    chance = {row["target"]: row["chance"] for row in made[1]["ablation"].rows}
    assert chance == pytest.approx({"mri-brain-state": 0.5, "endoscopy-lung-grade": 0.25})


def test_how_letters_were_used(made):
    workdir, tables = made
    lines = [
        json.loads(line)
        for cell in read((workdir / "cells.csv").read_text())
        if (cell["table"], cell["arm"]) == ("pairs", "trained")
        for line in (workdir / "predictions" / f"{cell['cell']}.jsonl").read_text().splitlines()
    ]
    row = next(r for r in tables["answers"].rows if (r["table"], r["arm"]) == ("pairs", "Trained"))
    assert row["n"] == len(lines)
    assert row["letter_A"] == pytest.approx(sum(line["predicted"] == "A" for line in lines) / len(lines))
    assert sum(row[f"letter_{name}"] for name in "ABCD") == pytest.approx(1)
    assert row["unparsed"] == pytest.approx(sum(line["generated"] == "the image" for line in lines) / len(lines))
    assert 0 < row["unparsed"] < 0.2
    assert row["mass"] == pytest.approx(0.98, abs=0.01)
    assert row["generated"] < row["accuracy"]


def test_every_table_is_csv_and_latex(made):
    for table in made[1].values():
        rows = list(csv.reader(table.csv().splitlines()))
        assert len(rows) == len(table.rows) + 1 and len({len(row) for row in rows}) == 1
        text = table.latex()
        assert text.count("\\toprule") == text.count("\\midrule") == text.count("\\bottomrule") == 1
        width = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1])
        body = text.split("\\toprule")[1].split("\\bottomrule")[0].strip().splitlines()
        lines = [line for line in body if line != "\\midrule"]
        assert len(lines) == len(table.rows) + 1
        assert all(line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == width - 1 for line in lines)
        assert text.count("{") == text.count("}")
        assert text.isascii(), {c for c in text if not c.isascii()}


def test_latex_escapes():
    table = Table("t", "t", "50 % & more", [Column("a", "x_1"), Column("b", "#")])
    table.add({"a": r"\input{x}", "b": "a\nb"})
    text = table.latex()
    assert (
        r"\textbackslash{}input\{x\}" in text and r"50 \% \& more" in text and r"x\_1 & \#" in text and "a; b" in text
    )
    assert latex("−3 < 4") == r"$-$3 \textless{} 4"


def released(workdir, source="release"):
    """Makes a grid of released data of one published row, two seeds of the same ten records."""
    run = run_of(
        data__source=source, model__name="llava15_7b", study__seeds=(0, 1), study__tables=("pairs", "multi_task")
    )
    (workdir / "predictions").mkdir(parents=True)
    cells, results = [], []
    rows = [
        ("pairs", "fixed_task/32/t3r20", "32", {"baseline": 5, "baseline_plus": 4, "trained": 9}),
        ("pairs", "fixed_task/64", "64", {"baseline": 5, "baseline_plus": 4, "trained": 9}),
        ("multi_task", "in_distribution", "02", {"baseline": 3, "single_task": 5, "multi_task": 9}),
    ]
    for table, row, target, arms in rows:
        for arm, correct in arms.items():
            for seed in (0, 1):
                right = correct - seed
                name = f"{table}.{target}.{arm}.s{seed}"
                key = (name, table, row, arm, seed)
                cells.append((*key, "" if arm == "baseline" else "06+26", target, 10, "done", 1.0))
                results.append((*key, target, 10, right, right / 10, *stats.wilson(right, 10)))
                lines = [
                    {"id": f"{target}/test/{i}", "subset": target, "options": ["x", "y"], "answer": "A",
                     "predicted": "A" if i < right else "B", "logprobs": [-0.7, -0.7], "generated": None}
                    for i in range(10)
                ]  # fmt: skip
                (workdir / "predictions" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = {"config": dataclasses.asdict(run), "versions": {}, "data": {}, "cells": len(cells)}
    (workdir / "config.json").write_text(json.dumps(config))
    write_csv(workdir / "cells.csv", CELLS, cells)
    write_csv(workdir / "results.csv", RESULTS, results)
    return workdir


def test_published_rows_stand_beside_ours_with_the_confidence_of_their_reading(tmp_path):
    workdir = released(tmp_path / "w")
    pairs, in_distribution = published(Grid(workdir), stats.summarise(workdir))
    (row,) = pairs.rows  # 64 is no subset of the paper
    reading = mat.paper_rows(3)[19]
    assert (row["paper_row"], row["target"], row["confidence"]) == (20, "32", reading.confidence) and row[
        "confidence"
    ] == "medium"
    assert "flag it" in row["evidence"]
    assert (row["baseline_paper"], row["baseline_plus_paper"], row["trained_paper"]) == ("25", "51", "74")
    assert row["trained"].accuracy == pytest.approx(0.85)
    # The ten records return with the second seed: they count once.
    assert row["trained"].n == 10
    assert (row["trained"].low, row["trained"].high) == pytest.approx(stats.wilson(8.5, 10))
    assert "version 1" in pairs.caption and "llava15_7b" in pairs.caption
    # The paper's own colour, and ours with its test, beside each other.
    assert (pairs.colours[0, "trained_paper"], pairs.colours[0, "trained"]) == ("win", row["mark"]) == ("win", "win")
    assert row["p_plus"] == pytest.approx(2 * 0.5**6) and row["cost"] == 2
    assert in_distribution.rows[0]["multi_task_paper"] == "96" and in_distribution.rows[0]["mark"] == "win"
    text = write_report(workdir).read_text()
    assert "not patients" not in text and "in patients" not in text and "version 1 (December 2024)" in text
    assert "The images cannot be shown" in text


def test_phantoms_never_stand_beside_published_numbers(tmp_path):
    workdir = released(tmp_path / "w", source="phantom")
    assert published(Grid(workdir), stats.summarise(workdir)) == []
    printed = [
        [float(row[arm]) for arm in ("baseline", "baseline_plus", "trained")]
        for row in mat.paper_csv("table3_classification_pairs")
    ]
    both = sum(trained > max(base, plus) for base, plus, trained in printed)
    assert f"in {both} of {len(printed)} rows, in 10 of them by 3 points or less" in context() and len(printed) == 42


def test_numbered_subsets_are_described(tmp_path):
    grid = Grid(released(tmp_path / "w"))
    assert grid.describe("32") == "X-ray, Brain, State" and grid.describe("64") == ""
    assert not grid.of_phantoms
    table = Tables(grid, stats.summarise(grid.workdir)).combination("pairs")[0]
    assert [row["what"] for row in table.rows] == ["X-ray, Brain, State", None]


def test_phantoms_read_from_files_are_still_phantoms(made, tmp_path):
    workdir, _ = made
    config = json.loads((workdir / "config.json").read_text())
    config["config"]["data"] |= {"source": "release", "root": str(tmp_path)}
    for name in ("cells.csv", "results.csv"):
        (tmp_path / name).write_text((workdir / name).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copytree(workdir / "predictions", tmp_path / "predictions")
    grid = Grid(tmp_path)
    assert grid.of_phantoms and not grid.is_phantom and published(grid, {}) == []
