"""Rows about processes of one run, claims, and flags."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from harness import CHECKOUT, medcg, refused, told

TINY = "--config=configs/phantom.py:tiny"
# What a start and its refusal may take, the others of the run included.
START_S = 150.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    *arguments: str | Path, env: dict[str, str] | None = None, wrapper: tuple = (), err=subprocess.PIPE
) -> subprocess.Popen:
    """`medcg ARGUMENTS...` as a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
    command = [*wrapper, sys.executable, "-m", "medcg_jax.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=err, text=True)


def together(folder: Path, *different: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """(status, out, err) of the processes of one training, each with its own flags beside the common ones."""
    port = free_port()
    processes = [
        start("train", TINY, f"--workdir={folder / 'w'}", f"--coordinator=127.0.0.1:{port}",
              f"--num_processes={len(different)}", f"--process_id={index}", *flags)
        for index, flags in enumerate(different)
    ]  # fmt: skip
    return [ended(process) for process in processes]


def ended(process: subprocess.Popen, timeout_s: float = START_S) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not ended after {timeout_s:.0f} s: {err[-300:]}") from None
    return process.returncode, out, err


def both_refuse(results: list[tuple[int, str, str]], *words: str) -> str:
    for index, (status, _, err) in enumerate(results):
        assert "Traceback" not in err, f"process {index}: a traceback: {err.strip().splitlines()[-1]}"
        assert status == 2, f"process {index}: status {status}: {err[-300:]}"
        lines = [line for line in err.splitlines() if line.startswith("medcg: ")]
        assert any(all(word in line for word in words) for line in lines), f"process {index}: {lines}"
    return lines[0]


def other_config_on_one_process(folder: Path) -> str:
    results = together(folder, (), ("--config.train.learning_rate=5e-5",))
    return both_refuse(results, "train.learning_rate", "5e-05", "process 1")


def other_data_on_one_process(folder: Path) -> str:
    results = together(folder, (), ("--config.data.seed=7",))
    assert not (folder / "w" / "params").exists()
    return both_refuse(results, "data.seed", "7")


def port_in_use(folder: Path) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = ended(start("train", TINY, f"--workdir={folder / 'w'}", f"--coordinator=127.0.0.1:{port}",
                                     "--num_processes=2", "--process_id=0"))  # fmt: skip
    return both_refuse([(status, "", err)], str(port))


def coordinator_all_interfaces(folder: Path) -> str:
    port = free_port()
    process = start(
        "train",
        TINY,
        f"--workdir={folder / 'w'}",
        f"--coordinator=127.0.0.1:{port}",
        "--num_processes=2",
        "--process_id=0",
    )
    try:
        deadline = time.monotonic() + 60
        while not (addresses := listeners(port)) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        assert addresses == {"127.0.0.1"}, addresses
        return f"listens at {addresses} alone"
    finally:
        process.kill()
        process.communicate()


def listeners(port: int) -> set[str]:
    """Addresses on which this machine listens at a port, from the kernel's tables."""
    addresses = set()
    for name, family, size in (("tcp", socket.AF_INET, 8), ("tcp6", socket.AF_INET6, 32)):
        with contextlib.suppress(OSError), open(f"/proc/net/{name}") as table:
            for line in table.readlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                host, _, number = local.partition(":")
                if state == "0A" and int(number, 16) == port:
                    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, size, 8)]
                    addresses.add(socket.inet_ntop(family, b"".join(words)))
    return addresses


def abort_at_end(folder: Path) -> str:
    """Seen once in many; the folder that was there is what that run had."""
    (folder / "w" / "params").mkdir(parents=True)
    status, _, err = ended(start("train", TINY, f"--workdir={folder / 'w'}"))
    assert status == 0 and "exception not rethrown" not in err, (status, err[-300:])
    return "status 0"


