"""Names from a manifest, labels and questions are text in every form of a report, whatever they hold."""

import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import pyplot as plt
from report_grids import change_config, json_lines, make_grid, quick, run_of, write_json_lines
from test_report import PAPERS, Page

from medcg_jax.cli import main
from medcg_jax.study.report.drawing import draw
from medcg_jax.study.report.escape import csv_cell, file_names, latex, markdown, plain, short_label
from medcg_jax.study.report.page import write_report
from medcg_jax.study.report.samples import ANSWER, with_boxes

# A subset's name, its modality, area and task; the name stands in CSV files too.
NAMES = {
    "mri-brain-state": (
        "=cmd|' C calc'!A0 ${{7*7}} a_b^c \\frac{1}{0}", "<script>alert(1)</script>", "cost $5 or $\\undefined{x}$",
        "![x](http://evil.example/x.png) [a](javascript:alert(1))",
    ),
    "oct-liver-stage": ("שלום مرحبا 😀", "+1 & %x% ~", "x" * 200, "@SUM(1) | `code` *b* <b>"),
}  # fmt: skip
OPTION = ' <img src=x onerror=alert(1)> $x_1$ "quoted" \x02\x0b\u202e'

STATUS = "<script>alert(2)</script> {{ 7*7 }}"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a finished grid whose data come from a tree with such a manifest."""
    folder = tmp_path_factory.mktemp("hostile")
    run = run_of(
        name="grid $x$ <b> \x03", study__tables=("pairs", "efficiency"), study__targets=tuple(NAMES),
        study__efficiency_records=(0, 10), data__train_records_per_subset=20, data__test_records_per_subset=6,
    )  # fmt: skip
    workdir = make_grid(
        folder / "w", run, options_text=lambda text: text + OPTION,
        status=lambda cell: f"failed: {STATUS}" if "fixed_task" in cell.id and cell.arm == "trained" else "done",
    )  # fmt: skip
    for path in workdir.rglob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([row[0], *map(renamed, row[1:])] for row in rows)
    for path in workdir.rglob("*.jsonl"):
        lines = [line | {key: renamed(line[key]) for key in ("subset",) if key in line} for line in json_lines(path)]
        write_json_lines(path, lines)
    tree = folder / "tree"
    tree.mkdir()
    keys = ("subset", "modality", "area", "task")
    entries = [dict(zip(keys, words, strict=True)) for words in NAMES.values()]
    (tree / "manifest.json").write_text(json.dumps({"subsets": entries}))
    change_config(workdir, {"source": "release", "root": str(tree)})
    assert main(["report", str(workdir), "--format=md,tex,csv"]) == 0
    return workdir / "report"


def renamed(text: str) -> str:
    """A field of the grid's files with the targets' hostile names."""
    for name, (hostile, *_) in NAMES.items():
        text = re.sub(rf"(?<![\w.-]){name}(?![\w.-])", lambda _, new=hostile: new, text)
    return text


def test_every_file_is_text_that_xml_and_spreadsheets_take(report):
    for path in report.rglob("*"):
        if path.suffix in (".html", ".svg", ".csv", ".tex", ".md", ".txt"):
            text = path.read_text(encoding="utf-8")
            assert plain(text) == text, path
            assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202e\ud800]", text), path
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_bytes())


def test_the_pages_run_and_load_nothing(report):
    pages = [report / "index.html", *(report / "subsets").iterdir()]
    assert len(pages) > 2
    for path in pages:
        page = Page(path.read_text())
        assert not page.scripts and not page.broken and not page.open, path
        assert all(load.startswith(("data:image/", "#")) for load in page.loads)
        links = {link for link in page.links if not link.startswith("#")} - PAPERS
        assert all((path.parent / link).is_file() for link in links), path
    text = Page(pages[0].read_text()).text
    assert "<script>alert(1)</script>" in text and STATUS in text  # as words
    assert "cost $5 or $\\undefined{x}$" in "".join(Page(p.read_text()).text for p in pages)


def test_figures_show_the_names_as_they_are(report):
    svg = (report / "plots" / "pairs_fixed_area.svg").read_text()
    assert "$\\undefined{x}$" in svg or "a_b^c" in svg
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    # Beside an axis a name takes two lines.
    assert "=cmd|' C calc'!A0 ${{7*7}} a_b^c" in " ".join(texts)
    assert max(map(len, texts)) <= 60
    assert any("שלום" in text and "😀" in text for text in texts)


def test_tables_for_people_hold_no_formula_and_their_numbers_are_numbers(report):
    seen = set()
    for path in (report / "tables").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        for row in rows:
            for name, value in zip(header, row, strict=True):
                seen.add(value[:2])
                if value.startswith(("=", "+", "-", "@", "\t", "\r")):
                    assert name == "largest" or float(value) is not None, (path, name)
        if path.name == "effects.csv":
            assert any(float(row[header.index("ci_low")]) < 0 for row in rows)
    assert "'=" in seen


def test_markdown_and_latex_hold_no_marks_of_the_names(report):
    text = (report / "report.md").read_text()
    assert "<script>" not in text and "<img" not in text and "](" not in re.sub(r"\\.", "", text)
    assert r"\<script\>alert(1)" in text
    tex = (report / "report.tex").read_text()
    body = tex.partition(r"\begin{document}")[2]
    assert r"\frac" not in body and r"\undefined" not in body and r"\textbackslash{}frac\{1\}\{0\}" in body
    assert r"\begin{tabular}" in (report / "tables" / "cells.tex").read_text()
    assert not re.search(r"\\\\\s*\n[\[*]", body)  # a row that begins so were an argument of the one before


@pytest.mark.parametrize(
    "name",
    ["$", "$a$ $", "\\$", "a_b^c{", "%&#~", "x" * 5000, "a\nb\r\nc", "\x00\x01\x1f", "\ud800", "שלום", "😀", "\u202ea",
     "-->", "]]>", "", " ", "#0072b2", "</text><script>", "font: 9px x;", "<metadata>", '<g id="'],
)  # fmt: skip
def test_any_name_can_be_drawn(tmp_path, name, recwarn):
    def paint(axes):
        axes.plot([0, 1], [0, 1], label=short_label(name))
        axes.set_yticks([0, 1], [short_label(name), "b"])
        axes.text(0, 0, short_label(name))
        axes.figure.legend()

    made = draw(tmp_path, "figure", name, "", 1.5, paint, 2.0)
    root = ElementTree.fromstring((tmp_path / "figure.svg").read_bytes())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    shown, title = short_label(name), short_label(name, 20)
    assert not shown or (texts.count(shown) >= 3 and title in texts), texts
    assert (tmp_path / "figure.png").stat().st_size > 500
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    ElementTree.fromstring(made.svg.replace("xlink:", "").replace("&nbsp;", " "))
    assert not plt.get_fignums()


def test_each_form_has_its_own_marks():
    assert [csv_cell(x) for x in ("-0.5", -0.5, "-a", "a=b")] == ["-0.5", -0.5, "'-a", "a=b"]
    marks = ("=", "+", "@", "\t", "\r")
    assert [csv_cell(mark + "1+1") for mark in marks] == [f"'{mark}1+1" for mark in marks]
    assert csv_cell("−1.5") == "−1.5" and csv_cell("1\n2") == "1; 2" and csv_cell("\x00") == "\ufffd"
    assert markdown("<b>[a](b)|`c`*d*_e_\\ #1") == r"\<b\>\[a\](b)\|\`c\`\*d\*\_e\_\\ \#1"
    assert latex('[x] & 5 % $y$ ^ ~ \\ "|`') == (
        r"{}[x] \& 5 \% \$y\$ \textasciicircum{} \textasciitilde{} \textbackslash{} \textquotedbl{}\textbar{}"
        r"\textasciigrave{}"
    )
    assert plain("a\tb\nc\rd é 漢 😀") == "a\tb\nc\rd é 漢 😀" and plain("\x00\x1b\ufffe") == "\ufffd" * 3


def test_names_of_files_are_safe_and_differ():
    names = ["a b", "a_b", "A_B", "../x", "x" * 300, "x" * 301, ".", "\ud800"]
    files = file_names(names)
    assert files["a b"] == "a_b" and files["../x"] == ".._x"
    assert len({file.lower() for file in files.values()}) == len(names) and all("/" not in f for f in files.values())
    assert max(map(len, files.values())) < 120


def test_boxes_are_seen_on_a_photograph_and_none_beside_it_fails():
    picture = with_boxes(np.zeros((3000, 2000, 3), np.uint8), [(100, 100, 900, 900)], [(-1e15, -5, 1e15, 2e9)])
    assert picture.shape == (320, 213, 3)
    colour = np.array([0x00, 0x9E, 0x73])
    assert (picture[:, 10:12] == colour).all(-1).any() and len(ANSWER) == 7


def test_a_report_never_writes_outside_its_folder(tmp_path):
    workdir = make_grid(tmp_path / "w", run_of(study__targets=("mri-brain-state",), data__test_records_per_subset=6))
    for path in workdir.glob("*.csv"):
        path.write_text(path.read_text().replace("/mri-brain-state,", "/../../../../x,"))
    before = set(tmp_path.rglob("*"))
    with quick():
        page = write_report(workdir)
    after = {path for path in tmp_path.rglob("*") if workdir / "report" not in (path, *path.parents)}
    assert after == before and page == Path(workdir / "report" / "index.html")
