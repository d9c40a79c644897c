"""Questions asked again beside the same images: the answers of asking one by one, from images that are read once."""

import dataclasses
import functools

import family_toys
import jax
import numpy as np
import pytest
from family_toys import SOURCE, TINY

from medcg_jax.config import CONTROLS, ConfigError
from medcg_jax.data.controls import control_sets
from medcg_jax.data.records import concat
from medcg_jax.eval.again import evaluate_again, make_asker
from medcg_jax.eval.run import NonFiniteScores, evaluate, make_evaluator
from medcg_jax.families import build

NEW, BATCH = 3, 4
NO_END = -1


@functools.cache
def asked(family: str):
    """(questions of two and of four options, the same asked again)."""
    found = family_toys.setup(family)
    sets = [SOURCE.records(name, "test") for name in ("ct-liver-state", "photo-eye-grade")]
    records = concat([sets[0].select(range(3)), sets[1].select(range(2))])
    again = control_sets(records, CONTROLS, 0)
    return found.encode_eval(records), {
        name: found.encode_eval(made, memory_limit_bytes=0) for name, made in again.items()
    }


# Those whose free answers are asked for too: each is two programs more.
FREE = ("llava", "next_chat")


def program(make, family: str, mesh: str | None = None):
    found = family_toys.setup(family, mesh)
    graphdef, places = build.abstract(found.model)[0], build.shardings(found.model, found.mesh)
    return make(found.mesh, graphdef, places, eos_id=NO_END, max_new_tokens=NEW, generate=family in FREE)


def ask(asker, family: str, *, mesh: str | None = None, again=None, batch_size: int = BATCH, params=None):
    found = family_toys.setup(family)
    encoded, own = asked(family)
    return evaluate_again(
        asker, family_toys.placed(family, mesh) if params is None else params, encoded, own if again is None else again,
        found.tokenizer, batch_size=batch_size, image_token_id=found.model.image_token_id,
    )  # fmt: skip


def scores(predictions):
    return np.concatenate([p.logprobs for p in predictions])


def check_alike(found, expected, *, generated: bool) -> None:
    assert [(p.id, p.options, p.answer, p.predicted) for p in found] == [
        (p.id, p.options, p.answer, p.predicted) for p in expected
    ]
    assert np.abs(scores(found) - scores(expected)).max() < 2e-4
    assert [p.generated for p in found] == [p.generated if generated else None for p in expected]


@pytest.mark.parametrize("family", TINY)
def test_answers_are_those_of_asking_one_by_one(family):
    found, (encoded, again) = family_toys.setup(family), asked(family)
    params, evaluator = family_toys.placed(family, None), program(make_evaluator, family)
    asker, started, read = program(make_asker, family), [], []

    def start(params, before):
        started.append(len(before["tokens"]))
        return asker.start(params, before)

    def counted(run):
        return lambda params, cache, batch: read.append(batch["tokens"].size) or run(params, cache, batch)

    counting = dataclasses.replace(asker, start=start, ask=counted(asker.ask), ask_freely=counted(asker.ask_freely))
    plain, controls = ask(counting, family)
    check_alike(plain, evaluate(evaluator, params, encoded, found.tokenizer, batch_size=BATCH), generated=True)
    assert set(controls) == {"shuffled_images", "shift_1", "shift_2", "shift_3", "two_options"} == set(again)
    for name, predictions in controls.items():
        expected = evaluate(evaluator, params, again[name], found.tokenizer, batch_size=BATCH)
        check_alike(predictions, expected, generated=False)
    # Five images in two batches, for 21 questions, whose first tokens are read with the images.
    assert started == [BATCH, BATCH] and sum(map(len, [plain, *controls.values()])) == 21
    assert len(read) == 6 + 3 and sum(read) < 21 * 2 * encoded.arrays["tokens"].shape[1]
    # Planted: a control believed to be about other images than it is.
    made = again["shift_1"]
    records = made.records.select(range(len(made)))
    records.places = made.records.places[1:] + made.records.places[:1]
    _, wrong = ask(asker, family, again={"shift_1": dataclasses.replace(made, records=records)})
    assert np.abs(scores(wrong["shift_1"]) - scores(controls["shift_1"])).max() > 1e-2


def test_the_mesh_and_the_batch_change_nothing():
    alone, mesh = ask(program(make_asker, "llava"), "llava"), "data, fsdp, tensor"
    found = ask(program(make_asker, "llava", mesh), "llava", mesh=mesh, batch_size=8)
    for a, b in zip([found[0], *found[1].values()], [alone[0], *alone[1].values()], strict=True):
        check_alike(a, b, generated=True)


def test_what_is_no_use_is_told():
    asker = program(make_asker, "llava")
    broken = jax.tree.map(lambda w: w * np.nan, family_toys.placed("llava", None))
    with pytest.raises(NonFiniteScores, match="record .*/test/"):
        ask(asker, "llava", params=broken)
    mesh = "data, fsdp, tensor"
    with pytest.raises(ConfigError, match="eval.batch_size=6"):
        ask(program(make_asker, "llava", mesh), "llava", mesh=mesh, batch_size=6)
