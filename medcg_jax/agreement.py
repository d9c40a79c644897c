"""Compares, at the start of a run of several processes, what they must share: configuration, data, code, packages.

If processes differed, half of a batch could have other records, or two programs could wait for each other forever.
"""

import dataclasses
import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from medcg_jax import processes
from medcg_jax.config import AUTO, ConfigError, RunConfig, flat
from medcg_jax.data.general import open_general
from medcg_jax.data.sources import open_source
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import registry

PACKAGES = ("medcg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Sections of the configuration that may differ, since only the first process uses them.
UNSHARED_SECTIONS = ("log",)


def check_agreement(run: RunConfig, verb: str, workdir: Path, data: Callable[[], dict[str, str]]) -> None:
    """Compares what the processes of this run were started with; does nothing for a single process.

    workdir: all processes see it under the same path. data: gives fingerprints of the data by name.

    Raises:
      ConfigError: on every process, if a process has another value than the first; the message names the field, both
        values and the process.
    """
    if processes.count() == 1:
        return
    facts = processes.gather("what processes share", (processes.whoami(), facts_of(run, verb, workdir, data())))
    (first, theirs), *others = facts
    for name, facts in others:
        check_same(first, theirs, name, facts)


def facts_of(run: RunConfig, verb: str, workdir: Path, data: dict[str, str]) -> dict:
    """What a process must share with the others of its run, by readable names."""
    settings = {f"config.{key}": value for key, value in flat(dataclasses.asdict(run)).items()}
    # A family is not known yet where the checkpoint states it; nor are its files compared, on any host.
    stem = registry.of_model(run.model.name).tokenizer if run.model.name != AUTO else "tokenizer"
    tokenizer = load_tokenizer(run.model.tokenizer, stem)
    return (
        {"verb": verb}
        | {key: value for key, value in settings.items() if key.split(".")[1] not in UNSHARED_SECTIONS}
        | {"--workdir": str(workdir.absolute())}
        | {f"version of {name}": number for name, number in versions().items()}
        | {"code of medcg_jax": code_digest(), "tokenizer": tokenizer.fingerprint}
        | {f"data ({name})": digest for name, digest in data.items()}
    )


def check_same(first: str, theirs: dict, name: str, facts: dict) -> None:
    """Raises ConfigError for the first fact that the processes `first` and `name` do not share."""
    for key in [*theirs, *(key for key in facts if key not in theirs)]:
        if theirs.get(key) != facts.get(key):
            raise ConfigError(
                f"{key} is {json.dumps(facts.get(key))} on {name} and {json.dumps(theirs.get(key))} on {first}: "
                "expected the same on all processes of a run, except for --process_id and config.log.*"
            )


def data_fingerprint(run: RunConfig, *, with_boxes: bool = False) -> str:
    """A fingerprint of the choice records, with `with_boxes` of the boxes, and of the general records if any."""
    source = open_source(run.data)
    digests = [source.fingerprint()]
    if with_boxes:
        digests.append(source.detection_fingerprint())
    if general := open_general(run.data):
        digests.append(general.fingerprint())
    return " ".join(digests)


@functools.cache
def code_digest() -> str:
    """A digest of the package's source files, which may change without a new version."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@functools.cache
def commit() -> str:
    """The commit of the checkout that this package is run from, with "+" where its files were changed; "" where the
    package is no part of a checkout (a wheel), or git is not there."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        # The folder may lie within the checkout of something else.
        git("ls-files", "--error-unmatch", "agreement.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Versions of Python and the packages that results depend on; "none" for one that is not installed."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES}
