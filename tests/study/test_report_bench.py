"""Plots of `medcg bench`'s results."""

import json

import pytest

from medcg_jax.cli import main
from medcg_jax.study.report.bench import rates


def spread(value: float) -> dict:
    return {"median": value, "min": 0.9 * value, "max": 1.2 * value, "n": 5}


def result(batch: int, ratio: float, device: str = "cpu") -> dict:
    port = {"step_s": spread(0.5), "cpu_s": spread(1.0), "num_samples": batch}
    return {
        "model": "llava15_bench", "stages": ["train"], "device": device,
        "train": {"batch": {"size": batch}, "runners": {"port": port}},
        "ratios": {"train_vs_eager": {**spread(ratio), "by": "cpu" if device == "cpu" else "wall"}},
    }  # fmt: skip


def write(path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_ratios_and_throughput_of_two_results_are_plotted(tmp_path, capsys):
    files = [write(tmp_path / f"b{batch}.json", result(batch, 1.23 * batch)) for batch in (8, 32)]
    assert main(["report", *files, f"--out={tmp_path / 'plots'}"]) == 0
    names = ("bench_ratios.png", "bench_ratios.svg", "bench_throughput.png", "bench_throughput.svg")
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / name) for name in names]
    ratios = (tmp_path / "plots" / "bench_ratios.svg").read_text()
    for text in ("training step / HF eager", "9.84", "39.4", "llava15_bench, batch 8", "llava15_bench, batch 32",
                 "CPU-second"):  # fmt: skip
        assert text in ratios
    assert (tmp_path / "plots" / "bench_throughput.png").stat().st_size > 5000
    # Without --out: beside the file.
    assert main(["report", files[0]]) == 0 and (tmp_path / "bench_ratios.png").is_file()


def test_rates_are_by_cpu_time_on_a_cpu_alone():
    assert rates(result(8, 1.0))["port"] == pytest.approx((8.0, 8 / 1.2, 8 / 0.9))
    assert rates(result(8, 1.0, "NVIDIA H200"))["port"][0] == 16.0


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
    assert message in error and error.count("\n") == 1
