"""Goodput: every second of a run has one kind, and what is planted (a slow loader, a slow save) shows as what it is.

A kill is in test_loop.py, where processes are killed anyway.
"""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import setup
from train_toys import TRAIN, Stream

from medcg_jax.config import replace
from medcg_jax.train.checkpoint import Checkpoints
from medcg_jax.train.goodput import FILE, KINDS, Goodput, line, read_starts, summarise, write
from medcg_jax.train.log import read_metrics
from medcg_jax.train.loop import RunSpec, fit
from medcg_jax.train.optim import hparams_from

STEPS = 14


class Work:
    """A step on a device that is not there: ready when told so, or so many seconds after it was handed over."""

    def __init__(self, seconds: float = math.inf):
        self._ready_s = time.perf_counter() + seconds

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._ready_s

    def end(self) -> None:
        self._ready_s = 0.0


def test_a_device_at_work_is_productive_whatever_the_host_does():
    with Goodput() as clock:
        with clock.step({"a": 1}, compiles=True):
            time.sleep(0.03)
        work = Work()
        clock.handed({"a": 1}, work)
        with clock.within("input"):
            with clock.within("input"):
                time.sleep(0.1)
            work.end()
            with clock.within("input"):
                ended = time.perf_counter()
                time.sleep(0.15)
        waited = time.perf_counter() - ended
        seconds = clock.summary()["seconds"]
    assert seconds["compile"] >= 0.03 and seconds["productive"] >= 0.1
    assert seconds["input"] == pytest.approx(waited, abs=0.05)


def test_a_step_that_ends_while_the_host_does_something_else_took_as_long_as_the_quickest():
    with Goodput() as clock:
        for number in range(1, 4):
            clock.handed({"a": number}, Work(0.02))
            with clock.within("input"):
                time.sleep(0.1)
        clock.handed({"a": 4}, work := Work(0.02))
        with clock.waiting():
            while not work.is_ready():
                time.sleep(0.001)
        seconds = clock.lap()
    assert seconds["productive"] == pytest.approx(4 * 0.02, abs=0.03)
    assert seconds["input"] == pytest.approx(3 * 0.08, abs=0.05)


def test_a_step_that_spans_two_laps_counts_once():
    with Goodput() as clock:
        clock.handed({"a": 1}, work := Work())
        began = time.perf_counter()
        with clock.within("checkpoint"):
            time.sleep(0.05)
            first = clock.lap()
            time.sleep(0.05)
            work.end()
            gone = time.perf_counter() - began
            second = clock.lap()
    assert first["productive"] >= 0.05 and second["productive"] >= 0.05
    assert first["productive"] + second["productive"] == pytest.approx(gone, abs=0.03)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_shares_are_the_whole_of_the_time(data):
    """Any order of blocks, steps, laps and starts: kinds add up to the wall time, and none is below zero."""
    earlier, wall_s = [], 0.0
    for _ in range(data.draw(st.integers(1, 3))):
        began, clock = time.perf_counter(), Goodput(earlier=earlier)
        works, step = [], data.draw(st.integers(0, 4))
        for action in data.draw(st.lists(st.sampled_from(("step", "end", "lap", *KINDS)), max_size=12)):
            if action == "step":
                step += 1
                with clock.step({"a": step}, compiles=data.draw(st.booleans())):
                    time.sleep(0.0002)
                works.append(Work())
                clock.handed({"a": step}, works[-1])
            elif action == "end" and works:
                works.pop(0).end()
            elif action == "lap":
                assert min(clock.lap().values()) >= -1e-9
            elif action in KINDS:
                with clock.within(action), clock.within("other"):
                    time.sleep(0.0002)
        for work in works:
            work.end()
        found = clock.summary()
        wall_s += time.perf_counter() - began
        earlier = [*earlier, clock._times()]
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert found["wall_s"] == pytest.approx(wall_s, abs=0.02) and min(found["seconds"].values()) >= -1e-9


def test_steps_that_were_done_before_are_restart():
    earlier = [{"seconds": {"productive": 5.0}, "reached": {"a": 4, "b": 1}}]
    with Goodput(earlier=earlier) as clock:
        for step, expected in ((4, 0.5), (5, 1.0)):  # beside a's fourth, done before, b's is new
            clock.lap()
            with clock.step({"a": step, "b": step}):
                time.sleep(0.02)
            lap = clock.lap()
            assert lap["productive"] / (lap["productive"] + lap["restart"]) == pytest.approx(expected, abs=0.01)
        found = clock.summary()
    assert found["num_starts"] == 2 and found["seconds"]["productive"] > 5.0


