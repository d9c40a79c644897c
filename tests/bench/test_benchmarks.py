"""The evidence scripts of benchmarks/: what each counts and compares, at a tiny size; and their page."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from trees import raw_record, write_subset

from benchmarks import __main__ as page
from benchmarks import cells, duplicates, grid_tests, loader, startup
from medcg_jax.config_file import load
from medcg_jax.data.layouts import Layout
from medcg_jax.data.prepare import prepare

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT / 'configs' / 'phantom.py'}:tiny"


def test_the_page_is_what_is_measured():
    measured = json.loads((page.FOLDER / "measured.json").read_text())
    written = (page.FOLDER / "README.md").read_text(encoding="utf-8")
    assert written == page.table(measured), "run: python -m benchmarks"
    with pytest.raises(ValueError, match="meshes.py"):
        page.table([entry for entry in measured if "benchmarks.meshes" not in entry["command"]])


@pytest.mark.long
def test_both_sides_make_the_same_steps(monkeypatch):
    runs = []
    start = cells.Training.run

    def run(self, num_steps):
        start(self, num_steps)
        runs.append((self.num_cells, num_steps, self.state.step.tolist()))

    monkeypatch.setattr(cells.Training, "run", run)
    small = dict.fromkeys(("train.batch_size", "base.batch_size", "eval.batch_size"), "8")
    figures = cells.bench_cells(load(CONFIG, small), num_cells=2, num_steps=1, num_blocks=2)
    assert [m[:2] for m in runs] == [(2, 2), (1, 2), (2, 1), (1, 2), (2, 1), (1, 2)]
    assert runs[-2][2] == [4, 4] and runs[-1][2] == 6
    assert {len(s) for s in (*figures["wall_s"].values(), *figures["cpu_s"].values())} == {2}
    medians = [sum(figures["wall_s"][name]) / 2 for name in ("at_once", "one_by_one")]
    assert figures["ratio"] == pytest.approx(medians[0] / medians[1])


def test_the_command_leaves_its_numbers(tmp_path, monkeypatch, capsys):
    seen = {}

    def measured(run, *, num_cells):
        seen["cells"] = num_cells
        seconds = {"at_once": [3.0], "one_by_one": [2.0]}
        times = {"wall_s": seconds, "cpu_s": seconds, "ratio": 1.5, "ratio_cpu": 1.5}
        return {"num_cells": num_cells, "num_steps": 10} | times

    monkeypatch.setattr(cells, "bench_cells", measured)
    file = tmp_path / "out.json"
    assert cells.main([f"--config={CONFIG}", "--cells=3", f"--json={file}"]) == 0
    assert "3 cells at once take 1.50 times as long" in capsys.readouterr().out
    assert json.loads(file.read_text())["ratio"] == 1.5 and seen == {"cells": 3}
    assert cells.main(["--config=configs/none.py"]) == 2


@pytest.mark.long
def test_the_copies_that_it_plants_are_found(tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ["--images=240", "--longest-side=200", "--hashes=3000", f"--dir={tmp_path}", f"--json={file}"]
    assert duplicates.main(flags) == 0
    record = json.loads(file.read_text())
    assert [row["images"] for row in record["rows"]] == [60, 120, 240]
    assert [row["hashed"] for row in record["rows"]] == [60, 120, 240]
    # One in ten is a copy of the one before it.
    assert all(row["pairs"] >= 0.08 * row["images"] for row in record["rows"])
    assert record["fits"]["hash"]["million_cpu_s"] > 0 and "a million" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_products_of_calls_are_counted_and_need_not_run():
    rows, columns = np.ones((4, 8), np.float32), np.ones((8, 3), np.float32)
    for runs in (False, True):
        counted = grid_tests.Counted(jax.jit(lambda x, y: x @ y), runs=runs, generated=2)
        counts = [counted(rows, columns), counted(rows, columns), counted(rows[:2], columns)]
        assert counted.flops == 2 * (4 + 4 + 2) * 8 * 3 and counted.steps == 6
        assert [x.shape for x in counts] == [(4, 3), (4, 3), (2, 3)] and all(
            (np.asarray(x) == 8 * runs).all() for x in counts
        )


def test_the_tests_before_are_all_rows_once():
    run = load(f"{CONFIG}", {"eval.batch_size": "8", "base.batch_size": "8"})
    setup = grid_tests.open_setup(grid_tests.with_small_tokenizer(run), has_weights=True)
    test = grid_tests.questions(setup, "ct-liver-grade", ("shuffled_images", "text_only"))
    for encoded in (test.encoded, *test.controls.values()):
        batches, order = grid_tests.rows_of(encoded, 3)
        rows = np.concatenate([batch["pixels"] for batch in batches])
        count = len(encoded)
        assert len(rows) == len(order) == -(-count // 3) * 3 and sorted(order[:count]) == list(range(count))
        np.testing.assert_array_equal(rows[:count], encoded.rows(order[:count])[0]["pixels"])
    assert not test.controls["text_only"].images["pixels"].any()


def test_a_million_is_extrapolated_by_what_was_measured():
    seconds = [{"wall_s": 2 * n / 1e3, "cpu_s": 3 * n**2 / 1e9} for n in (10_000, 20_000, 40_000)]
    fitted = duplicates.fit((10_000, 20_000, 40_000), seconds, 2)
    assert fitted["exponent"] == pytest.approx(2) and fitted["exponent_wall"] == pytest.approx(1)
    assert fitted["million_wall_s"] == pytest.approx(2000) and fitted["million_cpu_s"] == pytest.approx(3e12 / 1e9 / 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("torch")
    root, out = (tmp_path_factory.mktemp("loader") / name for name in ("tree", "prepared"))
    write_subset(root, "Subset--04-train", [raw_record(i, label=("Benign", "Normal")[i % 2]) for i in range(90)])
    prepare(root, out, loader.DATA, Layout("square", loader.SIZE_PX))
    return root, out


@pytest.mark.long
def test_it_runs_and_its_ratios_are_of_its_own_figures(folders):
    figures = loader.compare(*folders, images=64, rounds=1)
    rows = figures["loaders"]
    assert set(rows) == {"torch, raw files", "medcg, raw files", "medcg, prepared"} and figures["images"] == 64
    for name, ratio in figures["ratio_to_torch"].items():
        assert ratio == pytest.approx(rows[name]["images_per_s"] / rows["torch, raw files"]["images_per_s"])
    assert figures["versions"]["pillow"] and figures["date"]


@pytest.mark.long
def test_a_reference_that_does_less_is_seen(folders, monkeypatch):
    class Cheaper(loader._Files):
        def __getitem__(self, index):
            import numpy as np
            import torch

            with Image.open(self.paths[index]) as image:
                small = image.convert("RGB").resize((loader.SIZE_PX,) * 2, Image.Resampling.NEAREST)
            return torch.from_numpy(np.array(small))

    monkeypatch.setattr(loader, "_Files", Cheaper)
    with pytest.raises(AssertionError, match="medcg, raw files"):
        loader.compare(*folders, images=32, rounds=1)


PARTS = [
    "python", "imports", "configuration", "devices", "tokenizer and model", "records to rows", "first batch",
    "state: lowered", "state: compiled", "step: lowered", "step: compiled",
]  # fmt: skip


@pytest.mark.long
def test_a_second_start_compiles_nothing(tmp_path, capsys):
    file = tmp_path / "starts.json"
    flags = [f"--config={CONFIG}", "--config.model.scan_unroll=1", "--records=2", f"--json={file}"]
    assert startup.main([*flags, "--devices=2"]) == 0
    cold, warm = json.loads(file.read_text()).values()
    assert cold["compiled"] >= 2 and cold["from_cache"] == 0
    assert warm["compiled"] == 0 and warm["from_cache"] == cold["compiled"] and warm["cache_bytes"] > 0
    for start in (cold, warm):
        assert [name for name, _, _ in start["parts"]] == PARTS
        assert all(wall >= 0 and cpu >= 0 for _, wall, cpu in start["parts"])
    assert dict(zip(PARTS, warm["parts"]))["imports"][1] > 0
    printed = capsys.readouterr().out
    assert "to the first step" in printed and "0 programs compiled" in printed


def test_a_cache_that_serves_nothing_is_told(monkeypatch, capsys):
    """The planted fault: the second process compiles again."""
    start = {"parts": [("python", 0.1, 0.1)], "compiled": 2, "from_cache": 0}
    monkeypatch.setattr(startup, "measure", lambda *args: dict(start))
    assert startup.main([f"--config={CONFIG}"]) == 1
    assert "2 programs compiled, 0 from the cache" in capsys.readouterr().out


def test_a_start_that_fails_says_why_and_other_flags_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(startup, "MODULE", "medcg_jax.no_such_module")
    with pytest.raises(RuntimeError, match="No module named medcg_jax.no_such_module"):
        startup.main([f"--config={CONFIG}"])
    with pytest.raises(SystemExit):
        startup.main([f"--config={CONFIG}", "--records=1", "--other=1"])
    assert "--other=1" in capsys.readouterr().err
