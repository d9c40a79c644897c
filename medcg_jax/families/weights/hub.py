"""Checkpoints and data by their name on the Hugging Face hub: `llava-hf/llava-1.5-7b-hf`, `NAME@REVISION`.

`huggingface_hub` fetches them, with its cache (HF_HOME, HF_HUB_CACHE), token (`hf auth login`, HF_TOKEN), address
(HF_ENDPOINT) and offline mode (HF_HUB_OFFLINE); it goes on with a download that broke off. A local folder of the same
name comes first.
"""

import errno
import functools
import logging
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medcg_jax.config import ConfigError, RunError

# OWNER/NAME as the hub allows it, and a branch, a tag or a commit behind "@".
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/\w[\w.-]{0,95})(?:@([\w.-][\w./-]{0,199}))?", re.ASCII)
# An address of a repository on a site or in fsspec's form: the kind, the name, what a browser adds, a revision.
ADDRESS = re.compile(
    r"(?:https?://[^/]+/|hf://)(?:(?:datasets|models)/)?([^/@]+/[^/@?#]+?)(?:\.git)?"
    r"(?:@([^/?#]+)|/(?:tree|blob|resolve)/([^/?#]+))?(?:[/?#].*)?"
)
# Folders in which the documentation keeps checkpoints: a name in them is always a path.
LOCAL_FOLDERS = ("checkpoints", "runs")
# What states an architecture and a tokenizer: small files at the top of a repository, and chat templates.
SETTINGS = re.compile(r"[^/]+\.(json|jinja|model|txt)|additional_chat_templates/[^/]+\.jinja")
SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors")
# PyTorch's own form, where there are no safetensors; what LLaVA's training writes beside adapters.
PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin|adapter_model\.bin|mm_projector\.bin|non_lora_trainables\.bin")
# The file that `medcg convert` and `medcg train` write beside their parameters; all files of such a repository count.
MODEL_FILE = "model.json"
# One of these states an architecture, or what adapters belong to. Folder of a workdir of `medcg train`.
STATED, TRAINED = ("config.json", MODEL_FILE, "adapter_config.json"), "params"
# Room that is left on the disk of the cache.
SPARE_BYTES = 1 << 28


def is_repository(name: str) -> bool:
    """Whether `name` is a repository of the hub: it has that form, and a revision or an owner that is no folder here.

    Raises:
      ConfigError: it is an address; the message has the repository's name.
    """
    check_no_address(name)
    owner = name.partition("/")[0]
    if REPOSITORY.fullmatch(name) is None or owner in LOCAL_FOLDERS or Path(name).exists():
        return False
    return "@" in name or not Path(owner).exists()


def check_no_address(name: str) -> None:
    """Raises ConfigError if `name` is an address (https://huggingface.co/OWNER/NAME, hf://OWNER/NAME)."""
    # A path that pathlib has read has one slash.
    scheme = re.match(r"(https?|hf):/", name)
    if scheme is None:
        return
    match = ADDRESS.fullmatch(re.sub(":/+", "://", name, count=1))
    revision = match and (match[2] or match[3])
    repository = f"{match[1]}{f'@{revision}' * (revision not in (None, 'main'))}" if match else ""
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{name} is an address; expected a folder, or a repository of the hub as OWNER/NAME")
    raise ConfigError(f"{name} is an address; give the repository by its name: {repository}")


def split(name: str) -> tuple[str, str | None]:
    """(repository, revision or None) of a repository's name.

    Raises:
      ConfigError: the name without its revision is a local folder.
    """
    repository, _, revision = name.partition("@")
    if Path(repository).exists():
        raise ConfigError(f"{name}: {repository} is a folder here, which has no revisions; give it without @{revision}")
    return repository, revision or None


def pinned(name: str) -> str:
    """The repository with the commit that its revision is now, "OWNER/NAME@COMMIT"; other names as they are.

    Offline it is the commit that was fetched last.

    Raises:
      ConfigError, RunError: as `resolve`.
    """
    if not is_repository(name):
        return name
    repository, revision = split(name)
    with refusals(name):
        from huggingface_hub import HfApi

        return f"{repository}@{HfApi().resolve_revision(repository, revision=revision).resolved}"


