"""A report appears whole or not at all; what is broken is refused by its place; images and map say what they hold."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_grids import make_grid, run_of

from medcg_jax import cli
from medcg_jax.study.report.figures import gains_by_target, triplet_map, triplets_of
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.page import whole_folder, write_report
from medcg_jax.study.report.plots import Plots
from medcg_jax.study.report.samples import embedded
from medcg_jax.study.stats import stats
from medcg_jax.untrusted import FileError

TARGETS = ("mri-brain-state", "oct-eye-stage")
SIZES = dict(data__train_records_per_subset=20, data__test_records_per_subset=24)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    run = run_of(study__tables=("pairs", "multi_task"), study__targets=TARGETS, **SIZES)
    return make_grid(tmp_path_factory.mktemp("whole") / "w", run)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ('{"id": "x", "sub', "line 1 column 13"),
        ('{"id": "x"}', "subset is missing: text is accepted"),
        ("7", "holds a number; an object is accepted"),
    ],
)
def test_a_broken_prediction_is_refused_by_file_and_line_and_the_report_before_stays(tmp_path, capsys, broken, words):
    workdir = make_grid(tmp_path / "w", run_of(study__targets=TARGETS[:1], **SIZES))
    before = write_report(workdir).read_bytes()
    path = sorted((workdir / "predictions").glob("*.jsonl"))[2]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], broken, *lines[5:]]) + "\n")
    assert cli.main(["report", str(workdir)]) == 2
    said = capsys.readouterr().err
    assert f"{path}, line 5: " in said and words in said and said.count("\n") == 1
    assert (workdir / "report" / "index.html").read_bytes() == before
    assert not [p for p in workdir.iterdir() if p.name.startswith(".report")]


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


def test_the_map_hatches_what_is_no_target_of_its_comparison_and_says_so(grid, tmp_path):
    made = Grid(grid)
    plots = Plots(made, stats.summarise(grid), tmp_path)
    (figure,) = triplet_map(plots)
    gains, _ = gains_by_target(plots.summary)
    tested = {row["target"] for row in made.results}
    assert set(gains) == set(TARGETS) < tested  # multi-task tests subsets which pairs do not
    assert "no target of this comparison" in figure.caption and "not tested" not in figure.caption
    assert {"ct-brain-det", "ct-brain-state"} <= triplets_of(plots).keys()


def test_the_page_links_targets_to_their_pages_and_has_row_headers(grid):
    page = write_report(grid).read_text()
    table = page.partition('id="table-pairs-fixed-area"')[2].partition("</table>")[0]
    assert table.count('<th scope="row"') == len(TARGETS)
    assert all(f'<a href="subsets/{name}.html">{name}</a>' in table for name in TARGETS)
    multi = page.partition('id="table-multi-task-in-distribution"')[2].partition("</table>")[0]
    assert "Points over Single-task" in multi and "Seconds" in multi
