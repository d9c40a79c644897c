"""The loop: metrics, resuming bit for bit after a kill, a loss that is no number, several cells of any length."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from train_toys import ROWS, TRAIN, Stream, batch, run, same_bits, setup

from medcg_jax.config import replace
from medcg_jax.train.cells import take_cell
from medcg_jax.train.checkpoint import CheckpointError
from medcg_jax.train.goodput import FILE, read_starts
from medcg_jax.train.log import METRICS, Progress, read_metrics
from medcg_jax.train.loop import Cell, NonFiniteLoss, fit
from medcg_jax.train.optim import hparams_from


@pytest.fixture(scope="module")
def toy():
    return setup()


@pytest.fixture(scope="module")
def toy_of_four():
    return setup(num_cells=4)


def hparams(steps: int):
    return hparams_from(replace(TRAIN, steps=steps), 1)


def cell(path: Path, name="run", steps=10, seed=0, **fields) -> Cell:
    return Cell(name, hparams(steps), lambda position: Stream(position, seed), metrics=path / f"{name}.jsonl", **fields)


def quietly(*_):
    pass


def test_metrics_are_those_of_the_steps(toy, tmp_path):
    made = cell(tmp_path, flops_per_step=2e9)
    state, [result] = fit(*toy, [made], log_every_steps=4, progress=quietly, peak_flops=1e12)
    expected_state, expected = run(*toy, [hparams(10)], 10)
    lines = read_metrics(tmp_path / "run.jsonl")
    assert same_bits(state, expected_state) and result.error is None and result.step == 10
    assert [tuple(line) for line in lines] == [METRICS] * 3
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line, part in zip(lines, (slice(0, 4), slice(4, 8), slice(8, 10)), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"][part].mean(), rel=1e-6)
        last = {key: pytest.approx(float(expected[key][part][-1]), rel=1e-6) for key in ("lr", "grad_norm")}
        assert {key: line[key] for key in last} == last
        assert line["samples_per_s"] > 0 and 0 <= line["data_wait"] <= 1
        assert line["mfu"] == pytest.approx(line["samples_per_s"] / ROWS * 2e9 / 1e12, rel=1e-5)
    tokens = sum(int((batch(step)["segment_ids"] != 0).sum()) for step in (8, 9))
    assert lines[2]["tokens_per_s"] / lines[2]["samples_per_s"] == pytest.approx(tokens / (2 * ROWS), rel=1e-5)


def test_tensorboard_has_the_same(toy, tmp_path):
    fit(*toy, [cell(tmp_path, steps=2, tensorboard=tmp_path / "board")], progress=quietly)
    [events] = (tmp_path / "board").iterdir()
    assert b"grad_norm" in events.read_bytes() and read_metrics(tmp_path / "run.jsonl")[0]["mfu"] is None


def in_process(workdir: Path, kill_at: int) -> int:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, str(here / "fit_in_process.py"), str(workdir), str(kill_at)], timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def test_a_run_that_is_killed_ends_in_the_same_bits(toy, tmp_path):
    # Killed while a checkpoint may be being written, and between two lines of metrics.
    statuses = [in_process(tmp_path / "killed", kill_at) for kill_at in (7, 11, -1)]
    assert statuses == [-signal.SIGKILL] * 2 + [0]
    program, trainable, frozen = toy
    state, expected = run(program, trainable, frozen, [hparams(14)], 14)
    final = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))
    assert (tmp_path / "killed" / "final").read_bytes() == final
    lines = read_metrics(tmp_path / "killed" / "metrics" / "run.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 12, 14]
    for line, part in zip(lines, (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"][part].mean(), rel=1e-6)
    # Each start has its part of the goodput, the killed ones up to the steps that were on the device then.
    starts = read_starts(tmp_path / "killed" / FILE)
    reached = [start["reached"]["run"] for start in starts]
    assert 3 <= reached[0] <= 7 and 6 <= reached[1] <= 11 and reached[2] == 14
    assert [start["seconds"]["restart"] > 0.1 for start in starts] == [False, True, True]
    # Bytes that a batch too many or too few would change.
    other, _ = run(program, trainable, frozen, [hparams(14)], 14, seeds=[1])
    assert b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(other)) != final


def test_a_complete_run_trains_no_more(toy, tmp_path):
    made = cell(tmp_path, steps=4, checkpoints=tmp_path / "c")
    first, _ = fit(*toy, [made], progress=quietly)
    again, [result] = fit(*toy, [made], progress=quietly)
    assert same_bits(first, again) and result.step == 4 and result.metrics["step"] == 4
    assert len(read_metrics(made.metrics)) == 1
    with pytest.raises(CheckpointError, match="another run's"):
        fit(*toy, [cell(tmp_path, steps=4, checkpoints=tmp_path / "c", config={"seed": 1})], progress=quietly)


def overflow(at: int):
    """A stream in whose batch number `at` one record has an infinite loss."""

    def change(position, rows):
        if position == at:
            rows["target_weights"][3, 0] = np.inf
        return rows

    return lambda position: Stream(position, change=change)


def test_a_loss_that_is_no_number_names_step_records_and_checkpoint(toy, tmp_path):
    made = Cell("run", hparams(20), overflow(8), metrics=tmp_path / "m.jsonl", checkpoints=tmp_path / "c")
    with pytest.raises(NonFiniteLoss) as raised:
        fit(*toy, [made], log_every_steps=5, checkpoint_every_steps=3, progress=quietly)
    error = raised.value
    assert (error.step, error.records) == (9, [f"8/{row}" for row in range(ROWS)])
    assert error.checkpoint == tmp_path / "c" / "6"
    assert "run: step 9" in str(error) and str(error.checkpoint) in str(error) and "8/3" in str(error)
    # Nothing that followed it was saved: the step of the error, where a save was due, is not there.
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "6"]
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [5]


def test_cells_of_any_length_end_as_alone(toy, toy_of_four, tmp_path):
    lengths = (7, 3, 5)  # the fourth slot stays empty
    cells = [cell(tmp_path, f"c{i}", steps, seed=50 * i) for i, steps in enumerate(lengths)]
    state, results = fit(*toy_of_four, cells, log_every_steps=2, progress=quietly)
    for i, (steps, result) in enumerate(zip(lengths, results, strict=True)):
        alone, metrics = run(*toy, [hparams(steps)], steps, seeds=[50 * i])
        own = take_cell(state, i, 4)
        assert int(own.step) == result.step == steps
        pairs = zip(jax.tree.leaves(own), jax.tree.leaves(alone), strict=True)
        assert all(np.allclose(x, y, atol=1e-4) for x, y in pairs)
        lines = read_metrics(tmp_path / f"c{i}.jsonl")
        assert [line["step"] for line in lines] == sorted({*range(2, steps + 1, 2), steps})
        assert lines[0]["loss"] == pytest.approx(metrics["loss"][:2].mean(), abs=1e-5)
    assert int(take_cell(state, 3, 4).step) == 0
    assert toy_of_four[0].jitted._cache_size() == 1


def test_a_cell_that_fails_leaves_the_others(toy_of_four, tmp_path):
    def cells(bad):
        made = [cell(tmp_path, f"c{i}", 6, seed=50 * i, checkpoints=tmp_path / f"k{i}") for i in range(3)]
        if bad:
            made[1] = Cell("c1", {**hparams(6), "learning_rate": np.float32(np.inf)}, lambda p: Stream(p, 50))
        return made

    state, results = fit(*toy_of_four, cells(bad=True), log_every_steps=3, checkpoint_every_steps=2, progress=quietly)
    assert [r.error is None for r in results] == [True, False, True]
    assert results[1].error.step == 2 and results[1].error.records[0] == "1/0"
    # Each cell's state is saved apart: the failed one is trained again beside the others' checkpoints.
    again, results = fit(*toy_of_four, cells(bad=False), log_every_steps=3, progress=quietly)
    assert [r.error for r in results] == [None] * 3
    for i in (0, 2):
        assert same_bits(take_cell(state, i, 4), take_cell(again, i, 4))
    assert int(take_cell(again, 1, 4).step) == 6


def test_all_cells_failing_is_an_error(toy_of_four):
    bad = [Cell("a", {**hparams(6), "learning_rate": np.float32(np.inf)}, Stream) for _ in range(2)]
    with pytest.raises(NonFiniteLoss, match="a: step 2"):
        fit(*toy_of_four, bad, progress=quietly)


def test_streams_are_closed_whatever_happens(toy):
    streams = []

    def opened(position):
        streams.append(Stream(position))
        return streams[-1]

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*toy, [Cell("a", hparams(6), opened)], log_every_steps=2, progress=interrupted)
    assert len(streams) == 1 and streams[0].closed


def test_progress_says_the_last_step_in_a_plain_line(monkeypatch):
    stream = io.StringIO()
    progress = Progress(100, label="base", stream=stream)
    progress.update(50, "loss 1")
    progress.update(100, "loss 0.5")
    progress.close()
    assert stream.getvalue() == "base: step 100/100, loss 0.5\n"


def test_metrics_after_a_kill_hold_each_step_once(tmp_path):
    from medcg_jax.train.log import MetricsFile

    path = tmp_path / "m.jsonl"
    line = dict.fromkeys(METRICS, 1.0)
    path.write_text("".join(json.dumps({**line, "step": s}) + "\n" for s in (2, 4, 6)) + '{"step": 8, "lo')
    file = MetricsFile(path, step=4)
    file.write({**line, "step": 6, "loss": 1 / 3})
    file.close()
    assert [found["step"] for found in read_metrics(path)] == [2, 4, 6]
    assert read_metrics(path)[-1]["loss"] == 0.3333333


def test_the_start_is_given_back_where_nobody_needs_it(toy, tmp_path):
    program, trainable, frozen = toy
    mine = jax.tree.map(lambda x: x.copy(), trainable)
    state, _ = fit(program, mine, frozen, [cell(tmp_path, steps=2)], progress=quietly, keep_start=False)
    kept, _ = fit(program, trainable, frozen, [cell(tmp_path, name="kept", steps=2)], progress=quietly)
    assert all(x.is_deleted() for x in jax.tree.leaves(mine)) and same_bits(state, kept)
    assert not any(x.is_deleted() for x in jax.tree.leaves((trainable, frozen)))
