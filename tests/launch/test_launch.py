"""The launch scripts on machines made of a few commands and a Python that only answers what it is asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("basename", "bash", "cat", "cksum", "cp", "dirname", "env", "grep", "head", "mkdir", "sed", "tail", "tr")

# Answers `-c` with its version, makes environments that hold a copy of itself, and writes down every other call.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-c "*"venv, ensurepip"*) {has_venv} && echo {version} || exit 1 ;;
    "-c "*"%d.%d"*) echo {version} ;;
    "-c "*) echo "Python {version}" ;;
    "-V") echo "Python {version}.9" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    *) echo "$*" >>{calls}; case "$*" in *"-m pip"*) {pip} ;; *) exit "${{FAKE_STATUS:-0}}" ;; esac ;;
esac
"""


class Machine:
    """A checkout in a folder of its own, and a PATH with nothing but `TOOLS` and the Pythons that are added."""

    def __init__(self, root: Path):
        self.root, self.checkout, self.bin = root, root / "checkout", root / "bin"
        self.calls_file = root / "calls"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.checkout)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def add_python(self, name: str, version: str, *, has_venv: bool = True, pip: str = "true") -> Path:
        path = self.bin / name if "/" not in name else self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            FAKE_PYTHON.format(version=version, calls=self.calls_file, has_venv=str(has_venv).lower(), pip=pip)
        )
        path.chmod(0o755)
        return path

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin), "HOME": str(self.root / "home"), "CI": "true"} | env
        command = ["bash", f"launch/{script}", *args]
        return subprocess.run(
            command, cwd=self.checkout, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
            check=False,
        )  # fmt: skip

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def installs(machine: Machine) -> list[str]:
    return [call.rsplit(" ", 1)[-1] for call in machine.calls() if "pip install" in call and "-e ." in call]


def test_demo_makes_installs_and_runs(machine):
    machine.add_python("python3.12", "3.12")
    done = machine.run("demo.sh")
    assert done.returncode == 0, done.stderr
    assert installs(machine) == ["."]
    assert all("-c constraints.txt" in call for call in machine.calls() if "pip install" in call)
    workdir = machine.checkout / "runs" / "demo"
    assert machine.calls()[-1] == f"-m medcg_jax.cli reproduce --config=configs/phantom.py --workdir={workdir}"
    assert done.stdout.splitlines()[-1].endswith(f"{workdir}/report/index.html")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_the_second_demo_installs_nothing_and_a_changed_file_installs_again(machine, name):
    machine.add_python("python3.11", "3.11")
    machine.run("demo.sh")
    machine.run("demo.sh")
    assert len(installs(machine)) == 1
    with (machine.checkout / name).open("a") as file:
        file.write("\n# changed\n")
    machine.run("demo.sh", str(machine.root / "elsewhere"))
    assert len(installs(machine)) == 2
    assert machine.calls()[-1].endswith(f"--workdir={machine.root / 'elsewhere'}")


def test_a_failed_grid_fails_the_demo(machine):
    machine.add_python("python3.11", "3.11")
    done = machine.run("demo.sh", FAKE_STATUS="3")
    assert done.returncode == 3
    assert "index.html" not in done.stdout


def test_no_fitting_python_is_one_line(machine):
    machine.add_python("python3", "3.10")
    done = machine.run("demo.sh")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "3.11, 3.12 or 3.13" in done.stderr and "Python 3.10.9" in done.stderr


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_a_chosen_python_that_does_not_fit_is_one_line(machine, version):
    machine.add_python("python3.11", "3.11")
    chosen = machine.add_python("mine", version)
    done = machine.run("demo.sh", PYTHON=str(chosen))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"demo.sh: PYTHON={chosen} is Python {version}; expected 3.11, 3.12 or 3.13"]
    assert not machine.calls()