def resolve(name: str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a path as it is, or of a workdir of `medcg train` the parameters in it; a repository's
    in the cache, fetched if it is not there whole.

    weights: False: config.json, tokenizer and other small files alone.

    Raises:
      ConfigError: there is no such repository or revision, it is gated or private, it is not in the cache and the hub
        must not be asked, or the disk is full; the message says what to do.
      RunError: the hub does not answer, or the download broke off; the same command may work later.
    """
    if is_repository(name):
        return fetched(name, weights)
    path, trained = Path(name), Path(name) / TRAINED
    is_workdir = (trained / MODEL_FILE).is_file() and not any((path / stated).is_file() for stated in STATED)
    return trained if is_workdir else path


@functools.cache
def fetched(name: str, weights: bool) -> Path:
    """`resolve` of a repository."""
    repository, revision = split(name)
    with refusals(name):
        from huggingface_hub import constants, errors, get_cached_repo_tree, snapshot_download

        # The first call also keeps the list of the repository's files, of which the second chooses.
        commit = pinned(name).partition("@")[2]
        try:
            folder = Path(download(snapshot_download, repository, commit, [*STATED]))
        except errors.LocalEntryNotFoundError:
            if constants.is_offline_mode():
                raise
            return one_by_one(name, repository, commit, weights)
        try:
            sizes = {file.path: file.size for file in get_cached_repo_tree(repository, revision=commit)}
        except errors.CachedRepoTreeNotFoundError:  # offline, and another program has filled the cache
            sizes = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob("*") if path.is_file()}
        chosen = chosen_files(sizes, weights)
        if not {*STATED} & chosen:
            raise no_config(name)
        missing = {path: size for path, size in sizes.items() if path in chosen and not (folder / path).is_file()}
        if missing:
            check_room(name, sum(missing.values()), folder)
            print(
                f"fetching {repository}@{commit[:10]}: {len(missing)} files, {amount(sum(missing.values()))}",
                flush=True,
            )
            download(snapshot_download, repository, commit, sorted(chosen))
    return folder


def one_by_one(name: str, repository: str, commit: str, weights: bool) -> Path:
    """`fetched`, from a mirror of the hub that names a repository's files and does not list them with their sizes."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repository, revision=commit)
    chosen = chosen_files([file.rfilename for file in info.siblings or ()], weights)
    stated = [path for path in STATED if path in chosen]
    if not stated:
        raise no_config(name)
    paths = {path: hf_hub_download(repository, path, revision=commit) for path in sorted(chosen)}
    return Path(paths[stated[0]]).parent


def no_config(name: str) -> ConfigError:
    return ConfigError(f"{name} has no config.json: expected a checkpoint in the layout of transformers")


def download(snapshot_download, repository: str, commit: str, paths: list[str]) -> str:
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    # "[" would open a set of characters.
    patterns = [path.replace("[", "[[]") for path in paths]
    return snapshot_download(repository, revision=commit, allow_patterns=patterns)


def chosen_files(paths: Iterable[str], weights: bool) -> set[str]:
    """The files of a repository that a checkpoint needs.

    Of weights in two forms the safetensors alone; nothing of ONNX, GGUF, Flax or TensorFlow, and no further copies.
    """
    every = set(paths)
    settings = {path for path in every if SETTINGS.fullmatch(path)}
    if not weights:
        return settings
    if MODEL_FILE in every:
        return every
    tensors = {path for path in every if SAFETENSORS.fullmatch(path)}
    return settings | (tensors or {path for path in every if PICKLES.fullmatch(path)})


def check_room(name: str, needed: int, folder: Path) -> None:
    """Raises ConfigError if the disk of `folder` has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise ConfigError(
            f"{name}: {amount(needed)} are to be fetched and {amount(free)} are free in {folder.parents[2]}; make room, or "
            "set HF_HOME to a folder on another disk"
        )


def fetch_data(name: str, folder: Path | None) -> Path:
    """The folder with a data repository of the hub: `folder`, or without one its place in the cache.

    Raises:
      ConfigError: as `resolve`; or `folder` has files of another origin.
      RunError: as `resolve`.
    """
    check_no_address(name)
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name}: expected a data repository of the hub, OWNER/NAME or OWNER/NAME@REVISION")
    if folder and folder.exists() and any(folder.iterdir()) and not (folder / ".cache" / "huggingface").is_dir():
        raise ConfigError(
            f"{folder} has files that were not fetched from the hub; give a new folder, or an earlier fetch's"
        )
    with refusals(name, "datasets/"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(match[1], repo_type="dataset", revision=match[2], local_dir=folder))


@contextmanager
def refusals(name: str, kind: str = "") -> Iterator[None]:
    """Errors of `huggingface_hub` in the block as a ConfigError or RunError of one line.

    kind: of the repository, as in addresses: "datasets/", or "" for a model.
    """
    from huggingface_hub import constants, errors

    repository, _, revision = name.partition("@")
    address = f"{constants.ENDPOINT}/{kind}{repository}"
    try:
        with warned_once(name):
            yield
    except (ConfigError, RunError):
        raise
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{name} is gated: accept its terms at {address}, then `hf auth login` here (or set HF_TOKEN) with a token of "
            "that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name}: there is no such folder here, and none of that name at {constants.ENDPOINT} that your token opens; "
            "check the name, or for a private one `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{name}: {repository} has no revision {revision}; see {address}/tree/main") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{name}: no name of a repository ({one_line(error)})") from error
    except Exception as error:  # of HTTP, of xet, of the disk
        raise unreached(name, error) from error


@contextmanager
def warned_once(name: str) -> Iterator[None]:
    """In the block a warning of `huggingface_hub` is one line of ours, and is told once.

    It has a handler of its own and hands warnings on to the root's too, and warns twice at each new attempt.
    """
    logger, handler = logging.getLogger("huggingface_hub"), WarnsOnce(name)
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before


class WarnsOnce(logging.Handler):
    """Prints "NAME: WARNING" for each new warning. That it tries again goes without the seconds and the count."""

    def __init__(self, name: str):
        super().__init__(logging.WARNING)
        self.repository = name
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        # Each attempt has other seconds and other numbers of bytes.
        kind = re.sub(r"[\d.]+", "", text)
        if text.startswith("Retrying in") or kind in self.printed:
            return
        self.printed.add(kind)
        tries_again = "; trying again" * any(part in text for part in ("thrown while requesting", "Trying to resume"))
        print(f"{self.repository}: {text[:200]}{tries_again}", file=sys.stderr, flush=True)


def unreached(name: str, error: Exception) -> Exception:
    """The ConfigError or RunError for a repository that could not be fetched whole."""
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ConfigError(
            f"{name}: the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HOME to a folder on another disk"
        )
    if isinstance(error, PermissionError):
        return ConfigError(f"{name}: {one_line(error)}; set HF_HOME to a folder that can be written")
    if constants.is_offline_mode():
        return ConfigError(
            f"{name} is not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it once to "
            "fetch it, or give a folder"
        )
    responses = [getattr(each, "response", None) for each in (error, error.__cause__)]
    status = next((response.status_code for response in responses if response is not None), None)
    if status in (401, 403):
        return ConfigError(
            f"{name}: {constants.ENDPOINT} refuses the token that it was given (status {status}); `hf auth login` with one "
            "that may read this repository, or unset HF_TOKEN"
        )
    return RunError(
        f"{name} could not be fetched whole from {constants.ENDPOINT} ({one_line(error)}); the same command goes on where "
        "it broke off; or give a folder"
    )


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def amount(num_bytes: float) -> str:
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= size), ("kB", 1e3))
    return f"{num_bytes / size:.1f} {unit}"
