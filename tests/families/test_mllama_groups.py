"""Llama-3.2-Vision's cross-attention at places that form no equal groups, against transformers."""

import dataclasses

import hf_tiny_mllama as tiny
import jax
import numpy as np
import pytest
from flax import nnx

from medcg_jax.families import build
from medcg_jax.families.mllama.model import llama32_vision_tiny
from medcg_jax.families.mllama.text import MllamaTextConfig

TOLERANCE = 1e-4
run = jax.jit(lambda model, given: model(**given))
encode = jax.jit(lambda model, images: model.encode_images(images))


@jax.jit
def step(model, tokens, features, segment_ids, cache):
    hidden, cache = model.hidden(tokens, segment_ids=segment_ids, image_features=features, cache=cache)
    return model.logits(hidden), cache


def worst(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_groups_that_are_not_equal(remat):
    """Cross-attention first, twice in a row, and with unequal runs between: in one call, and into a cache."""
    pytest.importorskip("torch")
    other = tiny.reference(4, num_hidden_layers=6, cross_attention_layers=[0, 1, 4])
    config, graphdef, params = tiny.port(
        other, change=lambda config: dataclasses.replace(tiny.metas_inputs(config), remat=remat)
    )
    assert config.text.group_size == 0
    inputs, model = tiny.inputs(), nnx.merge(graphdef, params)
    given, real = tiny.port_inputs(inputs), inputs["attention_mask"] != 0
    theirs = tiny.reference_stages(other, inputs)["logits"]
    assert worst(np.asarray(run(model, given))[real], theirs[real]) < TOLERANCE
    tokens, segments, part = given["tokens"], given["segment_ids"], 9
    features = encode(model, given["images"])
    found, cache = step(model, tokens[:, :part], features, segments[:, :part], model.init_cache(*tokens.shape))
    rest, _ = step(model, tokens[:, part:], None, segments[:, part:], cache)
    assert worst(np.concatenate([found, rest], axis=1)[real], theirs[real]) < TOLERANCE
    # Planted: one layer at another place.
    wrong = dataclasses.replace(config, text=dataclasses.replace(config.text, cross_layers=(0, 2, 4)))
    assert (
        worst(np.asarray(run(nnx.merge(build.abstract(wrong)[0], params), given))[real], theirs[real]) > 10 * TOLERANCE
    )


def test_which_layers_may_attend_to_images():
    assert MllamaTextConfig().self_layers[:9] == (0, 1, 2, 4, 5, 6, 7, 9, 10)
    assert llama32_vision_tiny(20, 19).text.group_size == 2
    assert MllamaTextConfig(num_layers=5, cross_layers=(1, 3)).group_size == 0
    for cross in ((), (3, 40), (8, 3), tuple(range(40))):
        with pytest.raises(ValueError, match="rising layers from 0"):
            MllamaTextConfig(cross_layers=cross)
