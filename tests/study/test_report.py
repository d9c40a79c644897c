"""The page of a grid: whole, self-contained, escaped, the same for the same files, honest about what is missing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from report_grids import make_grid, run_of

from medcg_jax.config import TABLES, DataConfig
from medcg_jax.data.sources import open_source
from medcg_jax.study.report.page import write_report

TARGETS = ("mri-brain-state", "endoscopy-lung-grade")


class Page(HTMLParser):
    """What a page loads, its ids, links and texts; and whether its tags are closed in order."""

    EMPTY = {"meta", "img", "br", "link", "input", "hr"}

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


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A grid of all tables, two targets, two seeds, and its page."""
    run = run_of(study__tables=TABLES, study__targets=TARGETS, study__seeds=(0, 1))
    workdir = make_grid(tmp_path_factory.mktemp("full") / "w", run)
    return workdir, write_report(workdir)


def test_the_page_loads_nothing_from_elsewhere(full):
    workdir, path = full
    text = path.read_text()
    page = Page(text)
    assert path == workdir / "report" / "index.html"
    assert page.loads and all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not page.scripts
    assert not re.findall(r"@import|url\((?!#)", text)
    assert not page.broken and not page.open
    local = {link for link in page.links if not link.startswith("#")}
    assert local and all((path.parent / link).is_file() for link in local)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    named = [name for name in page.ids if not re.fullmatch(r"[mp][0-9a-f]{10}", name)]  # shapes that SVG refers to
    assert len(named) == len(set(named))


def test_every_part_is_there(full):
    page = Page(full[1].read_text())
    wanted = {"asked", "answer", "pairs", "triples", "ablation", "multi-task", "efficiency", "samples", "letters",
              "training", "published", "limits", "made"}  # fmt: skip
    assert wanted <= set(page.ids)
    order = ["asked", "answer", "pairs", "samples", "letters", "published", "limits", "made"]
    assert [name for name in page.ids if name in order] == order
    assert "phantoms, not patients" in page.text
    assert "version 1" in page.text and "not set beside these" in page.text
    for name in ("effects", "pairs_fixed_area", "triples_one_each", "ablation", "efficiency", "letters", "loss_pairs",
                 "multi_task_in_distribution"):  # fmt: skip
        png = full[1].parent / "plots" / f"{name}.png"
        assert Image.open(png).size[0] > 300
        assert png.with_suffix(".svg").read_text().startswith("<?xml")


def test_the_same_files_give_the_same_bytes(tmp_path):
    workdir = make_grid(tmp_path / "w", run_of(study__targets=TARGETS[:1]))
    write_report(workdir)
    folder = workdir / "report"

    def contents():
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = contents()
    (folder / "tables" / "left_over.csv").write_text("of an earlier page")
    write_report(workdir)
    assert contents() == before


def test_samples_are_the_records_themselves(full):
    workdir, path = full
    text = path.read_text()
    cards = re.findall(r'<article class="sample">.*?</article>', text, flags=re.DOTALL)
    assert len(cards) >= 8
    source = open_source(DataConfig(train_records_per_subset=100, test_records_per_subset=24, seed=0))
    for card in cards:
        record_id = re.search(r'<p class="id">(.*?)</p>', card)[1]
        records = source.records(record_id.split("/")[0], "test")
        place = [record.id for record in records.records].index(record_id)
        record = records.records[place]
        shown = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", card)[1])))
        image = Image.fromarray(records.image(place))
        assert shown.size == (160, 160)
        assert shown.resize(image.size, Image.Resampling.NEAREST).tobytes() == image.tobytes()
        assert f"right is <b>{record.answer}</b>" in card
        assert all(option in card for option in record.options)
        answered = re.search(r"answered <b>(.)</b>", card)[1]
        assert (answered == record.answer) == (text.index(card) < text.index("Answered wrongly"))


def test_data_that_changed_are_not_shown(tmp_path):
    run = run_of(study__targets=TARGETS[:1])
    workdir = make_grid(tmp_path / "w", run)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["0"] = "another"
    (workdir / "config.json").write_text(json.dumps(config))
    page = Page(write_report(workdir).read_text())
    assert "the data have changed since the grid (fingerprint another then" in page.text
    assert "img" not in page.tags


HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x.png">&"\'{{ 7*7 }}'


def test_strings_from_the_data_are_escaped(tmp_path):
    run = run_of(name=HOSTILE, study__targets=TARGETS[:1])
    workdir = make_grid(
        tmp_path / "w", run, options_text=lambda text: text + HOSTILE,
        status=lambda cell: f"failed: {HOSTILE}" if "fixed_area" in cell.id and cell.arm == "trained" else "done",
    )  # fmt: skip
    # A target's name goes through every table and figure.
    for path in workdir.rglob("*"):
        if path.suffix in (".csv", ".jsonl"):
            text = path.read_text()
            name = HOSTILE.replace('"', "")
            path.write_text(
                text.replace("mri-brain-state,", f"{name},").replace(
                    '"subset": "mri-brain-state"', f'"subset": "{name}"'
                )
            )
    page = Page(write_report(workdir).read_text())
    assert not page.scripts and not page.broken
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text  # as words


def test_a_partial_grid_says_what_is_missing(tmp_path):
    def status(cell):
        if cell.table == "ablation" or (cell.arm == "baseline_plus" and cell.seed == 1):
            return "waiting"
        return "failed: non-finite loss at step 7" if cell.arm == "trained" and cell.seed == 0 else "done"

    run = run_of(study__tables=("pairs", "ablation"), study__targets=TARGETS[:1], study__seeds=(0, 1))
    workdir = make_grid(tmp_path / "w", run, status=status)
    page = Page(write_report(workdir).read_text())
    assert "4 cells of 42 failed" in page.text
    assert "22 cells of 42 had not been run" in page.text
    assert "Asked for, and without a finished cell: ablation." in page.text
    assert "pairs.fixed_area.mri-brain-state.trained.s0: failed: non-finite loss at step 7" in page.text
    assert "ablation" not in page.ids and "pairs" in page.ids
    # Only seed 1 has Trained and Baseline, none has Trained and Baseline+.
    assert "no training (Baseline)" in page.text and "unrelated ones (Baseline+)" not in page.text
    assert "0, 1 (Baseline+: 0; Trained: 1)" in page.text and "24–48" in page.text


def test_a_grid_without_a_finished_cell_still_has_a_page(tmp_path):
    workdir = make_grid(tmp_path / "w", run_of(study__targets=TARGETS[:1]), status=lambda cell: "waiting")
    page = Page(write_report(workdir).read_text())
    assert "No answer yet" in page.text and "had not been run" in page.text


def test_a_folder_that_is_no_grid_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json: the workdir of a grid is accepted"):
        write_report(tmp_path)
