"""The report's tables against the files they are made of; CSV, LaTeX and Markdown; published rows."""

import csv
import dataclasses
import re
import shutil
from collections import defaultdict

import pytest
from report_grids import (
    FOUR_OPTIONS,
    FULL_TARGETS,
    change_config,
    json_lines,
    printed_grid,
    quick,
    read_csv,
    write_json_lines,
)

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.design import mat
from medcg_jax.study.report.escape import latex
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.page import write_report
from medcg_jax.study.report.published import context, published, slips_of
from medcg_jax.study.report.table import Table
from medcg_jax.study.report.tables import Tables, mark
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.paired import compare


@pytest.fixture(scope="module")
def tables(full_summary):
    return {table.name: table for table in Tables(*full_summary).all()}


def test_accuracies_are_those_of_results_csv(full_grid, tables):
    sums = defaultdict(lambda: [0, 0])
    for row in read_csv(full_grid / "results.csv"):
        part = row["row"] if row["table"] == "multi_task" else row["row"].split("/")[0]
        name = f"{row['table']}_{part}"
        if row["table"] == "ablation":
            name = "ablation_updates" if row["arm"].endswith("_updates") else "ablation"
        sums[name, row["target"], row["arm"]][0] += int(row["correct"])
        sums[name, row["target"], row["arm"]][1] += int(row["n"])
    seen = 0
    for (name, target, arm), (correct, n) in sums.items():
        if name.startswith(("efficiency", "multi_task_out_of_distribution/")):
            continue  # shown as means alone
        row = next(r for r in csv.DictReader(tables[name].csv().splitlines()) if r["target"] == target)
        assert float(row[arm]) == pytest.approx(correct / n)
        assert (float(row[f"{arm}_low"]), float(row[f"{arm}_high"])) == pytest.approx(wilson(correct, n))
        assert int(row[f"{arm}_n"]) == n
        seen += 1
    assert seen > 60


def test_p_values_and_colours_are_those_of_the_pairing(full_grid, full_summary, tables):
    right = defaultdict(dict)
    for cell in read_csv(full_grid / "cells.csv"):
        if cell["row"] == "fixed_area/mri-brain-state":
            for record in json_lines(full_grid / "predictions" / f"{cell['cell']}.jsonl"):
                right[cell["arm"]][cell["seed"], record["id"]] = record["predicted"] == record["answer"]
    table = tables["pairs_fixed_area"]
    row = next(row for row in table.rows if row["target"] == "mri-brain-state")
    p_values = [own for own in full_summary[1]["rows"] if own["row"] == "fixed_area/mri-brain-state"]
    (plus,) = (own for own in p_values if (own["arm"], own["against"]) == ("trained", "baseline_plus"))
    assert plus["p"] == pytest.approx(compare(right["trained"], right["baseline_plus"]).p)
    # The marks are by the adjusted p, so that is the one beside them.
    assert row["p_plus"] == plus["p_holm"] > plus["p"]
    for number, row in enumerate(table.rows):
        trained, others = row["trained"].accuracy, [row[arm].accuracy for arm in ("baseline", "baseline_plus")]
        state = "win" if trained > max(others) else "loss" if trained < min(others) else "even"
        assert table.colours[number, "trained"].removesuffix("-sure") == state == row["mark"].removesuffix("-sure")


