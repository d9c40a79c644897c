"""`meta.json` beside parameters: what made them. Nothing here imports JAX."""

from pathlib import Path
from typing import Any

from medcg_jax.untrusted import FileError, read_json

META_FILE = "meta.json"
# Of a grid's workdir: the folder of trained weights that it keeps (`study.keep_weights`), and its configuration.
KEPT, GRID_CONFIG = "weights", "config.json"
MAX_META_BYTES = 2**24


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
