"""What a reader sees first: the verdict with its numbers, the study in pictures; and who follows whom on subset pages."""

import re

import pytest
from made_arms import PAIR
from report_grids import change_config, make_grid, quick, run_of
from test_report import Page
from test_report_text import TARGETS, answer_with, pairs  # noqa: F401

from medcg_jax.study.report.layout import MOST_PRINTED, Section, page_html
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.opening import headline, teaser
from medcg_jax.study.report.page import write_report
from medcg_jax.study.report.subset_pages import in_order
from medcg_jax.study.report.table import Table, points
from medcg_jax.study.report.text import Answer


def test_the_verdict_stands_with_what_it_rests_on(pairs):  # noqa: F811
    answer = answer_with(pairs, PAIR)
    first, line = headline(answer), answer.verdict
    assert (first.verdict, first.world, first.of) == ("Yes: composition", "on phantoms, not patients", "")
    assert first.before == (line["accuracy"]["baseline_plus"], "unrelated data")
    assert first.after == (line["accuracy"]["trained"], "pairs of related subsets")
    assert first.change.startswith(f"{points(line['gain']['mean'], True)} points (95 % interval ")
    assert (
        first.chance == pytest.approx(0.5) and "4,800 distinct questions" in first.sizes and "overall p" in first.sizes
    )
    for number in (line["accuracy"]["baseline_plus"], line["accuracy"]["trained"]):
        assert f"{100 * number:.1f} %" in first.values
    assert "chance 50.0 %" in first.values


def test_one_seed_is_of_these_models_alone_in_large_type_too(pairs):  # noqa: F811
    first = headline(answer_with(pairs, PAIR, seeds=1))
    assert (
        first.verdict == "Of these models alone: composition" and first.of == "One seed: nothing is said of the recipe."
    )
    few = headline(answer_with(pairs, PAIR, seeds=1, targets=4))
    assert few.verdict == "Not shown" and few.of.startswith("One seed")


def test_without_a_verdict_nothing_is_claimed(pairs):  # noqa: F811
    grid, summary = pairs
    none = headline(Answer(grid, summary | {"verdicts": [], "effects": []}))
    assert none.verdict == "No answer yet" and none.before is none.after is None and none.change == ""
    some = headline(Answer(grid, summary | {"verdicts": []}))
    effect = next(
        e for e in summary["effects"] if (e["part"], e["arm"], e["against"]) == ("", "trained", "baseline_plus")
    )
    assert some.verdict == "Composition is not tested" and points(effect["mean"], True) in some.change
    assert some.after[0] - some.before[0] == pytest.approx(effect["mean"])


def test_the_study_is_pictured_by_one_of_its_own_rows(pairs):  # noqa: F811
    grid, _ = pairs
    shown = teaser(grid)
    assert shown.target.name in TARGETS and len(shown.trained) == 2 and shown.more == 0
    target = {element: word for element, word, _ in shown.target.elements}
    for combination in shown.trained:
        # What both have is marked, and what they differ in is not; a pair shares two elements with its target.
        assert all((target[element] == word) == common for element, word, common in combination.elements)
        assert sum(common for *_, common in combination.elements) == 2
        assert combination.image.startswith("data:image/png") and combination.name in combination.alt
    assert {e for c in shown.trained for e, _, common in c.elements if common} == {"modality", "area", "task"}
    assert shown.question and len(shown.options) == 2
    assert (
        f"One of {len(TARGETS)} rows of pairs" in shown.caption and "no model of these rows has seen" in shown.caption
    )


def test_without_the_data_the_names_remain(tmp_path):
    workdir = make_grid(tmp_path / "w", run_of(study__targets=TARGETS[:1], data__test_records_per_subset=6))
    change_config(workdir, data={"0": "another"})
    shown = teaser(Grid(workdir))
    assert shown.target.image == "" and shown.question == "" and len(shown.trained) == 2