@pytest.mark.parametrize(
    ("results", "expected"),
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
def test_marks(results, expected):
    assert mark([{"difference": d, "p_holm": p} for d, p in results] + [None]) == expected


def test_chance_is_of_the_options(tables, tmp_path):
    chance = {row["target"]: row["chance"] for row in tables["ablation"].rows}
    assert chance == pytest.approx({FULL_TARGETS[0]: 0.5, FOUR_OPTIONS: 0.25})
    workdir = released(tmp_path / "w")
    for path in (workdir / "predictions").glob("pairs.fixed_task.32.*.jsonl"):
        lines = json_lines(path)
        for line in lines[:5]:
            line |= {"options": ["x", "y", "z", "w"], "logprobs": [-0.7, -0.8, -2.0, -3.0]}
        write_json_lines(path, lines)
    assert Grid(workdir).chance("32") == pytest.approx((5 / 4 + 5 / 2) / 10)


def test_how_letters_were_used(full_grid, tables):
    cells = [c for c in read_csv(full_grid / "cells.csv") if (c["table"], c["arm"]) == ("pairs", "trained")]
    lines = [line for c in cells for line in json_lines(full_grid / "predictions" / f"{c['cell']}.jsonl")]
    row = next(r for r in tables["answers"].rows if (r["table"], r["arm"]) == ("pairs", "Trained"))
    assert row["n"] == len(lines)
    assert row["letter_A"] == pytest.approx(sum(line["predicted"] == "A" for line in lines) / len(lines))
    assert sum(row[f"letter_{name}"] for name in "ABCD") == pytest.approx(1)
    assert row["unparsed"] == pytest.approx(sum(line["generated"] == "the image" for line in lines) / len(lines))
    assert 0 < row["unparsed"] < 0.2
    assert row["mass"] == pytest.approx(0.98, abs=0.01)
    assert row["generated"] < row["accuracy"]


def test_measures_beside_accuracy_are_of_the_predictions(full_grid, tables):
    cells = [
        c
        for c in read_csv(full_grid / "cells.csv")
        if (c["row"], c["arm"]) == ("fixed_area/mri-brain-state", "trained")
    ]
    by_seed = []
    for cell in cells:
        recall = defaultdict(list)
        for line in json_lines(full_grid / "predictions" / f"{cell['cell']}.jsonl"):
            recall[line["options"]["AB".index(line["answer"])]].append(line["predicted"] == line["answer"])
        by_seed.append({label: sum(right) / len(right) for label, right in recall.items()})
    row = next(
        r
        for r in tables["metrics"].rows
        if (r["table"], r["row"], r["arm"]) == ("pairs", "fixed_area/mri-brain-state", "Trained")
    )
    assert len(by_seed) == 2 and row["balanced"] == pytest.approx(sum(sum(x.values()) / 2 for x in by_seed) / 2)
    assert (row["labels"], row["auroc_labels"], row["why"]) == (2, 2, None)
    assert row["auroc"] > row["majority"] == 0.5
    assert row["accuracy"] == pytest.approx(row["balanced"])  # phantoms are balanced
    assert len(tables["metrics"].rows) == len(
        {(r["table"], r["row"], r["target"], r["arm"]) for r in read_csv(full_grid / "results.csv")}
    )
    assert "majority" not in {column.key for column in tables["pairs_fixed_area"].columns}


def test_every_table_is_csv_and_latex(tables):
    for table in tables.values():
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


def test_cells_in_every_form():
    hostile = {"a": r"\input{x}", "b": "a\nb | c", "n": 1234}
    table = Table("t", "t", "50 % & more", [hostile], {"a": "x_1", "b": "#"})
    text = table.latex()
    assert all(part in text for part in (r"\textbackslash{}input\{x\}", r"50 \% \& more", r"x\_1 & \#", "a; b"))
    assert latex("−3 < 4") == r"$-$3 \textless{} 4"
    lines = table.markdown().splitlines()
    assert lines == [r"| x\_1 | \# | n |", "| --- | --- | --: |", r"| \\input{x} | a; b \| c | 1,234 |"]
    empty = Table("t", "t", "c", [])
    assert (empty.csv(), empty.columns) == ("\n", []) and "tabular" not in empty.latex()


def test_a_row_that_is_not_above_chance_is_not_green(full_summary):
    grid, summary = full_summary
    tables = Tables(grid, summary)
    (key, scores), *_ = grid.scores("pairs").items()
    others = ("baseline_plus", "baseline")
    chance = grid.chance(key[1])
    for low, expected in (
        (chance + 0.01, tables.compared("pairs", *key, scores, "trained", others)["mark"]),
        (chance, "chance"),
    ):
        near = scores | {"trained": dataclasses.replace(scores["trained"], low=low)}
        values = tables.compared("pairs", *key, near, "trained", others)
        assert values["mark"] == values["colours"]["trained"] == expected
    assert tables.compared("pairs", *key, scores, "trained", others)["mark"] in ("win", "win-sure")


def test_what_each_training_subset_shares_stands_beside_it(tables):
    for direction, expected in {
        "fixed_modality": {"MA", "MT"},
        "fixed_area": {"MA", "AT"},
        "fixed_task": {"MT", "AT"},
        "modality_area": {"MA", "T"},
    }.items():
        for row in tables[f"pairs_{direction}"].rows:
            assert {text for each in row["shares"].split(" or ") for text in each.split(" + ")} == expected
    columns = [column.key for column in tables["pairs_fixed_area"].columns]
    assert columns.index("related") == 1 and columns.index("shares") == 2  # in sight, however wide the table is
    assert all(set(row["shares"].split(" + ")) == {"M", "A", "T"} for row in tables["triples_one_each"].rows)
    assert "MAT is the target's own triplet" in tables["pairs_fixed_area"].words


def released(workdir, source="release"):
    """A grid of released data with two printed rows of pairs and one of an own subset."""
    right = {"baseline": 5, "baseline_plus": 4, "trained": 9}
    rows = [
        ("pairs", "fixed_task/32/t3r20", "06+26", right),
        ("pairs", "fixed_modality/30/t3r11", "28+29", right),
        ("pairs", "fixed_task/64", "06+26", right),
        ("multi_task", "in_distribution", "02", {"baseline": 3, "single_task": 5, "multi_task": 9}),
    ]
    return printed_grid(workdir, rows, data__source=source)


def test_published_rows_stand_beside_ours_with_the_confidence_of_their_reading(tmp_path):
    workdir = released(tmp_path / "w")
    tables = Tables(Grid(workdir), stats.summarise(workdir))
    pairs, in_distribution = published(tables)
    row, whole = pairs.rows  # 64 is no subset of the paper
    reading = mat.paper_rows(3)[19]
    assert (
        (row["paper_row"], row["target"], row["confidence"]) == (20, "32", reading.confidence) == (20, "32", "medium")
    )
    assert "flag it" in row["evidence"]
    assert (row["baseline_paper"], row["baseline_plus_paper"], row["trained_paper"]) == ("25", "51", "74")
    assert row["trained"].accuracy == pytest.approx(0.85)
    # The ten records return with the second seed: they count once.
    assert row["trained"].n == 10
    assert (row["trained"].low, row["trained"].high) == pytest.approx(wilson(8.5, 10))
    assert "version 1" in pairs.caption and "llava15_7b" in pairs.caption
    # The paper's own colour, and ours with its test, beside each other.
    assert (pairs.colours[0, "trained_paper"], pairs.colours[0, "trained"]) == ("win", row["mark"]) == ("win", "win")
    assert row["p_plus"] == pytest.approx(3 * 2 * 0.5**6) and row["cost"] == 2  # one of three rows, by Holm
    assert in_distribution.rows[0]["multi_task_paper"] == "96" and in_distribution.rows[0]["mark"] == "win"
    # Numbered subsets are described, where the paper has them.
    assert tables.grid.describe("32") == "X-ray, Brain, State" and tables.grid.describe("64") == ""
    assert [row["what"] for row in tables.combination("pairs")[0].rows] == ["X-ray, Brain, State", None]
    assert [row["shares"] for row in tables.combination("pairs")[0].rows] == ["AT + MT", None]
    with quick():
        text = write_report(workdir).read_text()
    assert "not patients" not in text and "in patients" not in text and "version 1 (December 2024)" in text
    assert "The images cannot be shown" in text


def slips(row: mat.PaperRow) -> str:
    return slips_of("table3_classification_pairs", row.row, (*row.related, row.target))


def test_published_rows_say_what_they_share_and_what_is_doubtful(tmp_path):
    workdir = released(tmp_path / "w")
    pairs, _ = published(Tables(Grid(workdir), stats.summarise(workdir)))
    row, whole = pairs.rows
    assert (row["shares"], row["lapse"], row["others"]) == ("AT + MT", None, None)
    assert "subset 32: its one dataset, 63, is described as MRI" in row["slips"] and "baseline '25'" in row["slips"]
    table = Tables(Grid(workdir), stats.summarise(workdir)).combination("pairs")[0]
    # The made test has one right letter beside ten times the same options: always answering it would be right.
    assert [row["majority"] for row in table.rows] == [1.0, 1.0]
    assert (whole["shares"], whole["lapse"]) == ("MAT + MT", "whole triplet")
    assert (whole["confidence"], whole["others"], whole["slips"]) == ("medium", "28 + 37", None)
    assert "In 1 of these 2 rows a training subset has all three elements of the target" in pairs.caption
    assert "in 1 a subset has a doubtful triplet as printed" in pairs.caption
    resting = [row for row in mat.paper_rows(3) if "subset 32: " in slips(row)]
    assert slips_of("table1_in_distribution", 32, ("32",)).startswith(
        "subset 32: its one dataset, 63, is described as MRI"
    )
    assert [row.row for row in resting] == [5, 17, 18, 19, 20, 21, 22, 27, 29]


def test_rows_that_print_the_same_numbers_are_slips():
    seen = {}
    for row in mat.paper_csv("table3_classification_pairs"):
        numbers = tuple(row[key] for key in ("target", "baseline", "baseline_plus", "trained"))
        first = seen.setdefault(numbers, row["row"])
        text = slips(mat.paper_rows(3)[int(row["row"]) - 1])
        assert (f"all three numbers are those of row {first}," in text) == (first != row["row"]), row


def test_phantoms_never_stand_beside_published_numbers(clean_grid, tmp_path):
    workdir = released(tmp_path / "w", source="phantom")
    assert published(Tables(Grid(workdir), stats.summarise(workdir))) == []
    rows = mat.paper_csv("table3_classification_pairs")
    both = sum(float(r["trained"]) > max(float(r["baseline"]), float(r["baseline_plus"])) for r in rows)
    assert f"in {both} of {len(rows)} rows, in 10 of them by 3 points or less" in context() and len(rows) == 42
    # Phantoms that are read from files are still phantoms.
    shutil.copytree(clean_grid, tmp_path / "files")
    change_config(tmp_path / "files", {"source": "release", "root": str(tmp_path)})
    grid = Grid(tmp_path / "files")
    assert grid.of_phantoms and not grid.is_phantom and published(Tables(grid, {"rows": []})) == []
