"""The page of `medcg bench`'s results."""

import json

import pytest
from report_grids import bench_result, read_csv
from test_report import Page

from medcg_jax.cli import main
from medcg_jax.study.report.bench import bar_of, where


def write(path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_two_results_make_a_page_with_plots_and_tables(tmp_path, capsys):
    files = [write(tmp_path / f"b{batch}.json", bench_result(batch, 1.23 * batch)) for batch in (8, 32)]
    out = tmp_path / "page"
    assert main(["report", *files, f"--out={out}"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "index.html")]
    names = {path.name for path in (out / "plots").iterdir()}
    assert names == {f"bench_{name}.{end}" for name in ("ratios", "train") for end in ("png", "svg")}
    ratios = (out / "plots" / "bench_ratios.svg").read_text()
    for text in (
        "training step / HF eager",
        "9.84",
        "39.36",
        "batch 8",
        "batch 32",
        "n 5",
        "CPU-second",
        "torch 2.13.0",
    ):
        assert text in ratios, text
    page = Page((out / "index.html").read_text())
    assert not page.scripts and not page.broken and all(load.startswith("#") for load in page.loads)
    assert all((out / link).is_file() for link in page.links if not link.startswith("#"))
    for text in ("llava15_bench, batch 8", "cpu, float32, jax 0.10.2, torch 2.13.0", "a note <b>"):
        assert text in page.text
    rows = read_csv(out / "tables" / "ratios.csv")
    assert [(row["ratio"], row["n"], row["by"]) for row in rows] == [
        ("9.84", "5", "CPU-second"),
        ("39.36", "5", "CPU-second"),
    ]
    # Without --out: a folder beside the file, named after it.
    assert main(["report", files[0]]) == 0 and (tmp_path / "b8_report" / "index.html").is_file()


def test_the_two_sides_have_two_colours(tmp_path):
    path = write(tmp_path / "b.json", bench_result(8, 1.5))
    assert main(["report", path, f"--out={tmp_path}"]) == 0
    svg = (tmp_path / "plots" / "bench_train.svg").read_text()
    assert "#0072b2" in svg and "#d98200" in svg and "this port" in svg and "PyTorch" in svg


def test_rates_are_by_cpu_time_on_a_cpu_alone():
    def bar(device):
        result = bench_result(8, 1.0, device)
        return bar_of(result, "port", result["train"]["runners"]["port"])

    assert bar("cpu")[2:] == pytest.approx((8.0, 8 / 1.2, 8 / 0.9, 5))
    assert bar("NVIDIA H200").middle == 16.0
    assert where(bench_result(8, 1.0) | {"num_devices": 4}).startswith("4 x cpu, float32")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("{", [], "no JSON: "),
        ("[]", [], "holds a list; expected an object"),
        ('{"ratios": {}, "stages": ["loader"], "model": "llava15_tiny", "device": "cpu"}', [], "nothing to plot"),
        ("{}", ["--format=md"], "expected with a grid only"),
    ],
)
def test_other_files_are_refused(content, flags, message, tmp_path, capfd):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["report", str(path), *flags]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.glob("*_report"))
