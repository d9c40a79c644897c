"""A SLURM of this host alone, with two cores for tasks and everything in one folder: its own ports, key and state.

It needs root, and the programs of Debian's packages slurm-wlm and munge.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "srun")
# Daemons lie where only root's PATH may look.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
COMMAND_S, START_S = 60, 60
UNENDED = ("PENDING", "RUNNING", "COMPLETING")

CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
# A job that is queued again waits until its credential has expired: 120 s, unless told.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
ReturnToService=2
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=both Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def command(*arguments: str | Path, env: dict[str, str] | None = None, timeout_s: float = COMMAND_S):
    return subprocess.run(
        [str(argument) for argument in arguments], cwd=ROOT, env=env or settings(), capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=timeout_s, check=False,
    )  # fmt: skip


def settings() -> dict[str, str]:
    """One simulated device a task, and this checkout's code in this Python."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    variables = {"PATH": PATH, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    return dict(os.environ) | variables


def wait_for(what: str, done: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


class Slurm:
    """munged, slurmctld and slurmd of a folder, between `start` and `stop`."""

    def __init__(self, root: Path):
        self.root, self.env = root, settings() | {"SLURM_CONF": str(root / "slurm.conf")}
        self._host = platform.node().partition(".")[0]
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.root / name).mkdir()
        self.root.chmod(0o755)  # munged wants a folder that everybody may enter
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        with socket.socket() as first, socket.socket() as second:
            for free in (first, second):
                free.bind(("127.0.0.1", 0))
            ports = first.getsockname()[1], second.getsockname()[1]
        conf = CONF.format(host=self._host, ports=ports, root=self.root)
        (self.root / "slurm.conf").write_text(conf)
        files = ("socket", "key-file", "pid-file", "seed-file", "log-file")
        places = [f"--{name}={self.root}/munge.{name.removesuffix('-file')}" for name in files]
        self._spawn("munged", "--foreground", "--force", *places)
        wait_for("munged", (self.root / "munge.socket").exists, START_S)
        self._spawn("slurmctld", "-D", "-i")
        self._spawn("slurmd", "-D")
        wait_for("a node that is idle", lambda: "State=IDLE" in self.scontrol("show", "node", self._host), START_S)

    def _spawn(self, name: str, *arguments: str) -> None:
        with open(self.root / f"{name}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen([shutil.which(name, path=PATH), *arguments], env=self.env, stdout=out,
                                 stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            )  # fmt: skip

    def stop(self) -> None:
        """Ends what is left of jobs, then the daemons, each by its own process."""
        try:
            for job in set(self.jobs()):
                self.scancel("--signal=KILL", "--full", job)
                self.scancel(job)
            wait_for("the end of all jobs", lambda: not self._running(), START_S)
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                try:
                    daemon.wait(COMMAND_S)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def scontrol(self, *arguments: str) -> str:
        return command("scontrol", *arguments, env=self.env).stdout

    def scancel(self, *arguments: str) -> None:
        command("scancel", *arguments, env=self.env)

    def jobs(self) -> dict[str, str]:
        """ "JOB", or "JOB_TASK" of an array -> its state, of all that SLURM remembers."""
        states = {}
        for line in self.scontrol("--oneliner", "show", "jobs").splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            task = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayJobId" in fields else fields["JobId"]
            states[task] = fields["JobState"]
        return states

    def _running(self) -> list[str]:
        return [job for job, state in self.jobs().items() if state in UNENDED]


def start_slurm(root: Path) -> Slurm:
    """A SLURM that runs, for the caller to stop; skips the test where none can be had."""
    if os.geteuid():
        pytest.skip("not root, as whom SLURM's daemons run here")
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        pytest.skip(f"no SLURM on this machine to try ({', '.join(missing)} missing)")
    slurm = Slurm(root)
    try:
        slurm.start()
    except BaseException:
        slurm.stop()
        raise
    return slurm
