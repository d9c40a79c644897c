"""A report's other forms: pages of subsets, controls, Markdown, LaTeX, a summary, and two grids compared."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from report_grids import make_grid, run_of

from medcg_jax import cli
from medcg_jax.config import CONTROLS, DataConfig
from medcg_jax.data.controls import control_sets
from medcg_jax.data.records import LETTERS
from medcg_jax.data.sources import open_source
from medcg_jax.study.report.compare import two_proportions, write_comparison
from medcg_jax.study.report.figures import gains_by_target
from medcg_jax.study.report.formats import table_markdown
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.page import write_report
from medcg_jax.study.report.tables import Column, Table
from medcg_jax.study.stats import stats

TARGETS = ("mri-brain-state", "endoscopy-lung-grade")
SIZES = dict(data__train_records_per_subset=20, data__test_records_per_subset=24)


def write_controls(workdir: Path, seed: int, blind: bool = True) -> None:
    """Controls of every cell: right where the plain answer was; with another image A, or (not blind) still right."""
    source = open_source(DataConfig(train_records_per_subset=20, test_records_per_subset=24, seed=seed))
    (workdir / "controls").mkdir(exist_ok=True)
    for path in sorted((workdir / "predictions").glob(f"*.s{seed}.jsonl")):
        plain = {(r["subset"], r["id"]): r for r in map(json.loads, path.read_text().splitlines())}
        lines = []
        for subset in dict.fromkeys(subset for subset, _ in plain):
            for name, asked in control_sets(source.records(subset, "test"), CONTROLS, 0).items():
                for record in asked.records:
                    before = plain[subset, record.id]
                    right = before["predicted"] == before["answer"]
                    other = next(x for x in LETTERS if x != record.answer)
                    predicted = record.answer if right else other
                    if name == "shuffled_images" and blind:
                        predicted = "A"
                    lines.append(
                        {"id": record.id, "subset": subset, "options": record.options, "answer": record.answer,
                         "predicted": predicted, "logprobs": [-1.0] * len(record.options), "generated": None,
                         "control": name}
                    )  # fmt: skip
        (workdir / "controls" / path.name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    tables = ("pairs", "ablation", "efficiency")
    run = run_of(study__tables=tables, study__targets=TARGETS, study__seeds=(0, 1), **SIZES)
    workdir = make_grid(tmp_path_factory.mktemp("forms") / "w", run)
    for seed in (0, 1):
        write_controls(workdir, seed)
    write_report(workdir, ("md", "tex"))
    return workdir


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_copy_of_the_files_gives_the_same_bytes_in_every_file(full, tmp_path):
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(full, copy, ignore=shutil.ignore_patterns("report"))
    write_report(copy, ("md", "tex"))

    def contents(workdir):
        folder = workdir / "report"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    ours, theirs = contents(full), contents(copy)
    assert ours == theirs and len(ours) > 40
    assert {"index.html", "summary.txt", "report.md", "report.tex", "subsets/mri-brain-state.html"} <= ours.keys()
    assert not [name for name, data in ours.items() if str(full.parent).encode() in data]


def test_every_tested_subset_has_a_page_with_its_mistakes(full):
    pages = {path.stem for path in (full / "report" / "subsets").glob("*.html")}
    tested = {row["target"] for row in stats.read_results(full)}
    assert pages == tested == set(TARGETS)
    page = (full / "report" / "subsets" / "mri-brain-state.html").read_text()
    cells = [c for c in Grid(full).done("pairs") if c["arm"] == "trained" and c["seed"] == "0"]
    answers = [r for c in cells for r in Grid(full).predictions(c["cell"]) if r["subset"] == "mri-brain-state"]
    wrong = [r for r in answers if r["predicted"] != r["answer"]]
    assert f"{len(wrong)} of {len(answers)} answers of Trained" in page
    shown = re.findall(r'<p class="id">(.*?)</p>', page)
    assert len(shown) == min(12, len({r["id"] for r in wrong})) and set(shown) <= {r["id"] for r in wrong}
    assert page.count("data:image/png;base64,") == len(shown) and "../index.html" in page
    sure = [int(x) for x in re.findall(r'class="picked[^>]*><b>.</b>[^<]*<span class="num">(\d+) %', page)]
    assert sure == sorted(sure, reverse=True)
    assert "subsets/mri-brain-state.html" in (full / "report" / "index.html").read_text()


def test_controls_are_shown_and_a_leak_of_answers_is_marked(full, tmp_path):
    tables = full / "report" / "tables"
    again = {(r["table"], r["arm"]): r for r in read(tables / "controls_again.csv")}
    trained = again["pairs", "Trained"]
    results = [r for r in stats.read_results(full) if (r["table"], r["arm"]) == ("pairs", "trained")]
    plain = sum(r["correct"] for r in results) / sum(r["n"] for r in results)
    assert float(trained["plain"]) == float(trained["circular"]) == pytest.approx(plain)
    assert abs(float(trained["shuffled"]) - float(trained["chance"])) < 0.15
    letters = {(r["table"], r["arm"]): r for r in read(tables / "controls.csv")}["pairs", "Trained"]
    assert float(letters["accuracy"]) == pytest.approx(plain) and 0.9 < float(letters["agreement"]) < 1
    sighted = tmp_path / "w"
    shutil.copytree(full, sighted, ignore=shutil.ignore_patterns("report"))
    for seed in (0, 1):
        write_controls(sighted, seed, blind=False)
    page = write_report(sighted).read_text()
    table = page[page.index('id="table-controls-again"') :]
    assert 'class="score loss"' in table[: table.index("</table>")]
    blind = (full / "report" / "index.html").read_text()
    table = blind[blind.index('id="table-controls-again"') :]
    assert 'class="score loss"' not in table[: table.index("</table>")]


def test_the_map_has_the_mean_gain_of_every_target(full):
    summary = stats.summarise(full)
    gains, against = gains_by_target(summary)
    assert against == ("Trained", "Baseline+") and set(gains) == set(TARGETS)
    rows = [r for r in summary["rows"] if (r["table"], r["arm"], r["against"]) == ("pairs", "trained", "baseline_plus")]
    own = [r["difference"] for r in rows if r["target"] == TARGETS[0]]
    assert gains[TARGETS[0]] == pytest.approx(sum(own) / len(own))
    svg = (full / "report" / "plots" / "map.svg").read_text()
    assert all(f"+{100 * gain:.1f}" in svg for gain in gains.values())
    assert (full / "report" / "plots" / "figure4.png").is_file()
    assert (full / "report" / "plots" / f"efficiency_{TARGETS[1]}.png").is_file()


def test_markdown_and_latex_hold_every_table(full):
    markdown = (full / "report" / "report.md").read_text()
    document = (full / "report" / "report.tex").read_text()
    names = [path.stem for path in (full / "report" / "tables").glob("*.csv")]
    assert markdown.count("\n## ") == document.count(r"\section*{") == len(names)
    for name in ("begin", "end"):
        assert document.count(rf"\{name}{{longtable}}") == len(names) and rf"\{name}{{document}}" in document
    for line in re.findall(r"^\|.*\|$", markdown, re.MULTILINE)[:50]:
        assert line.count(" | ") > 1
    summary = (full / "report" / "summary.txt").read_text()
    assert " ".join(summary.split()[:20]) in " ".join(re.sub(r"\\(.)", r"\1", markdown).split())
    assert max(map(len, summary.splitlines())) <= 100 and "phantoms, not patients" in summary


def test_a_markdown_cell_breaks_no_table():
    table = Table("t", "t", "c", [Column("a", "A"), Column("n", "N", "count")])
    table.add({"a": "x | y\nz", "n": 1234})
    assert table_markdown(table) == "| A | N |\n| --- | --: |\n| x \\| y; z | 1,234 |"


def test_a_wrong_format_is_refused(full, capsys):
    assert cli.main(["report", str(full), "--format=md,pdf"]) == 2
    assert "--format=pdf: one or more of md,tex,csv is accepted" in capsys.readouterr().err
    assert cli.main(["report", str(full), "--out=x"]) == 2
    assert "--out=x: accepted with a second DIR alone" in capsys.readouterr().err


def test_a_grid_agrees_with_itself(full, tmp_path, capsys):
    assert cli.main(["report", str(full), str(full), f"--out={tmp_path / 'same'}"]) == 0
    page = (tmp_path / "same" / "index.html").read_text()
    rows = read(tmp_path / "same" / "tables" / "comparison.csv")
    assert len(rows) == len(stats.read_results(full))
    assert {(r["difference"], r["p"], r["agreement"], r["largest"]) for r in rows} == {("0.0", "1.0", "1.0", "0.0000")}
    assert "0 differ significantly" in page and "100.0 % were answered with the same letter" in page
    assert not (tmp_path / "same" / "tables" / "settings.csv").read_text().strip().splitlines()[1:]


def test_grids_that_differ_are_told_apart(full, tmp_path):
    from report_grids import SKILL

    grid = dict(study__tables=("pairs",), study__targets=TARGETS, study__seeds=(0, 1))
    run = run_of(**grid, train__learning_rate=2e-3, **SIZES)
    worse = make_grid(tmp_path / "worse", run, skill=lambda cell: 1 - SKILL[cell.arm])
    page = write_comparison(full, worse)
    assert page == full / "compare_worse" / "index.html"
    rows = read(page.parent / "tables" / "comparison.csv")
    assert len(rows) == len(stats.read_results(worse)) and {r["test"] for r in rows} == {"McNemar"}
    sure = [r for r in rows if float(r["p_holm"]) < 0.05]
    assert sure and all(r["arm"] != "Trained" for r in sure) and "They do not agree." in page.read_text()
    settings = {r["what"]: (r["a"], r["b"]) for r in read(page.parent / "tables" / "settings.csv")}
    assert settings["train.learning_rate"] == ("0.001", "0.002")
    shutil.rmtree(page.parent)


def test_other_seeds_are_matched_by_their_place(full, tmp_path):
    run = run_of(study__tables=("pairs",), study__targets=TARGETS, study__seeds=(7, 8), **SIZES)
    other = make_grid(tmp_path / "other", run)
    rows = read(write_comparison(full, other, tmp_path / "out").parent / "tables" / "comparison.csv")
    assert {r["seed"] for r in rows} == {"0", "1"} and {r["test"] for r in rows} == {"two proportions"}
    assert {r["agreement"] for r in rows if "agreement" in r} <= {""}


def test_two_proportions_is_the_textbooks():
    # Agresti, An Introduction to Categorical Data Analysis (2nd ed., 2007), 2.2: 189 of 11,034 and 104 of 11,037 heart
    # attacks with placebo and aspirin; chi squared 25.0 without continuity correction.
    from scipy.stats import chi2

    assert two_proportions(189, 11034, 104, 11037) == pytest.approx(chi2.sf(25.01, 1), rel=0.02)
    assert two_proportions(5, 5, 7, 7) == 1.0 and two_proportions(0, 0, 1, 3) == 1.0


def test_a_folder_that_is_no_grid_is_refused(full, tmp_path, capsys):
    assert cli.main(["report", str(full), str(tmp_path)]) == 2
    assert f"{tmp_path} has no config.json: the workdir of a grid is accepted" in capsys.readouterr().err
