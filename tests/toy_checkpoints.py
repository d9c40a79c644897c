"""Checkpoints of the toy weights of `family_toys`, with their tokenizers, as the verbs write them."""

from collections.abc import Callable
from pathlib import Path

import family_toys
import jax
import jax.numpy as jnp
import numpy as np

from medcg_jax.families.weights import convert
from medcg_jax.train.checkpoint import save_params

# What a checkpoint of `medcg train` on phantoms says about its data.
META = {"config": {"data": {"source": "phantom", "system_prompt": ""}}}


def trained(folder: Path, family: str, change: Callable = lambda params: params) -> Path:
    """As `medcg train` writes one; returns `folder`. change: applied to the weights."""
    toy, params = family_toys.setup(family), change(family_toys.weights(family))
    save_params(folder, jax.tree.map(jnp.asarray, params), toy.model, META, beside=(toy.tokenizer.path,))
    return folder


def with_more_boxes(params):
    """NExT-Chat's weights with `<at>` ten times as long in the head as others, so that most answers have boxes."""
    config = family_toys.setup("next_chat").model
    changed = jax.tree.map(np.copy, params)
    changed["decoder"]["head"]["kernel"][:, config.at_token_id] *= 5
    return changed


def converted(folder: Path, family: str) -> Path:
    """As `medcg convert` writes one; returns `folder`."""
    toy = family_toys.setup(family)
    convert.save_params(folder, jax.tree.map(jnp.asarray, family_toys.weights(family)), toy.model)
    (folder / "tokenizer.json").write_bytes(toy.tokenizer.path.read_bytes())
    return folder
