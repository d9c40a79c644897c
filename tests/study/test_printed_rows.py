"""Effects and verdicts without printed rows that share more or less than they say; a row that repeats another."""

import pytest
from report_grids import printed_grid, quick

from medcg_jax.study.design.overlap import LAPSES
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.page import write_report
from medcg_jax.study.report.tables import Tables
from medcg_jax.study.report.text import limits
from medcg_jax.study.stats import stats

# Row -> (training subsets, right answers of Trained of 10); Baseline+ has 5.
PAIRS = {
    "fixed_modality/04/t3r1": ("03+06", 7),
    "fixed_modality/30/t3r11": ("28+29", 10),
    "fixed_area/28/t3r15": ("03+30", 9),
    "fixed_area/28/t3r16": ("03+30", 1),
    "fixed_task/04/t3r23": ("28+06", 8),
}
TRIPLES = {"one_each/05/t4r3": ("02+22+09", 6), "one_each/05/t4r4": ("03+22+26", 9)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    rows = [
        (table, row, related, {"baseline": 5, "baseline_plus": 5, "trained": right})
        for table, of_table in (("pairs", PAIRS), ("triples", TRIPLES))
        for row, (related, right) in of_table.items()
    ]
    return printed_grid(tmp_path_factory.mktemp("printed") / "w", rows)


@pytest.fixture(scope="module")
def summary(workdir):
    return stats.summarise(workdir)


def effect(effects, table):
    key = (table, "", "trained", "baseline_plus")
    (found,) = (e for e in effects if (e["table"], e["part"], e["arm"], e["against"]) == key)
    return found


def test_a_row_that_repeats_another_counts_once(summary):
    found = effect(summary["effects"], "pairs")
    # Both seeds lose one right answer in every arm. Rows of one target count together: 04 has rows 1 and 23.
    assert found["rows"] == 4 and found["wins"] == 4
    assert found["mean"] == pytest.approx(((0.2 + 0.3) / 2 + 0.5 + 0.4) / 3)
    assert not any(row["row"].endswith("/t3r16") for row in summary["rows"])
    (trained,) = (a for a in summary["accuracy"] if (a["table"], a["part"], a["arm"]) == ("pairs", "", "trained"))
    assert trained["accuracy"] == pytest.approx((0.7 + 1.0 + 0.9 + 0.8) / 4 - 0.05)
    assert next(v for v in summary["verdicts"] if (v["table"], v["part"]) == ("pairs", ""))["rows"] == 4


def test_effects_and_verdicts_once_more_without_lapses(summary):
    first, second, third = summary["without_lapses"]
    assert [level["left_out"] for level in (first, second, third)] == [
        ["whole triplet"], ["whole triplet", "not its direction"],
        ["whole triplet", "not its direction", "two elements in one"],
    ]  # fmt: skip
    assert [level["rows_left_out"] for level in (first, second, third)] == [2, 3, 4]
    means = [effect(level["effects"], "pairs")["mean"] for level in (first, second, third)]
    assert means == pytest.approx([0.25, 0.2, 0.2])
    assert effect(summary["effects"], "triples")["mean"] == pytest.approx(0.25)
    assert [effect(level["effects"], "triples")["mean"] for level in (second, third)] == pytest.approx([0.25, 0.1])
    rows = [
        next(v for v in level["verdicts"] if (v["table"], v["part"]) == ("pairs", ""))["rows"]
        for level in (first, third)
    ]
    assert rows == [2, 1]


def test_the_page_has_the_answer_once_more(workdir, summary):
    table = Tables(Grid(workdir), summary).without_lapses()
    pairs = [row for row in table.rows if row["table"] == "pairs"]
    assert [row["left_out"] for row in pairs] == [
        "(no row)", "; ".join([*LAPSES.values()][:1]), "; ".join([*LAPSES.values()][:2]), "; ".join(LAPSES.values()),
    ]  # fmt: skip
    assert [row["rows"] for row in pairs] == [4, 2, 1, 1]
    means = [row["mean"] for row in pairs]
    assert means == pytest.approx([(0.25 + 0.5 + 0.4) / 3, 0.25, 0.2, 0.2])
    assert [row["difference"] for row in pairs] == pytest.approx(means)  # Baseline+ is as good as Baseline here
    assert {row["verdict"] for row in pairs} <= {"not shown", "a gain over unrelated data, cause not tested"}
    with quick():
        text = write_report(workdir).read_text()
    assert "The answer without doubtful rows" in text and "a source of one element has two" in text
    saved = (workdir / "report" / "tables" / "effects_without_lapses.csv").read_text()
    assert len(saved.splitlines()) == 1 + len(table.rows)


def test_without_lapses_nothing_is_said_again(tmp_path):
    rows = [("pairs", "fixed_modality/04/t3r1", "03+06", {"baseline_plus": 5, "trained": 7})]
    found = stats.summarise(printed_grid(tmp_path / "w", rows))
    assert found["without_lapses"] == [] and Tables(Grid(tmp_path / "w"), found).without_lapses().rows == []


def test_limits_name_what_the_grid_has(workdir, summary):
    text = " ".join(limits(Grid(workdir), summary))
    assert "4 printed rows of the paper here share more or less with their target" in text
    assert "no arm of this grid has them and nothing else of the target" in text and "Same task only" not in text
    none = " ".join(limits(Grid(workdir), summary | {"without_lapses": []}))
    assert "printed row" not in none
