"""Before JAX starts, each process of a run tells process 0 its number, and process 0 checks that they fit together.

JAX's own service aborts a process with a duplicate number or after a timeout, accepts one that names another number of
processes, and segfaults if its port is taken (coordination_service.cc and client.h:80 of jaxlib 0.10.2). So each
process first connects to the coordinator's port, where process 0 listens until all have come; then JAX takes over the
port. One line of JSON goes each way. Other connections are ignored.
"""

import errno
import ipaddress
import json
import os
import platform
import select
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medcg_jax.cluster import Cluster
from medcg_jax.config import ConfigError, RunError

POLL_S, CONNECT_S = 0.5, 5.0
# Something else that answers at the port may be the end of an earlier run, so retries go on for this long.
OTHERS_S = 30.0
# How long a name is looked up again if it has no address of this host yet (a pod that has just started).
NAME_S = 60.0
# How long process 0 stays after a refusal, to tell it to processes that come later.
LATE_S = 10.0
REPORT_AFTER_S, REPORT_EVERY_S = 10.0, 30.0
MAX_LINE_BYTES = 4096
# JAX's variable for the address where process 0 listens, if the coordinator's is not one of its own (behind NAT).
BIND_NAME = "JAX_COORDINATOR_BIND_ADDRESS"


@contextmanager
def rendezvous(cluster: Cluster, timeout_s: float, log: Callable[[str], None]) -> Iterator[str | None]:
    """Enters its block when all processes of `cluster` have come; in the block JAX takes over the port.

    Yields the address at which process 0's service listens, None on the others. log: prints lines about waiting.

    Raises:
      ConfigError: the address is taken or not of this host, or the processes do not fit together; on all of them.
      RunError: some do not come within `timeout_s`; the message names them.
    """
    if cluster.process_id:
        _join(cluster, timeout_s, log)
        yield None
        return
    listener, address = _listen_soon(cluster.coordinator, min(NAME_S, timeout_s))
    with listener:
        _host(listener, cluster, timeout_s, log)
        try:
            # The socket no longer listens but holds the port, so that no other program takes it before JAX.
            listener.shutdown(socket.SHUT_RD)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC's own socket
        except (OSError, AttributeError):
            listener.close()
        yield address


class _NotHereError(ConfigError):
    """The coordinator's address is not of this host."""


