"""Claims: one holder at a time, taken over from the dead and never from the living, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from medcg_jax.study.run import claims

HOLD = """
import sys, time
from pathlib import Path
from medcg_jax.study.run import claims
claim = claims.take(Path(sys.argv[1]), "work")
print("held" if claim else "refused", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the claim `work` in tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_holder_keeps_its_claim_and_a_killed_one_loses_it(tmp_path, holder):
    assert claims.take(tmp_path, "work") is None
    assert claims.take(tmp_path, "other") is not None
    holder.send_signal(signal.SIGKILL)
    # Not reaped yet: a zombie has a /proc entry and holds nothing.
    time.sleep(0.2)
    taken = claims.take(tmp_path, "work")
    assert taken is not None and taken.number == 1
    assert claims.num_holders(tmp_path)["work"] == 2


def test_a_recycled_pid_is_not_the_holder(tmp_path):
    holder = claims.identity() | {"start": "1"}
    assert not claims.is_alive(holder, 0.0)
    assert claims.is_alive(claims.identity(), 1e9)


def test_release_lets_others_in(tmp_path):
    first = claims.take(tmp_path, "work")
    assert claims.take(tmp_path, "work") is None
    first.release()
    assert claims.take(tmp_path, "work").number == 1


def test_another_host_is_judged_by_its_heartbeat(tmp_path):
    path = tmp_path / "work.0"
    path.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": 1, "start": "1"}))
    assert claims.take(tmp_path, "work") is None
    old = time.time() - claims.STALE_S - 1
    os.utime(path, (old, old))
    assert claims.take(tmp_path, "work").number == 1


@pytest.mark.parametrize("other", [{"boot": "another"}, {"namespace": "pid:[1]"}, {"boot": None, "namespace": None}])
def test_a_container_of_this_host_s_name_and_an_old_claim_are_judged_by_their_heartbeat(other):
    holder = claims.identity() | {"pid": 1, "start": "1"}
    assert not claims.is_alive(holder, 0.0)  # here there is such a process, of another start
    holder = {key: value for key, value in (holder | other).items() if value is not None}
    assert claims.is_alive(holder, 0.0)
    assert not claims.is_alive(holder, claims.STALE_S + 1)


@pytest.mark.parametrize(
    "text",
    ['{"host": "vm"}', "[]", '{"host": 3, "pid": 4, "start": ""}', '{"host": "vm", "pid": "4", "start": ""}',
     '{"host": "vm", "pid": true, "start": ""}', '{"host": "vm", "pid": 1e400, "start": "1"}', "{" * 10_000],
)  # fmt: skip
def test_a_claim_that_says_something_else_is_judged_by_its_age(tmp_path, text):
    path = tmp_path / "work.0"
    path.write_text(text)
    assert claims.take(tmp_path, "work") is None
    assert "cannot be read" in claims.described(tmp_path, "work")
    old = time.time() - claims.STALE_S - 1
    os.utime(path, (old, old))
    assert claims.take(tmp_path, "work").number == 1


def test_a_time_in_the_future_tells_nothing(tmp_path, monkeypatch):
    path = tmp_path / "work.0"
    path.write_text(json.dumps(claims.identity() | {"host": "ahead"}))
    os.utime(path, (time.time() + 1e8,) * 2)
    clock = time.monotonic()
    monkeypatch.setattr(claims.time, "monotonic", lambda: clock)
    assert claims.take(tmp_path, "work") is None
    clock += claims.STALE_S - 1
    assert claims.take(tmp_path, "work") is None
    os.utime(path, (time.time() + 2e8,) * 2)  # a sign of life
    clock += 2
    assert claims.take(tmp_path, "work") is None
    clock += claims.STALE_S + 1
    assert claims.take(tmp_path, "work").number == 1


def test_who_waits_says_for_whom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "REPORT_AFTER_S", 0.05)
    (tmp_path / "work.0").write_text(json.dumps({"host": "node7", "pid": 12, "start": "1"}))
    began = time.monotonic()
    assert claims.wait(tmp_path, "work", lambda: time.monotonic() > began + 0.3, poll_s=0.02) is None
    [line] = capsys.readouterr().err.splitlines()
    assert "work is held by process 12 on node7" in line


def test_a_claim_that_is_still_being_written_is_held(tmp_path):
    (tmp_path / "work.0").write_text("")
    assert claims.take(tmp_path, "work") is None


def test_heartbeat_touches_the_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    claim = claims.take(tmp_path, "work")
    os.utime(claim.path, (1, 1))
    time.sleep(0.3)
    assert claim.path.stat().st_mtime > 1
    claim.release()


def test_one_of_many_gets_it(tmp_path):
    for round_ in range(20):
        got, start = [], threading.Barrier(8)

        def race(name=f"work{round_}", got=got, start=start):
            start.wait()
            got.append(claims.take(tmp_path, name))

        threads = [threading.Thread(target=race) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert sum(claim is not None for claim in got) == 1


def test_names_that_begin_alike_are_apart(tmp_path):
    assert claims.take(tmp_path, "a.s1")
    assert claims.take(tmp_path, "a.s1.1").number == 0
    assert claims.num_holders(tmp_path) == {"a.s1": 1, "a.s1.1": 1}
