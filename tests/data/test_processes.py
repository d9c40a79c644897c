"""A function over items in processes: in order, whatever dies."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from medcg_jax.data.pool import over


def square(number: int) -> int:
    return number * number


def fragile(number: int) -> int:
    if number % 10 == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def broken(number: int) -> int:
    raise ValueError(f"number {number}")


def dead(number: int, reason: str) -> int:
    return -number


def said(number: int, reason: str) -> str:
    return reason


def hanging(number: int) -> int:
    while number == 5:
        pass
    return number


def greedy(number: int) -> str:
    try:
        return str(len(np.ones(2**28 if number == 2 else 1, np.uint8)))
    except MemoryError:
        return "none"


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    numbers = list(range(50))
    assert list(over(square, numbers, crashed=dead, workers=workers, chunk=7)) == [n * n for n in numbers]
    assert list(over(square, [], crashed=dead)) == []


@pytest.mark.timeout(120)
def test_an_item_that_kills_its_process_is_named_and_the_others_are_done():
    numbers = list(range(24))
    found = list(over(fragile, numbers, crashed=dead, workers=2, chunk=4))
    assert found == [-n if n % 10 == 3 else n for n in numbers]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_that_takes_too_long_is_ended_and_the_others_are_done(workers):
    numbers = list(range(9))
    found = list(over(hanging, numbers, crashed=said, workers=workers, chunk=3, max_seconds=1))
    assert found == [n if n != 5 else "took longer than 1 s of processor time" for n in numbers]


def test_one_item_too_is_bounded():
    assert list(over(hanging, [5], crashed=said, max_seconds=1)) == ["took longer than 1 s of processor time"]


def test_memory_beyond_the_bound_is_refused():
    assert list(over(greedy, [1, 2, 3], crashed=said, workers=2, max_bytes=2**27)) == ["1", "none", "1"]


def test_what_waits_takes_no_processor_time():
    assert list(over(time.sleep, [1.2], crashed=said, max_seconds=1)) == [None]


def test_an_error_ends_the_iteration():
    with pytest.raises(ValueError, match=r"number \d+"):
        list(over(broken, list(range(40)), crashed=dead, workers=2))


def test_a_script_that_calls_it_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from medcg_jax.data.pool import over\nprint('run', list(over(abs, [-1, 2], crashed=print)))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("run [1, 2]\n", 0), done.stderr
