"""Prints constraints.txt: the versions of all that the project asks for, from the environments that its tests ran in.

    python launch/lock.py .venv .venv313 >constraints.new && mv constraints.new constraints.txt

launch/test.sh makes both environments. The first is of the oldest Python; each further one stands for its own Python
and those up to the next. An extra is read where all of its packages are installed.
"""

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAD = """\
# The versions that the tests ran with: pip install -c constraints.txt .
# Made by launch/lock.py (BUILD_NOTES.md, versions).
"""
PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def installed() -> dict[str, str]:
    """Version, without its local part, of each package that the project needs in this environment.

    Raises:
      SystemExit: a package that the project needs is missing, or has a version that pyproject.toml excludes.
    """
    project = tomllib.loads(PROJECT.read_text())["project"]
    versions = closure(project["dependencies"])
    for name, requirements in project["optional-dependencies"].items():
        # An extra of an extra, as "medcg-jax[tfds]", stands in this loop itself.
        asked = [text for text in requirements if canonicalize_name(Requirement(text).name) != project["name"]]
        try:
            versions |= closure(asked)
        except metadata.PackageNotFoundError as error:
            print(f"{sys.prefix}: extra {name} is not read: no {error.name}", file=sys.stderr)
    return versions


def closure(requirements: list[str]) -> dict[str, str]:
    """Versions of the packages that the requirements name, and of all that those need, by name.

    Raises:
      PackageNotFoundError: one of them is not installed.
      SystemExit: an installed version is not what was asked for.
    """
    versions: dict[str, str] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        package = metadata.distribution(requirement.name)
        if not requirement.specifier.contains(package.version, prereleases=True):
            raise SystemExit(f"{sys.prefix}: {requirement} is asked for, and {package.version} is installed")
        name = canonicalize_name(requirement.name)
        versions[name] = package.version.partition("+")[0]
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in package.requires or ()]
    return versions


def merged(environments: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Lines of constraints from (Python, versions) of each environment, the oldest Python first."""
    pythons = [python for python, _ in environments]
    lines = []
    for name in sorted(set().union(*(versions for _, versions in environments))):
        spans: list[list] = []  # [version, first environment, last environment]
        for index, (_, versions) in enumerate(environments):
            version = versions.get(name)
            if spans and spans[-1][0] == version:
                spans[-1][2] = index
            else:
                spans.append([version, index, index])
        for version, first, last in spans:
            # A Python between two environments belongs to the newer one: the older is the last of its line of JAX.
            bounds = [f"python_version > '{pythons[first - 1]}'"] if first else []
            bounds += [f"python_version <= '{pythons[last]}'"] if last + 1 < len(pythons) else []
            if version:
                lines.append(f"{name}=={version}" + (f"; {' and '.join(bounds)}" if bounds else ""))
    return lines


def main(arguments: list[str]) -> None:
    if arguments == ["--installed"]:
        python = ".".join(map(str, sys.version_info[:2]))
        print(json.dumps([python, installed()]))
        return
    if not arguments:
        raise SystemExit("lock.py: expected the environments' folders, the oldest Python first")
    environments = []
    for folder in arguments:
        command = [f"{folder}/bin/python", __file__, "--installed"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"lock.py: {folder} could not be read")
        environments.append(tuple(json.loads(done.stdout)))
    print(HEAD + "\n".join(merged(environments)))


if __name__ == "__main__":
    main(sys.argv[1:])
