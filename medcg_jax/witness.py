"""Reports which process died when JAX aborts this one; a small process beside each process of a run.

    python witness.py COORDINATOR OWN_NUMBER OWN_HOST FIRST_HOST < PIPE

JAX's runtime aborts a process at once when the coordinator, process 0, is gone: no Python code runs any more
(coordination_service_agent.cc, client.h:80 of jaxlib 0.10.2), and the runtime names no host. The process holds the
other end of the pipe, and writes a line to it before it ends normally.
"""

import socket
import sys

CONNECT_S = 5.0


def answers(address: str) -> bool:
    """Whether a program listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError:
        return False
    return True


def main(coordinator: str, number: str, host: str, first: str) -> None:
    if sys.stdin.readline() or number == "0":
        return
    if answers(coordinator):
        print(f"medcg: process {number} ({host}) was ended from outside or by the runtime", file=sys.stderr)
    else:
        print(f"medcg: process 0 ({first}) has died, and with it process {number} ({host})", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
