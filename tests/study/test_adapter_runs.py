"""Adapters and bases in a run's configuration: what is refused, and that a grid's base does not depend on them."""

import dataclasses

import pytest

from medcg_jax.config import ConfigError, ModelConfig, RunConfig, parts_of, replace
from medcg_jax.config_checks import check
from medcg_jax.study.design.schedule import seeded
from medcg_jax.study.run.bases import base_model, base_path, made_of

ADAPTED = replace(RunConfig(), model__lora_rank=4, model__trainable=("projector", "lora"), base__steps=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(model__base_dtype="int4"), "model.base_dtype='int4': one of float32, bfloat16, int8, nf4 is accepted"),
        (dict(model__lora_rank=-1), "model.lora_rank=-1: a finite number of at least 0"),
        (dict(model__lora_targets=("q", "head")), "model.lora_targets='head': one of q, k, v, out, gate, up, down"),
        (dict(model__lora_targets=()), "one or more of q, k, v, out, gate, up, down are accepted"),
        (dict(model__lora_targets=("q", "q")), "once each"),
        (dict(model__trainable=("projector",)), 'adapters are trained by "lora" there; 0 is accepted without it'),
        (dict(model__trainable=("decoder", "lora")), '"decoder" or "lora" is accepted'),
        (dict(model__lora_rank=0), "model.trainable='lora': one of vision, projector, decoder is accepted"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(changes, says):
    check(ADAPTED)
    with pytest.raises(ConfigError) as caught:
        check(replace(ADAPTED, **changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_is_the_same_whatever_is_trained_from_it(tmp_path):
    plain = replace(RunConfig(), base__steps=3)
    other = replace(ADAPTED, model__base_dtype="nf4")
    assert made_of(seeded(other, 0)) == made_of(seeded(plain, 0))
    # As before there were adapters.
    assert not {"lora_rank", "lora_alpha", "lora_targets", "base_dtype"} & set(made_of(plain)["model"])
    assert base_path(other, tmp_path / "a", 0) == base_path(plain, tmp_path / "b", 0)
    assert base_model(other.model) == dataclasses.replace(plain.model, trainable=("projector", "lora"))
    # MiniGPT-v2's adapters are in its base.
    own = replace(other, model__name="minigpt_v2_tiny")
    assert made_of(own)["model"]["lora_rank"] == 4 and base_model(own.model).base_dtype == "float32"
    assert base_path(replace(RunConfig(), base__steps=0), tmp_path / "b", 0) is None


def test_adapters_are_a_part_of_every_family_that_has_them():
    names = ("projector", "decoder", "lora")
    assert parts_of("llava", names) == ("projector", "decoder")
    assert parts_of("llava", names, lora_rank=8) == parts_of("minigpt_v2", names) == names
    assert ModelConfig().lora_rank == 0
