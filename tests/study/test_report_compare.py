"""Two grids compared: what is paired and what is not, intervals, files with gaps, folders with other things in them."""

import csv
import json
from pathlib import Path

import pytest
from report_grids import make_grid, run_of

from medcg_jax.study.report.compare import gaps, matched, newcombe, verdict, write_comparison
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.stats import stats

TARGET = "mri-brain-state"


@pytest.fixture
def pair(tmp_path):
    """Two grids of the same cells and records."""
    run = run_of(study__targets=(TARGET,), data__test_records_per_subset=24, data__train_records_per_subset=20)
    return [make_grid(tmp_path / name, run) for name in ("a", "b")]


def lines_of(workdir: Path):
    """Each predictions file with its lines, to change and write back."""
    for path in sorted((workdir / "predictions").glob("*.jsonl")):
        yield path, [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_questions_about_other_images_are_not_paired(pair):
    assert all(row.paired and row.agreement == 1.0 for row in matched(*map(Grid, pair)))
    config = json.loads((pair[1] / "config.json").read_text())
    config["data"]["0"] = "another"
    (pair[1] / "config.json").write_text(json.dumps(config))
    rows = matched(*map(Grid, pair))
    assert rows and not any(row.paired for row in rows) and {row.agreement for row in rows} == {None}
    assert "the records are others, so nothing is paired there" in verdict(rows, *map(Grid, pair))
    config["data"] = {}  # nothing is known of the data: the questions decide
    (pair[1] / "config.json").write_text(json.dumps(config))
    assert all(row.paired for row in matched(*map(Grid, pair)))


def test_one_moved_option_ends_the_pairing(pair):
    path, lines = next(lines_of(pair[1]))
    lines[3]["options"].reverse()
    write(path, lines)
    assert [row.paired for row in matched(*map(Grid, pair))].count(False) == 1


def test_predictions_without_probabilities_are_compared_by_their_letters(pair):
    for path, lines in lines_of(pair[1]):
        write(path, [{**line, "logprobs": None} for line in lines])
    rows = matched(*map(Grid, pair))
    assert {row.largest for row in rows} == {None} and all(row.paired for row in rows)
    assert "nats" not in verdict(rows, *map(Grid, pair))
    assert gaps({"logprobs": [-1.0, float("-inf")]}, {"logprobs": [-1.5, float("-inf")]}) == [0.5, 0.0]


def test_a_paired_difference_has_the_interval_of_its_records(pair):
    changed = ""
    for path, lines in lines_of(pair[1]):
        if ".trained." in path.name and not changed:
            changed = path.stem
            for line in lines[:12]:
                other = "AB".replace(line["answer"], "")
                line["predicted"] = other if line["predicted"] == line["answer"] else line["answer"]
            write(path, lines)
            right = sum(line["predicted"] == line["answer"] for line in lines)
    text = (pair[1] / "results.csv").read_text().splitlines()
    rows = [line.split(",") for line in text]
    for row in rows:
        if row[0] == changed:
            row[7:] = [str(right), *(f"{x:.6f}" for x in (right / 24, *stats.wilson(right, 24)))]
    (pair[1] / "results.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    found = matched(*map(Grid, pair))
    (odd,) = [row for row in found if row.agreement < 1]
    assert odd.agreement == 0.5 and odd.low < odd.difference < odd.high
    # 24 values of -1, 0 and 1: the t interval of their mean is far wider than that of rows without a difference.
    even = next(row for row in found if row.agreement == 1)
    assert even.low < 0 < even.high and odd.high - odd.low > 1.5 * (even.high - even.low)


def test_newcombe_is_the_papers():
    # Newcombe (1998), Interval estimation for the difference between independent proportions, table II: 56 of 70 less
    # 48 of 80, method 10.
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe(0, 0, 1, 2) == (-1.0, 1.0)


def test_what_else_lies_in_the_folder_stays(pair, tmp_path):
    out = tmp_path / "mine"
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "holiday.png").write_text("not ours")
    page = write_comparison(*pair, out)
    assert (out / "plots" / "holiday.png").read_text() == "not ours" and page == out / "index.html"
    before = page.read_bytes()
    assert write_comparison(*pair, out).read_bytes() == before
    with open(out / "tables" / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(float(r["ci_low"]) <= float(r["difference"]) <= float(r["ci_high"]) for r in rows)
    assert all(float(r["a_low"]) <= float(r["a"]) <= float(r["a_high"]) for r in rows)


def test_grids_without_a_cell_in_common_say_so(pair, tmp_path):
    other = make_grid(tmp_path / "c", run_of(study__targets=("oct-eye-stage",), data__train_records_per_subset=20))
    page = write_comparison(pair[0], other, tmp_path / "none").read_text()
    assert "The two grids have no cell in common: nothing can be compared." in page and "<svg" not in page