def test_subset_pages_lead_from_one_to_the_next(tmp_path):
    run = run_of(study__targets=TARGETS[:3], study__parts=("fixed_area",), data__test_records_per_subset=6)
    workdir = make_grid(tmp_path / "w", run)
    change_config(workdir, commit="0123456789ab", date="2026-11-30T12:00:00+00:00")
    with quick():
        index = Page(write_report(workdir).read_text())
    assert (
        "0123456789ab" in index.text and "2026-11-30 12:00:00 UTC" in index.text and "1 seed, 2026-11-30" in index.text
    )
    files = sorted(
        (workdir / "report" / "subsets").iterdir(), key=lambda path: index.links.index(f"subsets/{path.name}")
    )
    pages = [Page(path.read_text()) for path in files]
    for number, page in enumerate(pages):
        beside = {path.name for path in files[max(0, number - 1) : number + 2]} - {files[number].name}
        assert beside == {link for link in page.links if link.endswith(".html") and "/" not in link}
        assert page.ids.index("scores") < page.ids.index("confusion") < page.ids.index("mistakes")
        name = files[number].stem
        assert ", ".join(name.split("-")) in page.text and "chance 50.0 %" in page.text
    state, grade = (Page((workdir / "report" / "subsets" / f"{name}.html").read_text()) for name in TARGETS[:2])
    assert "labels, in order normal, abnormal" in state.text and "labels, in order mild, severe" in grade.text


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("Severe", "Mild", "No DR", "Moderate", "Proliferative DR"), ["No DR", "Mild", "Moderate", "Severe", "Proliferative DR"]),
        (("Grade III", "Grade I", "Grade II"), ["Grade I", "Grade II", "Grade III"]),
        (("Stage 10", "Stage 2"), ["Stage 2", "Stage 10"]),
        (("Malignant", "Benign", "Normal"), ["Normal", "Benign", "Malignant"]),
        (("zebra", "ant"), ["ant", "zebra"]),
        (("abnormal", "normal"), ["normal", "abnormal"]),
    ],
)  # fmt: skip
def test_labels_stand_in_their_order(labels, expected):
    assert in_order(labels) == expected


def test_a_known_order_holds():
    assert in_order(("a", "b", "c"), ("c", "a")) == ["c", "a", "b"]


def test_a_table_shows_its_deciding_columns_and_keeps_all():
    rows = [{"a": 1, "b": 2, "c": 3}]
    table = Table("t", "T", "caption.", rows, legend="Legend.", shown=("c", "nowhere", "a"))
    assert [c.key for c in table.shown] == ["c", "a"] and [c.key for c in table.columns] == ["a", "b", "c"]
    assert table.csv() == "a,b,c\n1,2,3\n" and table.words == "caption. Legend."
    assert [c.key for c in Table("t", "T", "", rows, shown=("nowhere",)).shown] == ["a", "b", "c"]


def test_results_are_the_first_table_of_the_markdown(full_grid):
    text = (full_grid / "report" / "report.md").read_text()
    head, _, table = text.partition("\n\n")
    assert head.startswith("# ") and table.startswith("## Results\n\n| Table | Arm | n | Accuracy | Stderr |")
    rows = [line.split(" | ") for line in table.split("\n\n")[1].splitlines()[2:]]
    assert all(len(row) == len(rows[0]) for row in rows)
    names = [row[1] for row in rows if row[0] == "| pairs"]
    assert names[:2] == ["Baseline", "Baseline+"] and "Trained" in names
    plus = next(row for row in rows if row[:2] == ["| pairs", "Baseline+"])
    assert any(re.fullmatch(r"[+−]\d+\.\d", value) for value in plus)


def test_of_a_long_table_the_first_rows_are_printed():
    def page(rows: int) -> str:
        table = Table("t", "T", "", [{"a": number} for number in range(rows)])
        return page_html("h", "s", [Section(id="s", title="S", tables=[table])], tables=[table])

    assert "class=unprinted" not in page(MOST_PRINTED) and 'class="printed"' not in page(MOST_PRINTED)
    long = page(1200)
    assert long.count("class=unprinted") == 1200 - MOST_PRINTED
    assert f"The first {MOST_PRINTED} of 1,200 rows are printed; the page and tables/t.csv have them all." in long