def test_a_python_without_venv_is_passed_over_and_pyenvs_are_found(machine):
    machine.add_python("python3.11", "3.11", has_venv=False)
    python = machine.add_python("home/.pyenv/versions/3.12.1/bin/python3.12", "3.12")
    done = machine.run("demo.sh")
    assert done.returncode == 0, done.stderr
    assert f"making .venv with {python}" in done.stdout


@pytest.mark.parametrize("name", ["python3.13", "python3", "mine"])
def test_a_python_without_venv_alone_says_what_to_install(machine, name):
    path = machine.add_python(name, "3.13", has_venv=False)
    done = machine.run("demo.sh", **({"PYTHON": str(path)} if name == "mine" else {}))
    assert done.returncode == 1 and not machine.calls()
    assert done.stderr.splitlines() == [
        f"demo.sh: {path} is Python 3.13 without the modules venv and ensurepip; on Debian or Ubuntu: "
        "apt install python3.13-venv"
    ]


def test_a_failed_installation_is_said_and_tried_again_next_time(machine):
    machine.add_python("python3.11", "3.11", pip="echo 'ERROR: no network' >&2; exit 1")
    done = machine.run("demo.sh")
    assert done.returncode == 1
    assert "the installation failed: ERROR: no network" in done.stderr.splitlines()[-1]
    assert not any("medcg_jax.cli" in call for call in machine.calls())
    before = len(installs(machine))
    machine.run("demo.sh")
    assert len(installs(machine)) > before


def pytest_calls(machine: Machine) -> list[str]:
    return [call for call in machine.calls() if "-m pytest" in call]


def test_a_machine_with_the_newest_python_alone(machine):
    machine.add_python("python3.13", "3.13")
    done = machine.run("test.sh")
    assert done.returncode == 0 and "no second run" in done.stdout, done.stderr
    assert installs(machine) == [".[test,parity]"] and len(pytest_calls(machine)) == 1
    assert not any("libtpu" in call for call in machine.calls())


@pytest.mark.parametrize("newest", ["3.12", "3.13"])
def test_the_suite_runs_once_and_a_smoke_test_on_the_newest_python(machine, newest):
    for version in ("3.11", "3.12", newest):
        machine.add_python(f"python{version}", version)
    for _ in range(2):
        done = machine.run("test.sh")
        assert done.returncode == 0, done.stderr
    assert installs(machine) == [".[test,parity]", ".[test]"]
    first, second = pytest_calls(machine)[:2]
    assert "-m smoke" not in first and second.endswith("-m smoke")
    assert {"-m ruff check .", "-m ruff format --check ."} <= set(machine.calls())


def test_all_runs_everything_on_both_pythons(machine):
    for version in ("3.11", "3.13"):
        machine.add_python(f"python{version}", version)
    assert machine.run("test.sh", "--all", "tests/nn").returncode == 0
    assert len(pytest_calls(machine)) == 2 and all(call.endswith("tests/nn") for call in pytest_calls(machine))
    assert all("-m  " in call for call in pytest_calls(machine)) and "-m mypy" in machine.calls()


def test_failed_tests_fail_the_script_after_the_second_run(machine):
    machine.add_python("python3.11", "3.11")
    machine.add_python("python3.12", "3.12")
    done = machine.run("test.sh", FAKE_STATUS="1")
    assert done.returncode == 1 and len(pytest_calls(machine)) == 2


def test_the_demo_finds_what_the_tests_installed(machine):
    machine.add_python("python3.11", "3.11")
    machine.run("test.sh")
    machine.run("demo.sh")
    assert installs(machine) == [".[test,parity]"]


def test_wrong_use_of_the_demo(machine):
    for args in (["--fast"], ["a", "b"]):
        done = machine.run("demo.sh", *args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "bash launch/demo.sh [WORKDIR]" in machine.run("demo.sh", "--help").stdout


def test_ci_runs_the_test_script():
    script = (ROOT / ".ci" / "run").read_text()
    assert "launch/test.sh" in script and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "bash launch/test.sh" in (ROOT / "README.md").read_text()
