"""A function over items in processes: in order, whatever dies."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from medcg_jax.data import processes
from medcg_jax.data.processes import over


def square(number: int) -> int:
    return number * number


def fragile(number: int) -> int:
    if number % 10 == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def broken(number: int) -> int:
    raise ValueError(f"number {number}")


def dead(number: int) -> int:
    return -number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    numbers = list(range(50))
    assert list(over(square, numbers, crashed=dead, workers=workers, chunk=7, min_items=2)) == [n * n for n in numbers]
    assert list(over(square, [], crashed=dead)) == []


@pytest.mark.timeout(120)
def test_an_item_that_kills_its_process_is_named_and_the_others_are_done():
    numbers = list(range(24))
    found = list(over(fragile, numbers, crashed=dead, workers=2, chunk=4, min_items=2))
    assert found == [-n if n % 10 == 3 else n for n in numbers]


@pytest.mark.timeout(120)
def test_a_pool_that_breaks_while_there_is_more_to_hand_in_is_survived(monkeypatch):
    made = []

    class Breaking(ProcessPoolExecutor):
        def submit(self, *args):
            made.append(args)
            if len(made) == 3:
                raise BrokenProcessPool("a process has died")
            return super().submit(*args)

    pool = processes._pool
    monkeypatch.setattr(processes, "_pool", lambda workers: Breaking(workers) if workers == 2 else pool(workers))
    numbers = list(range(20))
    assert list(over(square, numbers, crashed=dead, workers=2, chunk=4, min_items=2)) == [n * n for n in numbers]
    assert len(made) == 3


def test_an_error_ends_the_iteration():
    with pytest.raises(ValueError, match="number 0"):
        list(over(broken, list(range(40)), crashed=dead, workers=2, min_items=2))
