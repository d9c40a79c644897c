"""The processes of one run: they start together, name those that they wait for, and all end when one of them dies.

They communicate through the key-value store of JAX's coordination service, which is in process 0. No device is
involved, so that a process can wait for another without a time limit. JAX has no public name for the store; Orbax takes
it from the same place (orbax/checkpoint/_src/multihost/multihost.py:_get_jax_distributed_client).
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from medcg_jax.cluster import AUTO, Cluster
from medcg_jax.config import RunError
from medcg_jax.rendezvous import rendezvous

# How long a process waits for the others at its start.
START_S = 300
# A heartbeat every `BEAT_S`; a process without one for `DEAD_AFTER_S` is dead. The others know that within a minute.
BEAT_S, DEAD_AFTER_S = 2.0, 30.0
# JAX's own check names no process; it acts later, so only when this module's check is dead too.
RUNTIME_TIMEOUT_S = 50
# How long process 0, which has the store, waits before it ends, so that others can read why.
LAST_WORDS_S = 10.0
BARRIER_S = 1800.0
REPORT_AFTER_S, REPORT_EVERY_S = 10.0, 30.0
KEYS = "medcg"
# Words in errors of collectives and gRPC about a lost peer, which do not name it; gloo's are ValueErrors.
LOST = ("Gloo", "UNAVAILABLE", "Connection closed", "Connection reset", "NCCL")


class _Processes:
    """This process and its connection to the others. hosts: process number -> host name."""

    def __init__(self, client, index: int, count: int, coordinator: str):
        self.client, self.index, self.count = client, index, count
        self.uses: Counter[str] = Counter()
        self.leaving = threading.Event()
        self.publish("host", platform.node())
        self.publish("beat", "0")  # now, so that a process that dies before its watch begins is noticed
        self.hosts = {index: platform.node()}
        wait(self, "hosts", START_S)
        self.hosts = self.read("host")
        self.witness = self._witness(coordinator)
        threading.Thread(target=self._watch, daemon=True).start()

    def name(self, index: int) -> str:
        return f"process {index} ({self.hosts.get(index, 'host not known yet')})"

    def publish(self, what: str, value: str) -> None:
        self.client.key_value_set(f"{KEYS}/{what}/{self.index}", value, allow_overwrite=True)

    def read(self, what: str) -> dict[int, str]:
        """{process number: the value that it published}."""
        values = self.client.key_value_dir_get(f"{KEYS}/{what}/")
        return {int(key.rpartition("/")[2]): value for key, value in values}

    def _witness(self, coordinator: str) -> subprocess.Popen | None:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("witness.py"))]
        arguments = [coordinator, str(self.index), self.hosts[self.index], self.hosts[0]]
        # In its own session, so that Ctrl-C does not end it; it ends when its pipe is closed.
        return subprocess.Popen([*command, *arguments], stdin=subprocess.PIPE, text=True, start_new_session=True)

    def _watch(self) -> None:
        """Sends heartbeats, and ends this process when another has died; process 0 checks all heartbeats."""
        seen: dict[int, tuple[str, float]] = {}
        beat = 0
        while not self.leaving.wait(BEAT_S):
            beat += 1
            try:
                self.publish("beat", str(beat))
                gone = {i: why for i, why in self.read("gone").items() if i != self.index}
                if self.index == 0 and not gone:
                    gone = silent(seen, self.read("beat"), time.monotonic())
                    for index, why in gone.items():
                        self.client.key_value_set(f"{KEYS}/gone/{index}", why, allow_overwrite=True)
            except Exception:  # the coordinator is gone, and the runtime is about to end this process
                continue
            if gone and not self.leaving.is_set():
                index, why = min(gone.items())
                _log(f"{self.name(index)} {why}; {self.name(self.index)} ends with it")
                self.end(1)

    def gone(self, why: str) -> None:
        """Tells the others that this process ends early."""
        self.leaving.set()
        try:
            self.publish("gone", why)
        except Exception:  # no other process is left
            pass

    def end(self, status: int) -> None:
        """Ends this process at once; process 0 only after the others had time to read the store."""
        try:
            self.publish("left", str(status))
            until = time.monotonic() + (LAST_WORDS_S if self.index == 0 else 0)
            while time.monotonic() < until and len(self.read("left")) < self.count - self.num_died():
                time.sleep(0.1)
        except Exception:
            pass
        self.release_witness()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def num_died(self) -> int:
        return list(self.read("gone").values()).count(DIED)

    def release_witness(self) -> None:
        try:
            self.witness.stdin.write("done\n")
            self.witness.stdin.close()
        except OSError:
            return
        self.witness.wait()


DIED = "has died"
_processes: _Processes | None = None


def silent(seen: dict[int, tuple[str, float]], beats: dict[int, str], now_s: float) -> dict[int, str]:
    """{number: `DIED`} of processes whose beat has not changed for `DEAD_AFTER_S`. seen: the state between calls."""
    for index, beat in beats.items():
        if seen.get(index, ("", 0.0))[0] != beat:
            seen[index] = beat, now_s
    return {index: DIED for index, (_, at) in seen.items() if now_s - at > DEAD_AFTER_S}


def start(cluster: Cluster, *, timeout_s: float = START_S) -> None:
    """Joins this process to the others of its run. Call once, before JAX uses a device.

    Raises:
      ConfigError: the processes do not fit together, or process 0 cannot listen (`rendezvous`); on all of them.
      RunError: some of the others do not come within `timeout_s`.
    """
    global _processes
    import jax
    from jax._src import distributed

    options = dict(
        initialization_timeout=int(timeout_s), heartbeat_timeout_seconds=RUNTIME_TIMEOUT_S,
        shutdown_timeout_seconds=RUNTIME_TIMEOUT_S,
    )  # fmt: skip
    gathering = nullcontext()
    if cluster.coordinator != AUTO:
        options |= dict(
            coordinator_address=cluster.coordinator, num_processes=cluster.num_processes,
            process_id=cluster.process_id, local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
        )  # fmt: skip
        gathering = rendezvous(cluster, timeout_s, _log)
    with gathering as address:
        try:
            jax.distributed.initialize(**options, coordinator_bind_address=address)
        except Exception as error:  # gRPC's, or of JAX's cluster detection: a long text without a field's name
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"the processes of this run did not come together within {timeout_s:.0f} s: coordinator "
                f"{cluster.coordinator}, process {cluster.process_id} of {cluster.num_processes} by {cluster.how}"
                f" ({reason})"
            ) from error
    state = distributed.global_state
    if state.num_processes == 1:
        return
    _processes = _Processes(state.client, state.process_id, state.num_processes, state.coordinator_address)
    name = _processes.name(_processes.index)
    listens = f", which listens at {address}" if address else ""
    _log(f"{name} of {_processes.count} by {cluster.how}, coordinator {state.coordinator_address}{listens}")


def _log(line: str) -> None:
    print(f"medcg: {line}", file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this process writes and prints for all of them; True for a single process."""
    return _processes is None or _processes.index == 0


