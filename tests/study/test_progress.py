"""The time that a grid still needs, told while bases are trained and while cells are."""

import re

import pytest

from medcg_jax.study.run.progress import MIN_MEASURED_S, Pace, words_left

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
STARTING_S, BASE_STEP_S, CELL_STEP_S = 40.0, 0.25, 0.05
NUM_BASE_STEPS, NUM_CELL_STEPS = 2800, 66 * 300


def seconds_in(words: str) -> float | None:
    """The time that a text tells for the whole grid."""
    found = re.fullmatch(r"about ([\w ]+) left", words)
    if not found:
        return None
    parts = found[1].split()
    return sum(int(number) * UNITS[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))


def grid():
    """(seconds since the start, base steps done, cell steps done) of a grid whose base steps take five times as long."""
    base_s, cells_s = NUM_BASE_STEPS * BASE_STEP_S, NUM_CELL_STEPS * CELL_STEP_S
    end_s = 2 * STARTING_S + base_s + cells_s
    for at in range(0, int(end_s), 5):
        # Reported at every 50th step, as trainings do.
        base = min(NUM_BASE_STEPS, max(0, int((at - STARTING_S) / BASE_STEP_S)) // 50 * 50)
        cells = max(0, int((at - 2 * STARTING_S - base_s) / CELL_STEP_S)) // 50 * 50
        yield at, base, min(NUM_CELL_STEPS, cells), end_s


def test_no_time_is_told_that_is_wrong_by_a_half():
    bases, cells = Pace(NUM_BASE_STEPS), Pace(NUM_CELL_STEPS)
    told = 0
    for at, base, cell, end_s in grid():
        bases.see(base, at)
        cells.see(cell, at)
        words = words_left(bases, cells)
        if (seconds := seconds_in(words)) is not None:
            told += 1
            assert abs(seconds - (end_s - at)) <= max(0.5 * (end_s - at), 30), (at, words)
        elif base < NUM_BASE_STEPS and at > STARTING_S + 3 * MIN_MEASURED_S:
            # While the base is trained its own time is told, and that of the cells is not guessed from it.
            assert re.fullmatch(r"bases ready in about [\w ]+; how long cells take is not known yet", words)
    assert told > 100


def test_what_is_not_known_is_said():
    bases, cells = Pace(100), Pace(100)
    for at in (0.0, 60.0):
        bases.see(0, at)
        cells.see(0, at)
    assert words_left(bases, cells) == "the first steps of the bases will tell the time left"
    assert words_left(Pace(0), cells) == "the first steps of the cells will tell the time left"


@pytest.mark.parametrize("done_before", [0, 60])
def test_what_an_earlier_start_did_gives_no_speed(done_before):
    pace = Pace(100)
    for at, done in ((0.0, done_before), (100.0, done_before + 10), (120.0, done_before + 20)):
        pace.see(done, at)
    assert pace.seconds_left == pytest.approx((100 - done_before - 20) * 2)


def test_the_end():
    pace = Pace(10)
    pace.see(10, 0.0)
    assert words_left(Pace(0), pace) == "nothing left"
