"""What a checkpoint's folder is, by its small files alone: quick, and without JAX."""

from pathlib import Path
from typing import Any

from medcg_jax.config import AUTO, MODELS, ConfigError, ModelConfig
from medcg_jax.families import registry
from medcg_jax.families.weights.hub import resolve
from medcg_jax.untrusted import FileError, read_json

# Model -> the repository of its released checkpoint.
RELEASED = {name: repo for family in registry.families() for name, repo in family.released.items() if repo}
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


def check_weights(model: ModelConfig) -> None:
    """Raises ConfigError if the weights that a run of this model starts from are missing; the message says where to get them."""
    path = model.checkpoint
    if path and not resolve(path, weights=False).is_dir():
        hint = ""
        if model.name in RELEASED:
            repo = RELEASED[model.name]
            hint = (
                f"; fetch {repo} from the Hugging Face hub (--config.model.checkpoint={repo} does), or convert a "
                "checkpoint with `medcg convert`"
            )
        raise ConfigError(f"model.checkpoint={path}: there are no weights{hint}")
    if not path and model.name in RELEASED:
        raise ConfigError(
            f"model.checkpoint is empty, and {model.name} is not trained from nothing: give the directory "
            f"of {RELEASED[model.name]}, as released or converted, or this name"
        )


def check_is_released(directory: Path) -> None:
    """Raises ConfigError if a checkpoint is in this project's own form, which PyTorch cannot read for a comparison."""
    if (directory / "model.json").is_file():
        raise ConfigError(
            f"{directory} is in this project's own form, which PyTorch does not read: give --against=DIR, the released "
            "directory that it was made from, or --inputs=FILE.npz"
        )
