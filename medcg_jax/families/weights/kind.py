"""The family of a checkpoint by its config.json or model.json alone: quick, and without JAX."""

from pathlib import Path
from typing import Any

from medcg_jax.config import AUTO, MODELS, ConfigError
from medcg_jax.families import registry
from medcg_jax.untrusted import FileError, read_json

# As `files.MAX_JSON_BYTES`.
MAX_JSON_BYTES = 2**23


def family_in(directory: str | Path) -> str:
    """The name of the family that a checkpoint's directory states; "" where it states none that is known."""
    for name, key in (("model.json", "family"), ("config.json", "model_type")):
        try:
            stated: Any = read_json(Path(directory) / name, max_bytes=MAX_JSON_BYTES)
        except FileError:
            continue
        value = stated.get(key) if isinstance(stated, dict) else None
        if name == "model.json":
            return value if value in registry.FAMILIES else ""
        return next((family.name for family in registry.families() if value in family.model_types), "")
    return ""


def check_family(directory: str | Path, model: str, stated: str = "") -> None:
    """Raises ConfigError if the checkpoint in a folder is of another family than `model`, a size or a family.

    stated: the family of the checkpoint; "": the one that its files state, if they do.
    """
    stated, wanted = stated or family_in(directory), MODELS.get(model, "")
    if stated and wanted and stated != wanted:
        raise ConfigError(
            f"model.checkpoint={directory} is a {stated} checkpoint, and model.name={model} is of {wanted}; expected a "
            f"{wanted} checkpoint, or a config of {stated} (model.name={AUTO} takes the checkpoint's)"
        )


def check_is_released(directory: Path) -> None:
    """Raises ConfigError if a checkpoint is in this project's own form, which PyTorch cannot read for a comparison."""
    if (directory / "model.json").is_file():
        raise ConfigError(
            f"{directory} is in this project's own form, which PyTorch does not read: give --against=DIR, the released "
            "directory that it was made from, or --inputs=FILE.npz"
        )
