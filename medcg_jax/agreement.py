"""What the processes of one run must share is compared at its start: configuration, data, code and packages.

Each process would otherwise go on with its own: half of a batch is of other records then, or two programs wait for
each other.
"""

import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from medcg_jax import processes
from medcg_jax.config import ConfigError, RunConfig, flat
from medcg_jax.data.general import open_general
from medcg_jax.data.sources import open_source
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import registry

PACKAGES = ("medcg-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Each process's own: the flag --process_id, and these sections, which the first process alone reads.
OWN_SECTIONS = ("log",)


def check_agreement(run: RunConfig, verb: str, workdir: Path, data: Callable[[], dict[str, str]]) -> None:
    """Compares what the processes of this run were started with; without other processes does nothing.

    verb: what is run. workdir: where; all see it under one path. data: gives a fingerprint by seed, or of what it is.

    Raises:
      ConfigError: on every process, where one has another value than the first; the message names the field, both
        values and the process.
    """
    if processes.count() == 1:
        return
    facts = processes.gather("what processes share", (processes.whoami(), facts_of(run, verb, workdir, data())))
    (first, theirs), *others = facts
    for name, facts in others:
        check_same(first, theirs, name, facts)


def facts_of(run: RunConfig, verb: str, workdir: Path, data: dict[str, str]) -> dict:
    """What a process must share with the others of its run, by names for people."""
    settings = {f"config.{key}": value for key, value in flat(dataclasses.asdict(run)).items()}
    tokenizer = load_tokenizer(run.model.tokenizer, registry.of_model(run.model.name).tokenizer)
    return (
        {"verb": verb}
        | {key: value for key, value in settings.items() if key.split(".")[1] not in OWN_SECTIONS}
        | {"--workdir": str(workdir.absolute())}
        | {f"version of {name}": number for name, number in versions().items()}
        | {"code of medcg_jax": code_digest(), "tokenizer": tokenizer.fingerprint}
        | {f"data ({name})": digest for name, digest in data.items()}
    )


def check_same(first: str, theirs: dict, name: str, facts: dict) -> None:
    """Raises ConfigError for the first fact that two processes, `first` and `name`, do not share."""
    for key in [*theirs, *(key for key in facts if key not in theirs)]:
        if theirs.get(key) != facts.get(key):
            raise ConfigError(
                f"{key} is {json.dumps(facts.get(key))} on {name} and {json.dumps(theirs.get(key))} on {first}: the same "
                "is accepted on all processes of a run; --process_id and config.log.* alone may differ"
            )


def data_fingerprint(run: RunConfig, *, with_boxes: bool = False) -> str:
    """Of the choice records, of the boxes where asked for, and of the general records if any."""
    source = open_source(run.data)
    digests = [source.fingerprint()]
    if with_boxes:
        digests.append(source.detection_fingerprint())
    if general := open_general(run.data):
        digests.append(general.fingerprint())
    return " ".join(digests)


@functools.cache
def code_digest() -> str:
    """A digest of the package's source files: its version is the same while it is worked on."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that numbers depend on; a package that is not installed is "none"."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES}
