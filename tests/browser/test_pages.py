"""Every kind of page in a real browser: at three widths, dark, printed, without scripts, by keyboard, with axe."""

import json
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, WIDTHS, chromium, opened

if not CHROMIUM:
    pytest.skip("no Chromium in PATH (Debian: apt install chromium)", allow_module_level=True)
pytest.importorskip("axe_playwright_python", reason="the extra `browser` is not installed")

pytestmark = pytest.mark.long

KINDS = ("report", "subset", "comparison", "models", "data", "benchmark")
FAULTY = """<!doctype html><html lang="en"><head><title>t</title><style>
.scroll {overflow-x: auto} td, th {min-width: 40rem} @media print { .x {display: none} }</style></head>
<body><main><h1>h</h1><img src="gone.png" alt="a"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAAC" >
<p style="color:#ccc;background:#fff">pale</p><div style="width:3000px">wide</div>
<div class="scroll" aria-label="t1"><table><caption>c</caption><thead><tr><th>a</th><th>b</th></tr></thead></table></div>
<details><summary>s</summary><p>folded</p></details>
<a href="gone.html">gone</a> <a href="#nowhere">nowhere</a></main></body></html>"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Kind -> a page of it, as the verbs write them."""
    sys.path.append(str(Path(__file__).parents[1] / "study"))
    from report_grids import bench_result, make_grid, run_of
    from trees import raw_record, write_subset, write_tree_with_boxes

    from medcg_jax.data.stats import write_stats
    from medcg_jax.study.report.bench import write_bench_page
    from medcg_jax.study.report.compare import write_comparison, write_models_page
    from medcg_jax.study.report.page import write_report

    folder = tmp_path_factory.mktemp("pages")
    sizes = {"data__train_records_per_subset": 12, "data__test_records_per_subset": 24}
    run = run_of(study__tables=("pairs", "efficiency"), study__arms=(), study__targets=("mri-brain-state",), **sizes)
    models = ("llava15_tiny", "qwen2_vl_tiny")
    for model in models:
        write_report(
            make_grid(
                folder / "w" / model,
                run_of(study__tables=("triples",), model__name=model, study__targets=("mri-brain-state",), **sizes),
            )
        )
    grids = [
        make_grid(folder / name, run_of(**changes) if changes else run)
        for name, changes in (
            ("a", {}),
            (
                "b",
                {
                    "study__tables": ("pairs",),
                    "study__arms": (),
                    **sizes,
                    "study__targets": ("mri-brain-state",),
                    "train__epochs": 2.0,
                },
            ),
        )
    ]
    root = write_tree_with_boxes(folder / "tree", train=12, test=4, boxes=20)
    write_subset(root, "Subset--08-train", [raw_record(i, image=f"med-mat/eight/{i}.png") for i in range(1, 11)])
    bench = folder / "bench.json"
    bench.write_text(json.dumps(bench_result(8, 1.3)))
    report = write_report(grids[0])
    return {
        "report": report,
        "subset": report.parent / "subsets" / "mri-brain-state.html",
        "comparison": write_comparison(*grids),
        "models": write_models_page(folder / "w", models),
        "data": write_stats(root, folder / "data"),
        "benchmark": write_bench_page([bench]),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_off_missing_or_broken(browser, pages, kind, width):
    with opened(browser, pages[kind], width) as tab:
        assert tab.sideways() <= 0
        assert tab.unreachable() == [] and tab.hidden_columns() == []
        assert width < 1000 or tab.cut_off() == []
        assert tab.missing_pictures() == [] and tab.broken_links() == []
        assert tab.foreign_requests() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_grave(browser, pages, kind, dark):
    for width in (WIDTHS[0], WIDTHS[-1]):
        with opened(browser, pages[kind], width, dark=dark, scripts=True) as tab:
            tab.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert tab.findings() == []


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_printed(browser, pages, kind, tmp_path):
    with opened(browser, pages[kind], WIDTHS[-1]) as tab:
        assert tab.folded_when_printed() == 0
        assert tab.cut_off_when_printed() == []
        tab.page.pdf(path=tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 5_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_keyboard_reaches_the_results_and_the_first_words_say_them(browser, pages, kind):
    with opened(browser, pages[kind], WIDTHS[0]) as tab:
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement.className") == "skip"
        tab.page.keyboard.press("Enter")
        assert tab.page.url.endswith("#main")
        names = tab.page.evaluate("['main', 'header', 'h1'].map(n => document.querySelectorAll(n).length)")
        assert names == [1, 1, 1]
        empty = "[...document.querySelectorAll('th')].filter(h => !h.textContent.trim()).length"
        assert tab.page.evaluate(empty) == 0
        without = "[...document.querySelectorAll('table')].filter(t => !t.caption).length"
        assert tab.page.evaluate(without) == 0


def test_verdict_and_numbers_stand_on_the_first_screen(browser, pages):
    for width in WIDTHS:
        with opened(browser, pages["report"], width) as tab:
            ends = {
                name: tab.page.evaluate(f"document.querySelector('{name}').getBoundingClientRect().bottom")
                for name in (".verdict", ".fromto", ".scale", ".change", ".teaser img")
            }
            # A phone's screen is some 840 pixels high; there the picture begins on it.
            assert max(ends[name] for name in (".verdict", ".fromto", ".scale", ".change")) < 700, ends
            assert ends[".teaser img"] < 900, ends


def test_faults_are_found(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(FAULTY)
    with opened(browser, path, 390, scripts=True) as tab:
        assert tab.sideways() > 2000 and tab.cut_off() == ["t1"]
        assert tab.unreachable() == ["t1"] and tab.hidden_columns() == ["c"]
        assert "gone.png" in tab.missing_pictures() and tab.broken_links() == ["gone.html", "#nowhere"]
        assert tab.folded_when_printed() == 1 and tab.cut_off_when_printed() == ["t1"]
        rules = " ".join(tab.findings())
        assert "color-contrast" in rules and "image-alt" in rules
    path.write_text(FAULTY.replace("gone.png", "http://127.0.0.1:9/x.png"))
    with opened(browser, path, 390) as tab:
        assert any("127.0.0.1" in url for url in tab.foreign_requests())
