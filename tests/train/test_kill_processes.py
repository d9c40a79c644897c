"""Two processes that are killed, or told to stop, end in the same bits; so do others in their place.

`kill_processes.py` does this a hundred times over.
"""

import signal

import kill_processes
import pytest


@pytest.mark.parametrize("number", [1, pytest.param(8, marks=pytest.mark.long)])
def test_killed(tmp_path, number):
    used = kill_processes.kills(tmp_path, number, signal.SIGKILL, seed=3)
    assert used["kills"] == number and used["equal"] == used["runs"] >= 1


@pytest.mark.long
def test_told_to_stop_on_one_of_two_hosts_and_gone_on_with_by_one(tmp_path):
    kill_processes.through(tmp_path, [2, 1], "processes")


@pytest.mark.long
def test_other_devices(tmp_path):
    kill_processes.through(tmp_path, [4, 8], "devices")


@pytest.mark.long
def test_other_bits_are_seen(tmp_path, monkeypatch):
    """The comparison itself: a run on other data is not equal."""
    made = kill_processes.Job.__init__
    seeds = iter((0, 1))
    monkeypatch.setattr(
        kill_processes.Job, "__init__", lambda self, *args, **how: made(self, *args, **how, seed=next(seeds))
    )
    monkeypatch.setattr(kill_processes, "kill_once", lambda workdir, cache, which, rng, used: used.update(kills=1))
    with pytest.raises(AssertionError, match="other parameters or predictions"):
        kill_processes.kills(tmp_path, 1, signal.SIGKILL, seed=0)
