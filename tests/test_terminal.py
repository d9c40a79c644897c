"""Durations in words, and how much is shown."""

import io
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax import terminal
from medcg_jax.terminal import duration
from medcg_jax.train import log


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (35.4, "35 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (2880, "48 min"),
        (3590, "1 h"),
        (34260, "9 h 31 min"),
        (7200, "2 h"),
        (48 * 3600, "2 d"),
        (53 * 3600 + 100, "2 d 5 h"),
    ],
)
def test_a_duration_is_read_at_once(seconds, words):
    assert duration(seconds) == words


@settings(deadline=None)
@given(st.floats(0, 1e7))
def test_no_duration_is_off_by_more_than_its_last_unit(seconds):
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    numbers = duration(seconds).split()
    told = sum(int(number) * units[unit] for number, unit in zip(numbers[::2], numbers[1::2], strict=True))
    half_of_last = 0.5 if seconds < 59.5 else 30 if seconds < 47.5 * 3600 else 1800
    assert abs(told - seconds) <= half_of_last + 1e-6


@pytest.fixture
def amount():
    yield terminal.show
    terminal.show(terminal.PLAIN)


def test_a_training_tells_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = log.Progress(100, done=10, label="run", stream=stream)
    for step, at in ((10, 111.0), (40, 400.0), (100, 1000.0)):
        now[0] = at
        progress.update(step, "loss 1")
    lines = stream.getvalue().splitlines()
    # 30 steps took 300 s, and 60 are left; a run's first line knows nothing yet, and its last has nothing left.
    assert lines == ["run: step 10/100, loss 1", "run: step 40/100, loss 1, 10 min left", "run: step 100/100, loss 1"]


def test_quiet_shows_no_progress_but_what_must_be_known(amount):
    amount(terminal.QUIET)
    stream = io.StringIO()
    progress = log.Progress(2, label="run", stream=stream)
    progress.update(2, "loss 1")
    progress.print("checkpoint 3 is damaged")
    assert stream.getvalue() == "checkpoint 3 is damaged\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_tells_the_time_left_in_words(amount, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    assert list(terminal.bar(range(3), 3, "images")) == [0, 1, 2]
    assert "images 0/3" in stream.getvalue() and "images 3/3" in stream.getvalue() and "0 s left" in stream.getvalue()
    amount(terminal.QUIET)
    quiet = Terminal()
    monkeypatch.setattr("sys.stderr", quiet)
    assert list(terminal.bar(range(3), 3, "images")) == [0, 1, 2] and quiet.getvalue() == ""


def test_long_work_says_that_it_goes_on_and_what_it_is(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(terminal, "BEAT_S", 0.1)
    monkeypatch.setattr(terminal, "_shown", terminal.PLAIN)

    def wait_for(line: str) -> None:
        ends_at = time.monotonic() + 60
        while line not in shown.getvalue() and time.monotonic() < ends_at:
            time.sleep(0.02)
        assert line in shown.getvalue()

    with terminal.beating("medcg eval"):
        wait_for("medcg eval, 0 s\n")
        with terminal.doing("loading weights"):
            wait_for("loading weights, 0 s\n")
    ended_with = shown.getvalue()
    time.sleep(0.3)
    assert shown.getvalue() == ended_with


def test_no_beat_where_progress_is_not_shown(capfd, monkeypatch):
    monkeypatch.setattr(terminal, "BEAT_S", 0.05)
    monkeypatch.setattr(terminal, "_shown", terminal.QUIET)
    with terminal.beating("medcg eval"), terminal.doing("loading weights"):
        time.sleep(0.2)
    assert not capfd.readouterr().err
