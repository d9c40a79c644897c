"""`meta.json` beside parameters: what made them. Nothing here imports JAX."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from medcg_jax.config import ConfigError, RunConfig, flat, free_fields
from medcg_jax.untrusted import FileError, read_json

META_FILE = "meta.json"
# Of a grid's workdir: the folder of trained weights that it keeps (`study.keep_weights`), and its configuration.
KEPT, GRID_CONFIG = "weights", "config.json"
MAX_META_BYTES = 2**24
# Sections that a resumed run must share with its checkpoints, except for their free fields.
SECTIONS = ("model", "data", "train")


class CheckpointError(ConfigError):
    """There are checkpoints, and none can be read; the message is one line for the user."""


def read_meta(directory: Path) -> dict | None:
    """The `meta` that `train.checkpoint.save_params` wrote; None if there is none, or it cannot be read."""
    try:
        return read_json(Path(directory) / META_FILE, max_bytes=MAX_META_BYTES)
    except FileError:
        return None


def recipe_of(directory: Path) -> dict[str, dict]:
    """What a copy of the parameters in `directory` keeps of their `meta`, wherever it lies; {}: nothing is recorded."""
    recipe = {"made_of": (read_meta(directory) or {}).get("made_of"), "config": training_config(directory)}
    return {name: value for name, value in recipe.items() if isinstance(value, dict) and value}


def grid_cell(directory: Path) -> str:
    """The cell of the grid whose kept weights `directory` holds; "": it holds none."""
    cell = (read_meta(directory) or {}).get("cell")
    return cell if isinstance(cell, str) and directory.absolute().parent.name == KEPT else ""


def training_config(directory: Path) -> dict[str, Any]:
    """The sections of the configuration that the parameters in `directory` were trained with, {"model": {...}, ...}, of
    `medcg train` or of a grid's kept weights; {} where none is recorded.

    Raises:
      FileError: the grid's config.json is damaged.
    """
    config = (read_meta(directory) or {}).get("config")
    if grid_cell(directory):
        file = directory.absolute().parents[1] / GRID_CONFIG
        config = read_json(file, max_bytes=MAX_META_BYTES).get("config") if file.is_file() else None
    if not isinstance(config, dict):
        return {}
    return {name: section for name, section in config.items() if isinstance(section, dict)}


def identity(run: RunConfig) -> dict:
    """The configuration that a run shares with its checkpoints, as JSON values."""
    sections, free = {name: dataclasses.asdict(getattr(run, name)) for name in SECTIONS}, free_fields()
    fixed = {name: {k: v for k, v in fields.items() if f"{name}.{k}" not in free} for name, fields in sections.items()}
    return json.loads(json.dumps(fixed))


def check_same_run(theirs: dict, ours: dict, checkpoints: Path) -> None:
    """Raises CheckpointError if the checkpoints in a folder are of a run with another configuration.

    theirs, ours: as `identity`, of the checkpoints and of the run.
    """
    theirs, ours = flat(theirs), flat(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        # A value that is off (0, "", False) equals a missing one: fields come and go between versions.
        if (theirs.get(name) or None) != (ours.get(name) or None):
            raise CheckpointError(
                f"{checkpoints} is another run's: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here; give "
                f"another --workdir (with --config.model.checkpoint={checkpoints.parent / 'params'} it starts where this "
                "run ended)"
            )


def newest_config(checkpoints: Path) -> dict:
    """The sections of the configuration in the newest of a run's checkpoints; {} without one that can be read."""
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]
    config = (read_meta(checkpoints / str(max(steps))) or {}).get("config") if steps else None
    return {name: config[name] for name in SECTIONS if name in config} if isinstance(config, dict) else {}