def claim_of(folder: Path, content: str | dict) -> tuple[Path, Path]:
    """(workdir, claim) where the first job of a tiny grid has been claimed already."""
    work = folder / "w"
    told(medcg("reproduce", TINY, f"--workdir={work}", cwd=CHECKOUT, timeout_s=400))
    done = sorted((work / "state" / "done").iterdir())[0]
    job = done.stem
    for path in (work / "state" / "claims").glob(f"{job}.*"):
        path.unlink()
    done.unlink()
    claim = work / "state" / "claims" / f"{job}.0"
    claim.write_text(content if isinstance(content, str) else json.dumps(content))
    return work, claim


def claim_keys(folder: Path) -> str:
    work, claim = claim_of(folder, {"host": socket.gethostname()})
    old = time.time() - 10_000
    os.utime(claim, (old, old))
    result = medcg("reproduce", TINY, f"--workdir={work}", cwd=CHECKOUT, timeout_s=300)
    told(result)
    return "judged by its age, and taken over"


def claim_future(folder: Path) -> str:
    work, claim = claim_of(folder, {"host": "elsewhere", "pid": 7, "start": "1"})
    ahead = time.time() + 3 * 365 * 86_400
    os.utime(claim, (ahead, ahead))
    result = medcg("reproduce", TINY, f"--workdir={work}", cwd=CHECKOUT, timeout_s=60)
    if result.status == 0:
        return "taken over"
    assert "elsewhere" in result.text, f"waited without a word: {result.text[-300:]}"
    return next(line for line in result.text.splitlines() if "elsewhere" in line)


def same_hostname_containers(folder: Path) -> str:
    """Two containers of one host name that share a folder: a claim of the one is no dead process to the other."""
    program = (
        f"import sys, time, pathlib; sys.path.insert(0, {str(CHECKOUT)!r}); from medcg_jax.study.run import claims; "
        f"folder = pathlib.Path({str(folder)!r}); claim = claims.take(folder, 'job'); print(bool(claim), flush=True); time.sleep(30 * bool(claim))"
    )
    container = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode:
        return "not run: no namespaces here"
    first = subprocess.Popen(
        [*container, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert first.stdout.readline().strip() == "True"
        second = subprocess.run(
            [*container, sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        assert second.stdout.strip() == "False", f"both hold the work: {second.stdout} {second.stderr[-300:]}"
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    return "the second leaves the first's claim alone"


def no_home_no_passwd(folder: Path) -> str:
    setpriv = shutil.which("setpriv")
    if not setpriv:
        return "not run: no setpriv here"
    user = (
        setpriv,
        "--reuid=54321",
        "--regid=54321",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    )
    folder.chmod(0o777)
    result = ended(start("train", TINY, f"--workdir={folder / 'w'}", wrapper=(*user, "env", "-u", "HOME")))
    assert "Traceback" not in result[2] and result[0] in (0, 2), (result[0], result[2][-300:])
    return f"status {result[0]}"


def workdir_tilde(folder: Path) -> str:
    cwd = folder / "here"
    cwd.mkdir()
    config = CHECKOUT / "configs" / "phantom.py"
    line = refused(medcg("train", f"--config={config}:tiny", "--workdir=~nosuch/x", cwd=cwd), "~nosuch")
    assert not list(cwd.iterdir()), list(cwd.iterdir())
    return line


def max_text_tokens_huge(folder: Path) -> str:
    flag = "--config.data.max_text_tokens=99999999999999999999"
    return refused(medcg("train", TINY, flag, f"--workdir={folder / 'w'}", cwd=CHECKOUT), "data.max_text_tokens")


def seeds_targets_twice(folder: Path) -> str:
    refused(medcg("reproduce", "--dry", TINY, "--config.study.seeds=(1,1)", cwd=CHECKOUT), "study.seeds")
    flag = "--config.study.targets=('ct-liver-grade','ct-liver-grade')"
    return refused(medcg("reproduce", "--dry", TINY, flag, cwd=CHECKOUT), "study.targets")


ROWS = {
    run.__name__: run
    for run in (
        abort_at_end, claim_future, claim_keys, coordinator_all_interfaces, other_config_on_one_process,
        other_data_on_one_process, port_in_use, same_hostname_containers, no_home_no_passwd, workdir_tilde,
        max_text_tokens_huge, seeds_targets_twice,
    )
}  # fmt: skip
