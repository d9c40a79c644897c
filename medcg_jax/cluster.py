"""This process's number among the processes of one run, from flags or from the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from medcg_jax.config import ConfigError

FLAGS = ("--coordinator", "--num_processes", "--process_id")
# The first is JAX's own; the others follow its pattern.
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Value of --coordinator with which JAX asks the TPU VM's metadata server for all three.
AUTO = "auto"
# As jax/_src/clusters/slurm_cluster.py:SlurmCluster.get_coordinator_address of jax 0.10.2 does: the last 4096 ports.
FIRST_PORT, NUM_PORTS = 61440, 4096


@dataclass(frozen=True)
class Cluster:
    """A run of several processes, as seen by one of them.

    how: where this was read from, for messages.
    coordinator: HOST:PORT of process 0; `AUTO`: JAX finds it and the two numbers itself, which are None then.
    local_devices: the accelerators of the host that this process uses; None: all.
    """

    how: str
    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def detect(
    environ: Mapping[str, str], *, coordinator: str = "", num_processes: str = "", process_id: str = ""
) -> Cluster | None:
    """The run of several processes that this process belongs to; None if it is a run by itself.

    Precedence: flags, `NAMES` (on GKE the number is the pod's completion index), a SLURM step of several tasks, a TPU
    slice of several hosts. By default a task of a SLURM array and a pod of an indexed Job are runs by themselves;
    `--num_processes=1` makes any process a run by itself.

    Raises:
      ConfigError: some of the flags or variables are missing or unusable; the message names them.
    """
    given = (coordinator, num_processes, process_id)
    if given == ("", "1", ""):
        return None
    if given == (AUTO, "", ""):
        return Cluster("JAX", AUTO)
    if any(given):
        return _explicit("flags", FLAGS, given)
    slurm = _slurm(environ)
    given = tuple(environ.get(name, "") for name in NAMES)
    if any(given) and not (slurm and given[1:] == ("", "")):
        if not given[2] and "JOB_COMPLETION_INDEX" in environ:
            return _explicit("GKE", (*NAMES[:2], "JOB_COMPLETION_INDEX"), (*given[:2], environ["JOB_COMPLETION_INDEX"]))
        return _explicit("the environment", NAMES, given)
    if slurm:
        return slurm
    hosts = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(hosts) > 1 or environ.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1"):
        return Cluster("TPU_WORKER_HOSTNAMES", AUTO)
    return None


def _explicit(how: str, names: tuple[str, ...], values: tuple[str, ...]) -> Cluster | None:
    missing = [name for name, value in zip(names, values, strict=True) if not value]
    if missing:
        has = [f"{name}={value}" for name, value in zip(names, values, strict=True) if value]
        raise ConfigError(f"{', '.join(has)} without {' and '.join(missing)}: expected all three, or none")
    coordinator, count, index = values
    if not re.fullmatch(r"[^\s:]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", coordinator):
        raise ConfigError(f"{names[0]}={coordinator}: expected HOST:PORT, as node1:9876")
    if not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        raise ConfigError(f"{names[0]}={coordinator}: expected a port from 1 to 65535")
    if not re.fullmatch("[0-9]{1,6}", count) or int(count) < 1:
        raise ConfigError(f"{names[1]}={count}: expected a number of processes from 1")
    if not re.fullmatch("[0-9]{1,6}", index) or int(index) >= int(count):
        raise ConfigError(f"{names[2]}={index}: expected 0 to {int(count) - 1} with {names[1]}={count}")
    return Cluster(how, coordinator, int(count), int(index)) if int(count) > 1 else None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    """The run of a step that srun started with several tasks; None for any other process."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    if not all(name in environ for name in names):
        return None
    job, step, count, nodes, index = (environ[name] for name in names)
    # A batch script is a step too, but not one that srun started.
    if not all(text.isdecimal() for text in (job, step, count, index)) or int(count) < 2 or int(index) >= int(count):
        return None
    port = environ.get("JAX_COORDINATOR_PORT") or FIRST_PORT + (int(job) + int(step)) % NUM_PORTS
    coordinator = environ.get(NAMES[0]) or f"{first_host(nodes)}:{port}"
    return Cluster("SLURM", coordinator, int(count), int(index), _slurm_devices(environ))


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPU of this task, if each task of the node sees as many GPUs as there are tasks; None: all that it sees.

    JAX's default is one GPU for each SLURM task, which leaves seven of a node's eight idle if there is one task:
    jax/_src/clusters/cluster.py:auto_detect_unset_distributed_params of jax 0.10.2.
    """
    tasks = tasks_of(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(environ.get("SLURM_NODEID", "0")))
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (int(environ["SLURM_LOCALID"]),) if 1 < tasks == len(visible) else None


def tasks_of(counts: str, node: int) -> int:
    """The tasks on a node of a step, from SLURM's short form: "4(x2),1" is 4, 4 and 1 tasks on nodes 0, 1 and 2."""
    for group in counts.split(","):
        count, _, times = group.partition("(x")
        node -= int(times.rstrip(")") or 1)
        if node < 0:
            return int(count)
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={counts} has no node {node}")


def first_host(nodes: str) -> str:
    """The first host in SLURM's short form: node001 in "node[001-004,7],big"."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodes)
    head, numbers, tail = match.groups()
    return head + (re.split("[-,]", numbers)[0] if numbers else "") + (tail if numbers else "")
