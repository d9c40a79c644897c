"""The page of a grid: whole, self-contained, the same for the same files, honest about what is missing."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from report_grids import FULL_TARGETS, SIZES, change_config, make_grid, quick, read_csv, run, run_of, write_controls

from medcg_jax.data.sources import open_source
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.page import whole_folder, write_report
from medcg_jax.study.report.plots import gains_by_target, triplets_of
from medcg_jax.study.report.samples import embedded, shown_cell
from medcg_jax.study.stats.grid_files import read_results
from medcg_jax.untrusted import FileError

TARGET = FULL_TARGETS[0]


class Page(HTMLParser):
    """What a page loads, its ids, links and texts; and whether its tags are closed in order."""

    EMPTY = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.ids, self.links, self.tags, self.scripts, self.words = [], [], [], [], 0, []
        self.open, self.broken = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.scripts += tag == "script" or any(name.startswith("on") for name in attrs)
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "action", "poster") if name in attrs]
        if tag == "a":
            self.links.append(attrs["href"])
        elif "href" in attrs or "xlink:href" in attrs:
            self.loads.append(attrs.get("href") or attrs["xlink:href"])
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def quick_page(workdir: Path) -> Page:
    with quick():
        return Page(write_report(workdir).read_text())


def test_the_page_loads_nothing_from_elsewhere(full_grid):
    path = full_grid / "report" / "index.html"
    page = Page(path.read_text())
    assert page.loads and all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not page.scripts and not page.broken and not page.open
    assert not re.findall(r"@import|url\((?!#)", path.read_text())
    local = {link for link in page.links if not link.startswith("#")}
    assert local and all((path.parent / link).is_file() for link in local)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    named = [name for name in page.ids if not re.fullmatch(r"[mp][0-9a-f]{10}", name)]  # shapes that SVG refers to
    assert len(named) == len(set(named))


def test_every_section_and_plot_is_there(full_grid):
    folder = full_grid / "report"
    page = Page((folder / "index.html").read_text())
    order = ["asked", "answer", "pairs", "triples", "ablation", "multi-task", "efficiency", "map", "samples", "subsets",
             "letters", "calibration", "base", "training", "published", "limits", "made", "choices"]  # fmt: skip
    assert [name for name in page.ids if name in order] == order
    assert "phantoms, not patients" in page.text
    assert "version 1" in page.text and "not set beside these" in page.text
    for name in ("effects", "pairs_fixed_area", "triples_one_each", "ablation", "figure4", "efficiency", "letters",
                 "reliability", "risk_coverage", f"efficiency_{TARGET}", "loss_pairs", "multi_task_in_distribution", "map"):  # fmt: skip
        assert Image.open(folder / "plots" / f"{name}.png").size[0] > 300
        assert (folder / "plots" / f"{name}.svg").read_text().startswith("<?xml")
    table = (folder / "index.html").read_text().partition('id="table-pairs-fixed-area"')[2].partition("</table>")[0]
    assert table.count('<th scope="row"') == len(FULL_TARGETS)
    assert all(f'<a href="subsets/{name}.html">{name}</a>' in table for name in FULL_TARGETS)


def test_the_same_files_give_the_same_bytes_wherever_they_lie(clean_grid, tmp_path):
    def contents(workdir):
        folder = workdir / "report"
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    copies = tmp_path / "a", tmp_path / "elsewhere" / "b"
    for copy in copies:
        shutil.copytree(clean_grid, copy)
        write_report(copy, ("md", "tex"))
    ours, theirs = map(contents, copies)
    assert ours == theirs
    assert {"index.html", "summary.txt", "report.md", "report.tex", f"subsets/{TARGET}.html"} <= ours.keys()
    assert not [name for name, data in ours.items() if str(tmp_path).encode() in data]


def test_samples_are_the_records_themselves(full_grid):
    text = (full_grid / "report" / "index.html").read_text()
    cards = re.findall(r'<article class="sample">.*?</article>', text, flags=re.DOTALL)
    assert len(cards) >= 8
    source = open_source(run_of(**SIZES).data)
    for card in cards:
        record_id = re.search(r'<p class="id">(.*?)</p>', card)[1]
        records = source.records(record_id.split("/")[0], "test")
        number = [record.id for record in records.records].index(record_id)
        record, image = records.records[number], Image.fromarray(records.image(number))
        shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", card)[1])))
        assert shown.size == (160, 160)
        assert shown.resize(image.size, Image.Resampling.NEAREST).tobytes() == image.tobytes()
        assert f"right is <b>{record.answer}</b>" in card
        assert all(option in card for option in record.options)
        answered = re.search(r"answered <b>(.)</b>", card)[1]
        assert (answered == record.answer) == (text.index(card) < text.index("Answered wrongly"))
    # All are of one model, which is named: no record is answered rightly and wrongly.
    ids = re.findall(r'<article class="sample">.*?<p class="id">(.*?)</p>', text, flags=re.DOTALL)
    assert len(set(ids)) == len(ids) == len(cards)
    name = re.search(r"with the answers of Trained \(pairs, (.*?)/(.*?), seed 0; trained on (.*?)\)", text)
    grid = Grid(full_grid)
    (cell,) = [
        c for c in grid.done("pairs")
        if (c["arm"], c["seed"], c["related"].replace("+", " + ")) == ("trained", "0", name[3])
        and c["row"] == f"{name[1].replace(' ', '_').removesuffix('_pair').replace('-', '_')}/{name[2]}"
    ]  # fmt: skip
    answers = {line["id"]: line["predicted"] for line in grid.predictions(cell["cell"])}
    shown = dict(zip(ids, re.findall(r"answered <b>(.)</b>", text), strict=True))
    assert {record: answers[record] for record in ids} == shown


def test_the_model_shown_is_the_median_one():
    def grid(*correct, seeds=(0,)):
        cells = [
            {"cell": f"c{i}.{seed}", "table": "pairs", "row": f"fixed_area/x{i}", "arm": "trained", "seed": str(seed),
             "related": "a+b", "target": "x"}
            for seed in seeds for i in range(len(correct))
        ]  # fmt: skip
        results = [
            {"cell": cell["cell"], "target": "x", "n": 10, "correct": count}
            for cell, count in zip(cells, correct * len(seeds), strict=True)
        ]
        return SimpleNamespace(done=lambda table: cells if table == "pairs" else [], results=results, seeds=seeds)

    assert shown_cell(grid(9, 2, 5))["cell"] == "c2.0" and shown_cell(grid(9, 2, 5, 4))["cell"] == "c3.0"
    assert shown_cell(grid(9, 2, 5, seeds=(0, 1)))["cell"] == "c2.0" and shown_cell(grid(7))["cell"] == "c0.0"
    assert shown_cell(grid(9, 2, 5), "x")["cell"] == "c2.0" and shown_cell(grid(9, 2, 5), "y") is None


def test_every_tested_subset_has_a_page_with_its_mistakes(full_grid, full_summary):
    folder = full_grid / "report"
    assert {path.stem for path in (folder / "subsets").glob("*.html")} == {
        row["target"] for row in read_results(full_grid)
    }
    page, grid = (folder / "subsets" / f"{TARGET}.html").read_text(), full_summary[0]
    cell = shown_cell(grid, TARGET)
    assert (cell["table"], cell["arm"], cell["seed"], cell["target"]) == ("pairs", "trained", "0", TARGET)
    answers = grid.predictions(cell["cell"])
    wrong = [r for r in answers if r["predicted"] != r["answer"]]
    assert f"{len(wrong)} of {len(answers)} answers of Trained" in page
    shown = re.findall(r'<p class="id">(.*?)</p>', page)
    assert len(shown) == min(12, len(wrong)) and set(shown) <= {r["id"] for r in wrong}
    assert page.count("data:image/png;base64,") == len(shown) and "../index.html" in page
    sure = [int(x) for x in re.findall(r'class="picked[^>]*><b>.</b>[^<]*<span class="num">(\d+) %', page)]
    assert sure == sorted(sure, reverse=True)


def test_controls_are_shown_and_a_leak_of_answers_is_marked(full_grid, tmp_path):
    again = {(r["table"], r["arm"]): r for r in read_csv(full_grid / "report" / "tables" / "controls_again.csv")}
    trained = again["pairs", "Trained"]
    results = [r for r in read_results(full_grid) if (r["table"], r["arm"]) == ("pairs", "trained")]
    plain = sum(r["correct"] for r in results) / sum(r["n"] for r in results)
    assert float(trained["plain"]) == float(trained["circular"]) == pytest.approx(plain)
    assert abs(float(trained["shuffled_images"]) - float(trained["chance"])) < 0.15
    letters = {(r["table"], r["arm"]): r for r in read_csv(full_grid / "report" / "tables" / "controls.csv")}
    letters = letters["pairs", "Trained"]
    assert float(letters["accuracy"]) == pytest.approx(plain) and 0.9 < float(letters["agreement"]) < 1
    sighted = make_grid(tmp_path / "w", run_of(study__targets=(TARGET,), **SIZES))
    write_controls(sighted, 0, blind=False)
    with quick():
        write_report(sighted)
    for workdir, is_marked in ((sighted, True), (full_grid, False)):
        page = (workdir / "report" / "index.html").read_text()
        table = page.partition('id="table-controls-again"')[2].partition("</table>")[0]
        assert ('class="score loss"' in table) == is_marked


def test_the_map_has_the_mean_gain_of_every_target(full_grid, full_summary):
    grid, summary = full_summary
    gains, against = gains_by_target(summary)
    tested = {row["target"] for row in grid.results}
    assert against == ("Trained", "Baseline+") and set(gains) == set(FULL_TARGETS) < tested
    rows = [r for r in summary["rows"] if (r["table"], r["arm"], r["against"]) == ("pairs", "trained", "baseline_plus")]
    differences = [r["difference"] for r in rows if r["target"] == TARGET]
    assert gains[TARGET] == pytest.approx(sum(differences) / len(differences))
    svg = (full_grid / "report" / "plots" / "map.svg").read_text()
    assert all(f"+{100 * gain:.1f}" in svg for gain in gains.values())
    # Multi-task tests subsets which pairs do not.
    assert "no target of this comparison" in (full_grid / "report" / "index.html").read_text()
    assert {"ct-brain-det", "ct-brain-state"} <= triplets_of(grid).keys()


def test_markdown_and_latex_hold_every_table(full_grid):
    texts = {name: (full_grid / "report" / name).read_text() for name in ("report.md", "report.tex", "summary.txt")}
    names = [path.stem for path in (full_grid / "report" / "tables").glob("*.csv")]
    markdown, document = texts["report.md"], texts["report.tex"]
    assert markdown.count("\n## ") == document.count(r"\section*{") == len(names)
    for name in ("begin", "end"):
        assert document.count(rf"\{name}{{longtable}}") == len(names) and rf"\{name}{{document}}" in document
    assert all(line.count(" | ") > 1 for line in re.findall(r"^\|.*\|$", markdown, re.MULTILINE)[:50])
    summary = texts["summary.txt"]
    assert " ".join(summary.split()[:20]) in " ".join(re.sub(r"\\(.)", r"\1", markdown).split())
    assert max(map(len, summary.splitlines())) <= 100 and "phantoms, not patients" in summary


def test_data_that_changed_are_not_shown(tmp_path):
    workdir = make_grid(tmp_path / "w", run_of(study__targets=(TARGET,), **SIZES))
    change_config(workdir, data={"0": "another"})
    page = quick_page(workdir)
    assert "the data have changed since the grid (fingerprint another then" in page.text and "img" not in page.tags


def test_a_partial_grid_says_what_is_missing(tmp_path):
    def status(cell):
        if cell.table == "ablation" or (cell.arm == "baseline_plus" and cell.seed == 1):
            return "waiting"
        return "failed: non-finite loss at step 7" if cell.arm == "trained" and cell.seed == 0 else "done"

    run = run_of(study__tables=("pairs", "ablation"), study__targets=(TARGET,), study__seeds=(0, 1), **SIZES)
    page = quick_page(make_grid(tmp_path / "w", run, status=status))
    assert "4 cells of 46 failed" in page.text
    assert "26 cells of 46 had not been run" in page.text
    assert "Asked for, and without a finished cell: ablation." in page.text
    assert "pairs.fixed_area.mri-brain-state.trained.s0: failed: non-finite loss at step 7" in page.text
    assert "ablation" not in page.ids and "pairs" in page.ids
    # Only seed 1 has Trained and Baseline, none has Trained and Baseline+.
    assert "no training (Baseline)" in page.text and "unrelated ones (Baseline+)" not in page.text
    assert "0, 1 (Baseline+: 0; Trained: 1)" in page.text and "24–48" in page.text


def test_a_grid_without_a_finished_cell_still_has_a_page(tmp_path):
    page = quick_page(make_grid(tmp_path / "w", run_of(study__targets=(TARGET,)), status=lambda cell: "waiting"))
    assert "No answer yet" in page.text and "had not been run" in page.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format=md,pdf"], "--format=pdf: expected one or more of md,tex,csv"),
        (["--out=x"], "--out=x: "),
        (["other", "third"], "one or two grids"),
        (["nowhere"], "nowhere: no such folder; expected the workdir of a grid"),
    ],
)
def test_wrong_flags_and_folders_are_refused(clean_grid, flags, words):
    status, said = run("report", str(clean_grid), *flags)
    assert status == 2 and words in said and said.count("\n") == 1
    assert not (clean_grid / "report").exists()


def test_a_folder_takes_the_place_of_another_at_the_end(tmp_path):
    folder = tmp_path / "report"
    (folder / "plots").mkdir(parents=True)
    for name in ("index.html", "plots/old", "mine"):
        (folder / name).write_text("")
    before = names_in(tmp_path)
    with pytest.raises(OSError, match="disk"), whole_folder(folder) as part:
        (part / "new").write_text("")
        raise OSError("disk")
    assert names_in(tmp_path) == before
    with whole_folder(folder) as part:
        (part / "index.html").write_text("new")
        assert names_in(folder) == ["index.html", "mine", "plots", "plots/old"]
    # What a reader has laid beside the page moves along.
    assert names_in(tmp_path) == ["report", "report/index.html", "report/mine"]
    assert (folder / "index.html").read_text() == "new"


def test_a_report_that_fails_at_its_very_end_leaves_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "index.html").write_text("old")
    renamed = Path.rename

    def no_second(path, target):
        if Path(target) == folder and (path / "new").exists():
            raise OSError("the machine is away")
        return renamed(path, target)

    monkeypatch.setattr(Path, "rename", no_second)
    with pytest.raises(OSError, match="away"), whole_folder(folder) as part:
        (part / "new").write_text("")
    assert (folder / "index.html").read_text() == "old"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_report_is_not_replaced(tmp_path, kind):
    folder, other = tmp_path / "report", tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    if kind == "folder":
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    elif kind == "file":
        folder.write_text("mine")
    else:
        folder.symlink_to(other)
    before = names_in(tmp_path)
    with pytest.raises(FileError, match="holds no report"), whole_folder(folder):
        pytest.fail("the block was entered")
    assert names_in(tmp_path) == before


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_large_images_are_small_in_the_page():
    smooth = np.linspace(0, 255, 900 * 700 * 3).astype(np.uint8).reshape(900, 700, 3)
    address = embedded(smooth)
    kind, _, data = address.partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg" and max(picture.size) == 320 and len(address) < 60_000
    noise = np.random.default_rng(0).integers(0, 255, (900, 700, 3)).astype(np.uint8)
    assert len(embedded(noise)) < 60_000  # the worst that there is
    assert embedded(noise[:64, :64]).startswith("data:image/png;")  # a small one keeps every pixel
