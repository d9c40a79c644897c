"""Two grids compared: what is paired and what is not, intervals, files with gaps, folders with other things in them."""

import shutil

import pytest
from report_grids import (
    SIZES,
    SKILL,
    change_config,
    json_lines,
    make_grid,
    quick,
    read_csv,
    run,
    run_of,
    write_json_lines,
)
from scipy.stats import chi2

from medcg_jax.eval.predictions import wilson
from medcg_jax.study.report.compare import gaps, matched, newcombe, two_proportions, verdict, write_comparison
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.stats.grid_files import read_results

TARGET = "mri-brain-state"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = run_of(study__targets=(TARGET,), **SIZES)
    return make_grid(tmp_path_factory.mktemp("grids") / "a", run)


@pytest.fixture
def pair(made, tmp_path):
    """Two grids of the same cells and records."""
    shutil.copytree(made, tmp_path / "b")
    return [made, tmp_path / "b"]


def lines_of(workdir):
    """Each predictions file with its lines, to change and write back."""
    return [(path, json_lines(path)) for path in sorted((workdir / "predictions").glob("*.jsonl"))]


def test_equal_questions_about_other_images_are_not_paired(pair):
    assert all(row.paired and row.agreement == 1.0 for row in matched(*map(Grid, pair)))
    change_config(pair[1], data={"0": "another"})
    rows = matched(*map(Grid, pair))
    assert rows and not any(row.paired for row in rows) and {row.agreement for row in rows} == {None}
    assert "the records are others, so nothing is paired there" in verdict(rows, *map(Grid, pair))
    change_config(pair[1], data={})  # nothing is known of the data: the questions decide
    assert all(row.paired for row in matched(*map(Grid, pair)))


def test_records_of_one_patient_are_one_draw(made, tmp_path):
    better = make_grid(tmp_path / "b", run_of(study__targets=(TARGET,), **SIZES), skill=lambda cell: 1.0)
    grids = [shutil.copytree(made, tmp_path / "a"), better]
    alone = matched(*map(Grid, grids))
    assert min(row.p for row in alone) < 0.05
    for workdir in grids:
        for path, lines in lines_of(workdir):
            write_json_lines(path, [line | {"group": "patient 1"} for line in lines])
    together = matched(*map(Grid, grids))
    assert [row.difference for row in together] == [row.difference for row in alone]
    assert all(row.paired and row.p == 1.0 for row in together)


def test_one_moved_option_ends_the_pairing(pair):
    path, lines = lines_of(pair[1])[0]
    lines[3]["options"].reverse()
    write_json_lines(path, lines)
    assert [row.paired for row in matched(*map(Grid, pair))].count(False) == 1


def test_predictions_without_probabilities_are_compared_by_their_letters(pair):
    for path, lines in lines_of(pair[1]):
        write_json_lines(path, [{**line, "logprobs": None} for line in lines])
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
            write_json_lines(path, lines)
            right = sum(line["predicted"] == line["answer"] for line in lines)
    text = (pair[1] / "results.csv").read_text().splitlines()
    rows = [line.split(",") for line in text]
    for row in rows:
        if row[0] == changed:
            row[7:] = [str(right), *(f"{x:.6f}" for x in (right / 24, *wilson(right, 24)))]
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


def test_two_proportions_is_the_textbooks():
    # Agresti, An Introduction to Categorical Data Analysis (2nd ed., 2007), 2.2: 189 of 11,034 and 104 of 11,037 heart
    # attacks with placebo and aspirin; chi squared 25.0 without continuity correction.
    assert two_proportions(189, 11034, 104, 11037) == pytest.approx(chi2.sf(25.01, 1), rel=0.02)
    assert two_proportions(5, 5, 7, 7) == 1.0 and two_proportions(0, 0, 1, 3) == 1.0


def test_a_grid_agrees_with_itself_and_what_else_lies_in_the_folder_stays(made, tmp_path):
    out = tmp_path / "mine"
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "holiday.png").write_text("not ours")
    pages = []
    for _ in range(2):
        assert run("report", str(made), str(made), f"--out={out}") == (0, "")
        pages.append((out / "index.html").read_bytes())
    assert (out / "plots" / "holiday.png").read_text() == "not ours" and pages[0] == pages[1]
    rows = read_csv(out / "tables" / "comparison.csv")
    assert len(rows) == len(read_results(made))
    assert {(r["difference"], r["p"], r["agreement"], r["largest"]) for r in rows} == {("0.0", "1.0", "1.0", "0.0000")}
    assert all(float(r["ci_low"]) <= float(r["difference"]) <= float(r["ci_high"]) for r in rows)
    assert all(float(r["a_low"]) <= float(r["a"]) <= float(r["a_high"]) for r in rows)
    page = pages[0].decode()
    assert "0 differ significantly" in page and "100.0 % were answered with the same letter" in page
    assert "<svg" in page and read_csv(out / "tables" / "settings.csv") == []


def test_grids_that_differ_are_told_apart(made, tmp_path):
    worse = make_grid(
        tmp_path / "worse", run_of(study__targets=(TARGET,), train__learning_rate=2e-3, **SIZES),
        skill=lambda cell: 1 - SKILL[cell.arm],
    )  # fmt: skip
    with quick():
        page = write_comparison(made, worse)
    assert page == made / "compare_worse" / "index.html" and "They do not agree." in page.read_text()
    rows = read_csv(page.parent / "tables" / "comparison.csv")
    assert len(rows) == len(read_results(worse)) and {r["test"] for r in rows} == {"McNemar"}
    sure = [r for r in rows if float(r["p_holm"]) < 0.05]
    assert sure and all(r["arm"] != "Trained" for r in sure)
    settings = {r["what"]: (r["a"], r["b"]) for r in read_csv(page.parent / "tables" / "settings.csv")}
    assert settings["train.learning_rate"] == ("0.001", "0.002")
    shutil.rmtree(page.parent)


def test_other_seeds_are_matched_by_their_order(made, tmp_path):
    other = make_grid(tmp_path / "other", run_of(study__targets=(TARGET,), study__seeds=(7,), **SIZES))
    rows = matched(Grid(made), Grid(other))
    assert rows and {(row.seed, row.paired, row.agreement) for row in rows} == {(0, False, None)}


def test_grids_without_a_cell_in_common_say_so(made, tmp_path):
    other = make_grid(tmp_path / "c", run_of(study__targets=("oct-liver-stage",), **SIZES))
    page = write_comparison(made, other, tmp_path / "none").read_text()
    assert "The two grids have no cell in common: nothing can be compared." in page and "<svg" not in page
