"""The loop: metrics, resuming bit for bit after a kill, a loss that is no number, queues of runs of any length."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import micro
import numpy as np
import pytest
from train_toys import ROWS, TRAIN, Stream, batch, run, same_bits

from medcg_jax.config import MeshConfig, replace
from medcg_jax.train.checkpoint import CheckpointError
from medcg_jax.train.goodput import FILE, read_starts
from medcg_jax.train.log import METRICS, MetricsFile, Progress, read_metrics
from medcg_jax.train.loop import NonFiniteLoss, RunSpec, fit, fit_queue
from medcg_jax.train.optim import hparams_from

TOY = micro.setup()
LENGTHS = (7, 3, 5, 2, 6, 1, 4)


def hparams(steps: int, **changes):
    return hparams_from(replace(TRAIN, steps=steps, **changes), 1)


def spec(path: Path, name="run", steps=10, seed=0, **fields) -> RunSpec:
    return RunSpec(
        name, hparams(steps), lambda position: Stream(position, seed), metrics=path / f"{name}.jsonl", **fields
    )


def quietly(*_):
    pass


def test_metrics_are_those_of_the_steps(tmp_path):
    state, result = fit(*TOY, spec(tmp_path, flops_per_step=2e9), log_every_steps=4, progress=quietly, peak_flops=1e12)
    expected_state, expected = run(*TOY, [hparams(10)], 10)
    lines = read_metrics(tmp_path / "run.jsonl")
    assert same_bits(state, expected_state) and result.error is None and result.step == 10
    assert [tuple(line) for line in lines] == [METRICS] * 3
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line, steps in zip(lines, (slice(0, 4), slice(4, 8), slice(8, 10)), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"][steps].mean(), rel=1e-6)
        last = {key: pytest.approx(float(expected[key][steps][-1]), rel=1e-6) for key in ("lr", "grad_norm")}
        assert {key: line[key] for key in last} == last
        assert line["samples_per_s"] > 0 and 0 <= line["data_wait"] <= 1
        assert line["mfu"] == pytest.approx(line["samples_per_s"] / ROWS * 2e9 / 1e12, rel=1e-5)
    tokens = sum(int((batch(step)["segment_ids"] != 0).sum()) for step in (8, 9))
    assert lines[2]["tokens_per_s"] / lines[2]["samples_per_s"] == pytest.approx(tokens / (2 * ROWS), rel=1e-5)


def test_tensorboard_has_the_same(tmp_path):
    fit(*TOY, spec(tmp_path, steps=2, tensorboard=tmp_path / "board"), progress=quietly)
    [events] = (tmp_path / "board").iterdir()
    assert b"grad_norm" in events.read_bytes() and read_metrics(tmp_path / "run.jsonl")[0]["mfu"] is None


def in_process(workdir: Path, kill_at: int) -> int:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, str(here / "fit_in_process.py"), str(workdir), str(kill_at)],
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def test_a_run_that_is_killed_ends_in_the_same_bits(tmp_path):
    # Killed while a checkpoint may be being written, and between two lines of metrics.
    statuses = [in_process(tmp_path, kill_at) for kill_at in (7, 11, -1)]
    assert statuses == [-signal.SIGKILL] * 2 + [0]
    state, expected = run(*TOY, [hparams(14)], 14)
    final = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))
    assert (tmp_path / "final").read_bytes() == final
    lines = read_metrics(tmp_path / "metrics" / "run.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 12, 14]
    for line, steps in zip(lines, (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"][steps].mean(), rel=1e-6)
    # Each start has its part of the goodput, the killed ones up to the steps that were on the device then.
    starts = read_starts(tmp_path / FILE)
    reached = [start["reached"]["run"] for start in starts]
    assert 3 <= reached[0] <= 7 and 6 <= reached[1] <= 11 and reached[2] == 14
    first, *later = [start["seconds"]["restart"] for start in starts]
    assert all(seconds > 5 * first for seconds in later), (first, later)
    # Bytes that a batch too many or too few would change.
    other, _ = run(*TOY, [hparams(14)], 14, seeds=[1])
    assert b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(other)) != final


def test_a_complete_run_trains_no_more(tmp_path):
    complete = spec(tmp_path, steps=4, checkpoints=tmp_path / "c")
    first, _ = fit(*TOY, complete, progress=quietly)
    second, result = fit(*TOY, complete, progress=quietly)
    assert same_bits(first, second) and result.step == 4 and result.metrics["step"] == 4
    assert len(read_metrics(complete.metrics)) == 1
    with pytest.raises(CheckpointError, match="another run's"):
        fit(*TOY, spec(tmp_path, steps=4, checkpoints=tmp_path / "c", config={"seed": 1}), progress=quietly)


def overflow(at: int):
    """A stream in whose batch number `at` one record has an infinite loss."""

    def change(position, rows):
        if position == at:
            rows["target_weights"][3, 0] = np.inf
        return rows

    return lambda position: Stream(position, change=change)


def test_a_loss_that_is_no_number_names_step_records_and_checkpoint(tmp_path):
    diverges = RunSpec("run", hparams(20), overflow(8), metrics=tmp_path / "m.jsonl", checkpoints=tmp_path / "c")
    with pytest.raises(NonFiniteLoss) as raised:
        fit(*TOY, diverges, log_every_steps=5, checkpoint_every_steps=3, progress=quietly)
    error = raised.value
    assert (error.step, error.records) == (9, [f"8/{row}" for row in range(ROWS)])
    assert error.checkpoint == tmp_path / "c" / "6"
    assert "run: step 9" in str(error) and str(error.checkpoint) in str(error) and "8/3" in str(error)
    # Nothing that followed it was saved: the step of the error, where a save was due, is not there.
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == ["3", "6"]
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [5]


def test_streams_are_closed_whatever_happens():
    streams = []

    def opened(position):
        streams.append(Stream(position))
        return streams[-1]

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*TOY, RunSpec("a", hparams(6), opened), log_every_steps=2, progress=interrupted)
    assert len(streams) == 1 and streams[0].closed


def test_progress_says_the_first_and_the_last_step_in_a_plain_line():
    stream = io.StringIO()
    progress = Progress(100, label="base", stream=stream)
    progress.update(1, "loss 2")
    progress.update(50, "loss 1")
    progress.update(100, "loss 0.5")
    progress.close()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("base: step 1/100, loss 2") and last == "base: step 100/100, loss 0.5"


def test_a_run_is_asked_about_other_pixels_once_and_not_at_each_start(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("medcg_jax.train.loop.check_sees", lambda *args: asked.append(args) or True)
    options = {"checkpoint_every_steps": 1, "log_every_steps": 1}
    seeing = spec(tmp_path, steps=4, checkpoints=tmp_path / "c", pixels=("pixels",))

    def interrupted(steps, text):
        if steps["run"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(*TOY, seeing, progress=interrupted, **options)
    assert len(asked) == 1
    assert fit(*TOY, seeing, progress=quietly, **options)[1].step == 4
    assert len(asked) == 1


def test_metrics_after_a_kill_hold_each_step_once(tmp_path):
    path = tmp_path / "m.jsonl"
    line = dict.fromkeys(METRICS, 1.0)
    path.write_text("".join(json.dumps({**line, "step": s}) + "\n" for s in (2, 4, 6)) + '{"step": 8, "lo')
    file = MetricsFile(path, step=4)
    file.write({**line, "step": 6, "loss": 1 / 3})
    file.close()
    assert [found["step"] for found in read_metrics(path)] == [2, 4, 6]
    assert read_metrics(path)[-1]["loss"] == 0.3333333


def test_the_start_is_given_back_where_nobody_needs_it(tmp_path):
    program, trainable, frozen = TOY
    mine = jax.tree.map(lambda x: x.copy(), trainable)
    state, _ = fit(program, mine, frozen, spec(tmp_path, steps=2), progress=quietly, keep_start=False)
    kept, _ = fit(program, trainable, frozen, spec(tmp_path, name="kept", steps=2), progress=quietly)
    assert all(x.is_deleted() for x in jax.tree.leaves(mine)) and same_bits(state, kept)
    assert not any(x.is_deleted() for x in jax.tree.leaves((trainable, frozen)))


# ------------------------------------------------------------------ queues


def run_of(i: int, **fields) -> RunSpec:
    """Run i has its own length, rate and data."""
    usual = dict(
        hparams=hparams(LENGTHS[i], learning_rate=1e-2 / (i + 1)), open_stream=lambda position: Stream(position, 50 * i)
    )
    return RunSpec(f"c{i}", **usual | fields)


def queue(toy, specs, **options) -> dict:
    """{name: (result, state on the host)} of a queue of runs."""
    waiting, ends = list(specs), {}

    def end(result, state):
        ends[result.name] = (result, jax.device_get(state))

    fit_queue(*toy, lambda: waiting.pop(0) if waiting else None, end, progress=quietly, **options)
    assert not waiting
    return ends


@pytest.fixture(scope="module")
def alone():
    """{name: (state, metrics)} of every run by itself."""
    found = {}
    for i, steps in enumerate(LENGTHS):
        state, metrics = run(*TOY, [run_of(i).hparams], steps, seeds=[50 * i])
        found[f"c{i}"] = jax.device_get(state), metrics
    return found


def check_alike(found: dict, alone: dict) -> None:
    assert found.keys() == alone.keys()
    for name, (result, state) in found.items():
        expected, metrics = alone[name]
        steps = len(metrics["loss"])
        assert (result.error, result.step, int(state.step)) == (None, steps, steps)
        assert np.allclose(result.metrics["grad_norm"], metrics["grad_norm"][-1], rtol=1e-4)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        assert all(np.allclose(x, y, atol=1e-4) for x, y in pairs)


@pytest.mark.parametrize("mesh", [None, MeshConfig(cell=2, data=1, fsdp=2, tensor=2)], ids=["1", "cell2"])
def test_seven_runs_in_four_slots_end_as_alone(alone, mesh, tmp_path):
    toy = micro.setup(mesh, num_cells=4)
    specs = [run_of(i, metrics=tmp_path / f"{i}.jsonl") for i in range(7)]
    found = queue(toy, specs, log_every_steps=2)
    check_alike(found, alone)
    assert toy[0].jitted._cache_size() == toy[0].jitted_put._cache_size() == 1
    for i, steps in enumerate(LENGTHS):
        lines = read_metrics(tmp_path / f"{i}.jsonl")
        assert [line["step"] for line in lines] == sorted({*range(2, steps + 1, 2), steps})
        assert lines[0]["loss"] == pytest.approx(alone[f"c{i}"][1]["loss"][:2].mean(), abs=1e-5)
    # In another order, so in other slots and beside others: the same bits.
    other = queue(toy, [run_of(i) for i in range(7)][::-1], log_every_steps=3)
    assert all(same_bits(found[name][1], other[name][1]) for name in found)
    with pytest.raises(AssertionError):
        check_alike({"c0": found["c1"], "c1": found["c0"]}, {name: alone[name] for name in ("c0", "c1")})


def test_one_slot_takes_one_after_another(alone):
    found = queue(TOY, [run_of(i) for i in range(7)])
    assert all(same_bits(found[name][1], alone[name][0]) for name in found)


def test_a_run_that_diverges_is_reported_and_its_slot_used_again(alone):
    sick = run_of(1, hparams={**run_of(1).hparams, "learning_rate": np.float32(np.inf)})
    found = queue(micro.setup(num_cells=2), [run_of(0), sick, *(run_of(i) for i in range(2, 7))])
    error = found.pop("c1")[0].error
    assert error.step == 2 and error.records[0] == "1/0"
    check_alike(found, {name: value for name, value in alone.items() if name != "c1"})


def test_runs_go_on_from_their_checkpoints_in_whatever_slot(tmp_path):
    toy = micro.setup(num_cells=2)
    kept = [run_of(i, checkpoints=tmp_path / str(i)) for i in range(7)]
    whole = queue(toy, [run_of(i) for i in range(7)])

    class Stop(Exception):
        pass

    def stop_late(steps, _):
        if steps.get("c2", 0) >= 4:
            raise Stop

    waiting = list(kept)
    options = dict(log_every_steps=1, checkpoint_every_steps=2)
    with pytest.raises(Stop):
        fit_queue(*toy, lambda: waiting.pop(0) if waiting else None, quietly, progress=stop_late, **options)
    assert (tmp_path / "2" / "2").exists()
    found = queue(toy, kept[::-1], **options)
    assert all(same_bits(found[name][1], whole[name][1]) for name in whole)


def test_a_queue_with_nothing_in_it_ends_at_once():
    fit_queue(*TOY, lambda: None, lambda *_: pytest.fail("nothing ended"), progress=quietly)


def test_a_slot_that_stays_empty_is_offered_again(alone):
    """A run that can be had later than a slot was free for it is trained all the same."""
    given, found = iter([run_of(0), None, None, run_of(1), None, None, None]), {}
    fit_queue(
        *micro.setup(num_cells=2),
        lambda: next(given, None),
        lambda result, state: found.update({result.name: (result, jax.device_get(state))}),
        log_every_steps=1,
        progress=quietly,
    )
    check_alike(found, {name: alone[name] for name in ("c0", "c1")})
