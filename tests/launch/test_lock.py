"""constraints.txt: one tested version of all that pyproject.toml asks for, on every Python, and how it is made."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "launch" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements(python: str) -> list[Requirement]:
    """What pyproject.toml asks for on a Python, with the extras that the tests install there."""
    extras = PROJECT["optional-dependencies"]
    texts = [
        *PROJECT["dependencies"],
        *extras["test"],
        *extras["tfds"],
        *(extras["parity"] if python == "3.11" else ()),
    ]
    wanted = [Requirement(text) for text in texts]
    return [item for item in wanted if item.name != PROJECT["name"] and holds(item, python)]


def holds(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def locked(lines: list[str], python: str) -> dict[str, list[str]]:
    """The versions of each package on a Python; there should be one."""
    versions: dict[str, list[str]] = {}
    for item in map(Requirement, lines):
        if holds(item, python):
            (pin,) = item.specifier
            assert pin.operator == "==" and not pin.version.endswith("*")
            versions.setdefault(canonicalize_name(item.name), []).append(pin.version)
    return versions


def faults(lines: list[str], python: str) -> list[str]:
    """What is missing, out of its bounds or there twice, on a Python."""
    versions = locked(lines, python)
    bad = [name for name, several in versions.items() if len(several) != 1]
    for item in requirements(python):
        (version, *_) = versions.get(canonicalize_name(item.name), [""])
        if not version or not item.specifier.contains(version):
            bad.append(item.name)
    return bad


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_version_within_its_bounds(python):
    assert len(requirements(python)) > 30 and not faults(LINES, python)


def test_the_pythons_are_those_that_the_project_is_for():
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert all(python in allowed for python in PYTHONS)
    assert "3.10" not in allowed and "3.14" not in allowed


def test_a_fault_is_seen():
    without = [line for line in LINES if not line.startswith("optax==")]
    assert faults(without, "3.12") == ["optax"]
    assert faults([*without, "optax==0.1"], "3.12") == ["optax"]
    assert faults([*LINES, "optax==0.2.7"], "3.13") == ["optax"]
    unmarked = [line.partition(";")[0] for line in LINES]
    assert {"jax", "flax", "numpy"} <= set(faults(unmarked, "3.11"))


def test_no_line_names_a_place():
    assert all("://" not in line and "/" not in line and "@" not in line for line in LINES)


def test_versions_of_several_environments_become_lines(lock):
    environments = [
        ("3.11", {"a": "1", "b": "1", "torch": "2", "d": "1"}),
        ("3.12", {"a": "1", "b": "2", "c": "5", "d": "2"}),
        ("3.13", {"a": "1", "b": "2", "c": "5", "d": "3"}),
    ]
    lines = lock.merged(environments)
    assert lines == [
        "a==1",
        "b==1; python_version <= '3.11'",
        "b==2; python_version > '3.11'",
        "c==5; python_version > '3.11'",
        "d==1; python_version <= '3.11'",
        "d==2; python_version > '3.11' and python_version <= '3.12'",
        "d==3; python_version > '3.12'",
        "torch==2; python_version <= '3.11'",
    ]
    for python, versions in environments:
        assert {name: several[0] for name, several in locked(lines, python).items()} == versions


def test_this_environment_is_read_as_it_is(lock, monkeypatch, tmp_path):
    versions = lock.installed()
    assert versions["jax"] == lock.metadata.version("jax") and versions["jaxlib"] == versions["jax"]
    assert "tensorstore" in versions and "medcg-jax" not in versions and not any("+" in v for v in versions.values())

    def installed_with(dependency: str):
        text = (ROOT / "pyproject.toml").read_text().replace('"ml-collections>=1.1,<1.2"', f'"{dependency}"')
        (tmp_path / "pyproject.toml").write_text(text)
        monkeypatch.setattr(lock, "PROJECT", tmp_path / "pyproject.toml")
        return lock.installed()

    assert "ml-collections" not in installed_with("jax")
    with pytest.raises(SystemExit, match="ml-collections<1 is asked for"):
        installed_with("ml-collections<1")
    with pytest.raises(lock.metadata.PackageNotFoundError):
        installed_with("no-such-package-of-ours")