def is_first_of_host() -> bool:
    """Whether this process is the first of those on its host, which fetches for them; True for a single process."""
    if _processes is None:
        return True
    host = _processes.hosts[_processes.index]
    return _processes.index == min(index for index, name in _processes.hosts.items() if name == host)


def count() -> int:
    """Number of processes of this run."""
    return 1 if _processes is None else _processes.count


def whoami() -> str:
    """ "process 1 (node7)"; "" for a single process."""
    return "" if _processes is None else _processes.name(_processes.index)


def barrier(name: str, timeout_s: float = BARRIER_S) -> None:
    """Returns when all processes have called it with this name as often as this one.

    Prints to stderr for which processes it waits, after 10 s and then every 30 s.

    Raises:
      RunError: some have not called it within `timeout_s`; the message names them.
    """
    if _processes is not None:
        wait(_processes, name, timeout_s)


def wait(processes: _Processes, name: str, timeout_s: float) -> None:
    processes.uses[name] += 1
    key = f"barrier/{name}/{processes.uses[name]}"
    processes.client.key_value_set(f"{KEYS}/{key}/{processes.index}", "")
    over = threading.Event()

    def missing() -> list[int]:
        return sorted(set(range(processes.count)) - processes.read(key).keys())

    def report() -> None:
        pause, began = REPORT_AFTER_S, time.monotonic()
        while not over.wait(pause):
            pause, late = REPORT_EVERY_S, missing()
            # Only the first waiting process prints.
            if late and processes.index == min(set(range(processes.count)) - set(late)):
                names = ", ".join(map(processes.name, late))
                _log(f"{name}: waiting for {names} since {time.monotonic() - began:.0f} s")

    threading.Thread(target=report, daemon=True).start()
    try:
        processes.client.wait_at_barrier(f"{KEYS}/{key}", int(timeout_s * 1000))
    except Exception as error:  # gRPC's: the time is over, or the coordinator is gone
        late = ", ".join(map(processes.name, missing()))
        raise RunError(f"{name}: {late or 'the coordinator'} did not come within {timeout_s:.0f} s") from error
    finally:
        over.set()


def broadcast(name: str, choose: Callable[[], object] | None = None):
    """On all processes, the result (JSON) of `choose()` on the first; the others do not call it, and may pass None."""
    if _processes is None:
        return choose()
    _processes.uses[name] += 1
    key = f"{KEYS}/said/{name}/{_processes.uses[name]}"
    if _processes.index == 0:
        _processes.client.key_value_set(key, json.dumps(choose()))
    while True:
        try:
            return json.loads(_processes.client.blocking_key_value_get(key, 60_000))
        except Exception as error:  # retried without limit; if the first process dies, the watch ends this one
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def gather(name: str, value) -> list:
    """On all processes, the values (JSON) of all processes, in the order of their numbers."""
    if _processes is None:
        return [value]
    what = f"gathered/{name}/{_processes.uses[name]}"
    _processes.publish(what, json.dumps(value))
    wait(_processes, name, BARRIER_S)
    values = _processes.read(what)
    return [json.loads(values[index]) for index in range(_processes.count)]


def finish() -> None:
    """Waits for the others at the end of a successful run, and disconnects; does nothing for a single process."""
    global _processes
    if _processes is None:
        return
    import jax

    wait(_processes, "the end of the run", BARRIER_S)
    _processes.leaving.set()
    jax.distributed.shutdown()
    _processes.release_witness()
    _processes = None


def fail(status: int, why: str) -> None:
    """Ends this process with `status`, and the others with its name and `why`; does nothing for a single process."""
    if _processes is not None:
        _processes.gone(f"ended with status {status}: {why}")
        _processes.end(status)


def await_verdict(why: str) -> None:
    """For an error about a lost connection: waits for the watch to find the dead process and to end this one.

    Returns at once for other errors, and after the wait if no process is dead.
    """
    if _processes is not None and any(word in why for word in LOST):
        time.sleep(DEAD_AFTER_S + LAST_WORDS_S)