def test_the_line_for_people():
    seconds = dict(zip(KINDS, (83, 9, 4, 2, 1, 0, 1), strict=True))
    said = line(summarise([{"seconds": seconds, "reached": {}}]))
    assert said == "goodput 83 %: compile 9, input 4, checkpoint 2, restart 1, other 1 (2 min in 1 start)"
    assert "evaluation 50" in line(summarise([{"seconds": seconds | {"evaluation": 100}, "reached": {}}]))


def test_what_is_no_file_of_ours_counts_as_none(tmp_path):
    assert read_starts(tmp_path / FILE) == []
    (tmp_path / FILE).write_text('{"starts": [')
    assert read_starts(tmp_path / FILE) == []
    starts = [{"seconds": {"productive": 1.0}, "reached": {"a": 3}}]
    assert write(tmp_path / FILE, starts)["shares"]["productive"] == 1.0 and read_starts(tmp_path / FILE) == starts


@pytest.fixture(scope="module")
def toy():
    return setup()


def run(toy, path: Path, *, change=lambda position, batch: batch, **fields) -> dict:
    cell = RunSpec(
        "run", hparams_from(replace(TRAIN, steps=STEPS), 1), lambda p: Stream(p, change=change),
        metrics=path / "m.jsonl", **fields,
    )  # fmt: skip
    with Goodput(path / FILE) as clock:
        fit(*toy, cell, log_every_steps=5, checkpoint_every_steps=5, goodput=clock)
        return clock.summary()


def test_a_slow_loader_is_input_and_is_warned_of(toy, tmp_path, capfd):
    def slow(position, batch):
        time.sleep(0.1)
        return batch

    usual, planted = run(toy, tmp_path / "a"), run(toy, tmp_path / "b", change=slow)
    assert planted["seconds"]["input"] - usual["seconds"]["input"] > 0.8 * 0.1 * STEPS
    assert max(planted["seconds"], key=planted["seconds"].get) == "input"
    assert read_metrics(tmp_path / "b" / "m.jsonl")[-1]["data_wait"] > 0.5
    said = [x for x in capfd.readouterr().err.splitlines() if "waited for data" in x]
    # Another line where it gets worse, as it may on a busy machine.
    assert 1 <= len(said) <= 2 and all("medcg data prepare" in x for x in said)


def test_a_slow_save_is_checkpoint(toy, tmp_path, monkeypatch):
    save = Checkpoints.save

    def slow(self, *args):
        time.sleep(0.4)
        save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", slow)
    found = run(toy, tmp_path, checkpoints=tmp_path / "c")
    assert found["seconds"]["checkpoint"] > 0.9 * 0.4 * 3  # at 5, 10 and the end
    assert json.loads((tmp_path / FILE).read_text())["num_starts"] == 1


def test_steps_made_again_after_a_checkpoint_are_restart(toy, tmp_path):
    class Stopped(Exception):
        pass

    def stop(position, batch):
        if position == 12:
            raise Stopped
        return batch

    fields = dict(checkpoints=tmp_path / "c")
    with pytest.raises(Stopped):
        run(toy, tmp_path, change=stop, **fields)
    [first] = read_starts(tmp_path / FILE)
    assert first["reached"]["run"] in (11, 12) and first["seconds"]["restart"] < first["seconds"]["productive"]
    handed = []
    with Goodput(tmp_path / FILE, earlier=[first | {"reached": {"run": 12}}]) as clock:
        note = clock.handed
        clock.handed = lambda at, ready: (handed.append((at["run"], clock._fresh(at))), note(at, ready))
        cell = RunSpec("run", hparams_from(replace(TRAIN, steps=STEPS), 1), Stream, **fields)
        fit(*toy, cell, goodput=clock)
        restart_s = clock.summary()["seconds"]["restart"]
    assert handed == [(11, 0.0), (12, 0.0), (13, 1.0), (14, 1.0)]
    assert restart_s > first["seconds"]["restart"]