def _listen_soon(coordinator: str, timeout_s: float) -> tuple[socket.socket, str]:
    """`listen`, repeated for up to `timeout_s` while a name has no address of this host yet."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return listen(coordinator)
        except _NotHereError:
            if _is_literal(_split(coordinator)[0]) or time.monotonic() > until:
                raise
        time.sleep(POLL_S)


def listen(coordinator: str) -> tuple[socket.socket, str]:
    """(a socket that listens at HOST:PORT, its address in JAX's form).

    If this host resolves its own name to a loopback address (127.0.1.1 in /etc/hosts), others may use any of its
    addresses, so the socket listens at all of them.

    Raises:
      ConfigError: the port is taken, or HOST is not this host.
    """
    address = os.environ.get(BIND_NAME, "") or coordinator
    host, port = _split(address)
    infos = sorted(_resolved(address), key=lambda info: info[0] != socket.AF_INET)
    addresses = list(dict.fromkeys((info[0], info[4][0]) for info in infos))
    if not _is_literal(host):
        outside = [(kind, ip) for kind, ip in addresses if not ipaddress.ip_address(ip.partition("%")[0]).is_loopback]
        addresses = outside or [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
    for kind, ip in addresses:
        listener = None
        try:
            listener = socket.socket(kind, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ip == "::":
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((ip, port))
            listener.listen(1024)
        except OSError as error:
            if listener is not None:
                listener.close()
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError(
                    f"coordinator {coordinator}: process 0 cannot listen at {ip}, port {port} ({error.strerror}): "
                    "another program or another process 0 has it; expected a free port, the same on all processes"
                ) from error
            continue  # not an address of this host
        return listener, f"[{ip}]:{port}" if kind == socket.AF_INET6 else f"{ip}:{port}"
    raise _NotHereError(
        f"coordinator {coordinator}: {', '.join(ip for _, ip in addresses)} is no address of {platform.node()}, where "
        f"process 0 is: expected the host of process 0; {BIND_NAME} says where to listen behind address translation"
    )


def _is_literal(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{BIND_NAME}={address}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _resolved(address: str) -> list[tuple]:
    host, port = _split(address)
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _NotHereError(f"coordinator {address}: {host} has no address here ({error})") from error


def _host(listener: socket.socket, cluster: Cluster, timeout_s: float, log: Callable[[str], None]) -> None:
    """Process 0: waits for one process of every other number."""
    here, count = platform.node(), cluster.num_processes
    until, wait_log = time.monotonic() + timeout_s, _WaitLog(log)
    texts: dict[socket.socket, bytes] = {}  # bytes of each connection so far
    waiting: dict[socket.socket, tuple[int, str]] = {}  # number and host of each process that waits for an answer
    greeted: set[socket.socket] = set()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)

    def missing() -> str:
        return _numbers(set(range(1, count)) - {number for number, _ in waiting.values()})

    def answer_all(answer: dict) -> None:
        for connection in waiting:
            try:
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:  # its process is gone, which JAX will notice
                pass

    try:
        refusal, informed, most = "", set(), count
        while len(waiting) < count - 1 if not refusal else informed < set(range(1, most)):
            if time.monotonic() > until and refusal:
                break
            if time.monotonic() > until:
                late = f"{missing()} did not come within {timeout_s:.0f} s"
                why = f"{late} to {cluster.coordinator}, where process 0 is ({here})"
                answer_all({"late": why})
                raise RunError(why)
            wait_log.check(lambda: f"{missing()} at {cluster.coordinator}")
            for ready in [key.fileobj for key, _ in selector.select(POLL_S)]:
                if ready is listener:
                    connection = listener.accept()[0]
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ)
                    texts[connection] = b""
                    continue
                try:
                    received = ready.recv(MAX_LINE_BYTES)
                except OSError:
                    received = b""
                texts[ready] += received
                greeting = _greeting(texts[ready])
                is_other = greeting is None and (b"\n" in texts[ready] or len(texts[ready]) > MAX_LINE_BYTES)
                if not received or is_other:
                    del texts[ready]
                    waiting.pop(ready, None)
                    selector.unregister(ready)
                    ready.close()
                elif greeting is not None and ready not in greeted:
                    greeted.add(ready)
                    number, their_count, host = greeting
                    why = ""
                    same = [known for at, known in waiting.values() if at == number]
                    if their_count != count:
                        why = (
                            f"num_processes={their_count} on process {number} ({host}), {count} on process 0 ({here}): "
                        )
                        why += "expected the same number on all"
                    elif same or number == 0:
                        why = f"process {number} is there twice, on {(same or [here])[0]} and on {host}: expected "
                        why += f"different numbers, 0 to {count - 1}"
                    waiting[ready] = number, host
                    if why and not refusal:
                        refusal, until = why, time.monotonic() + LATE_S
                    if refusal:
                        answer_all({"refused": refusal})
                        informed, most = informed | {at for at, _ in waiting.values()}, max(most, their_count)
                        waiting.clear()
        if refusal:
            raise ConfigError(refusal)
        answer_all({"welcome": True})
    finally:
        selector.close()
        for connection in texts:
            connection.close()


def _greeting(text: bytes) -> tuple[int, int, str] | None:
    """(number, number of processes, host) from a complete line; None for anything else."""
    line, end, _ = text.partition(b"\n")
    message = _object(line) if end else {}
    values = message.get("process"), message.get("count"), message.get("host")
    return values if [type(value) for value in values] == [int, int, str] and values[0] >= 0 else None


def _object(line: bytes) -> dict:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _join(cluster: Cluster, timeout_s: float, log: Callable[[str], None]) -> None:
    """Every other process: sends process 0 its number and host, and waits for the answer."""
    until = time.monotonic() + timeout_s
    greeting = {"process": cluster.process_id, "count": cluster.num_processes, "host": platform.node()}
    wait_log, others_since, reason = _WaitLog(log), None, "nobody answers"
    while (left := until - time.monotonic()) > 0:
        wait_log.check(lambda: f"process 0 at {cluster.coordinator}")
        try:
            with socket.create_connection(_split(cluster.coordinator), min(CONNECT_S, left)) as connection:
                connection.sendall(json.dumps(greeting).encode() + b"\n")
                line = _answer(connection, time.monotonic() + timeout_s + CONNECT_S, wait_log, cluster)
        except (OSError, UnicodeError) as error:
            reason, line = getattr(error, "strerror", None) or str(error), b""
        answer = _object(line)
        if "welcome" in answer:
            return
        if "refused" in answer:
            raise ConfigError(str(answer["refused"]))
        if "late" in answer:
            raise RunError(str(answer["late"]))
        if line:
            others_since = others_since or time.monotonic()
            if time.monotonic() - others_since > OTHERS_S:
                raise ConfigError(
                    f"coordinator {cluster.coordinator}: what answers there is no run that waits for process "
                    f"{cluster.process_id} of {cluster.num_processes}, but another program or a complete run"
                )
        time.sleep(POLL_S)
    raise RunError(
        f"process 0 did not come within {timeout_s:.0f} s: coordinator {cluster.coordinator}, process "
        f"{cluster.process_id} of {cluster.num_processes} by {cluster.how} ({reason})"
    )


def _answer(connection: socket.socket, until: float, wait_log: "_WaitLog", cluster: Cluster) -> bytes:
    """The first line, or its beginning if the other side ends; b"" if nothing comes until `until`."""
    text = b""
    while time.monotonic() < until and b"\n" not in text and len(text) <= MAX_LINE_BYTES:
        wait_log.check(lambda: f"the other processes at {cluster.coordinator}")
        if not select.select([connection], [], [], POLL_S)[0]:
            continue
        received = connection.recv(MAX_LINE_BYTES)
        if not received:
            break
        text += received
        if not text.startswith(b"{"):
            break
    return text


class _WaitLog:
    """Logs for which processes this one waits: after 10 s, then every 30 s."""

    def __init__(self, log: Callable[[str], None]):
        self._log, self._began = log, time.monotonic()
        self._next = self._began + REPORT_AFTER_S

    def check(self, whom: Callable[[], str]) -> None:
        now = time.monotonic()
        if now > self._next:
            self._next = now + REPORT_EVERY_S
            self._log(f"the start: waiting for {whom()} since {now - self._began:.0f} s")


def _numbers(numbers: set[int], most: int = 8) -> str:
    """ "process 1", "processes 2, 5 and 90 more"."""
    listed = [str(number) for number in sorted(numbers)]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{'process' if len(listed) == 1 else 'processes'} {', '.join(listed[:most])}{more}"
