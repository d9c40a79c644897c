"""Questions asked again beside the same images: the answers of asking one by one, from images that are read once."""

import dataclasses
import functools

import family_toys
import jax
import numpy as np
import pytest
from eval_toys import others_long
from family_toys import SOURCE, SUBSETS, TINY
from record_sets import with_four_options

from medcg_jax.config import CONTROLS, ConfigError, RunConfig, replace
from medcg_jax.data.controls import BLANK, control_sets
from medcg_jax.data.records import RecordSet, concat
from medcg_jax.eval import subsets
from medcg_jax.eval.letters import evaluate, evaluate_controls, make_evaluator, make_prefix_evaluator
from medcg_jax.eval.predictions import NonFiniteScores, Prediction
from medcg_jax.families import build
from medcg_jax.train.setup import open_setup

NEW, BATCH = 3, 4
# Controls beside the images of the test.
SHARED = ("shuffled_images", "circular", "two_options")
NO_END = -1


@functools.cache
def asked(family: str):
    """(questions of two and of four options, the same asked again)."""
    found = family_toys.setup(family)
    sets = [SOURCE.records(name, "test") for name in SUBSETS]
    records = concat([sets[0].select(range(3)), sets[1].select(range(2))])
    again = control_sets(records, SHARED, 0)
    return found.encode_eval(records), {
        name: found.encode_eval(made, memory_limit_bytes=0) for name, made in again.items()
    }


# Those whose free answers are asked for too: each is two programs more.
FREE = ("llava", "next_chat")


def program(make, family: str, mesh: str | None = None):
    found = family_toys.setup(family, mesh)
    graphdef, places = build.abstract(found.model)[0], build.shardings(found.model, found.mesh)
    return make(found.mesh, graphdef, places, eos_id=NO_END, max_new_tokens=NEW, generate=family in FREE)


def ask(prefixed, family: str, *, mesh: str | None = None, again=None, batch_size: int = BATCH, params=None):
    found = family_toys.setup(family)
    encoded, own = asked(family)
    return evaluate_controls(
        prefixed,
        family_toys.placed(family, mesh) if params is None else params,
        encoded,
        own if again is None else again,
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


@pytest.mark.parametrize("family", others_long(TINY))
def test_answers_are_those_of_asking_one_by_one(family):
    found, (encoded, again) = family_toys.setup(family), asked(family)
    params, evaluator = family_toys.placed(family, None), program(make_evaluator, family)
    prefixed, started, read = program(make_prefix_evaluator, family), [], []

    def prefill(params, before):
        started.append(len(before["tokens"]))
        return prefixed.prefill(params, before)

    def counted(run):
        return lambda params, cache, batch: read.append(batch["tokens"].size) or run(params, cache, batch)

    counting = dataclasses.replace(
        prefixed,
        prefill=prefill,
        score=counted(prefixed.score),
        score_and_generate=counted(prefixed.score_and_generate),
    )
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
    _, wrong = ask(prefixed, family, again={"shift_1": dataclasses.replace(made, records=records)})
    assert np.abs(scores(wrong["shift_1"]) - scores(controls["shift_1"])).max() > 1e-2


@pytest.mark.long
def test_the_mesh_and_the_batch_change_nothing():
    alone, mesh = ask(program(make_prefix_evaluator, "llava"), "llava"), "data, fsdp, tensor"
    found = ask(program(make_prefix_evaluator, "llava", mesh), "llava", mesh=mesh, batch_size=8)
    for a, b in zip([found[0], *found[1].values()], [alone[0], *alone[1].values()], strict=True):
        check_alike(a, b, generated=True)


def test_what_is_no_use_is_told():
    prefixed = program(make_prefix_evaluator, "llava")
    broken = jax.tree.map(lambda w: w * np.nan, family_toys.placed("llava", None))
    with pytest.raises(NonFiniteScores, match="record .*/test/"):
        ask(prefixed, "llava", params=broken)
    mesh = "data, fsdp, tensor"
    with pytest.raises(ConfigError, match="eval.batch_size=6"):
        ask(program(make_prefix_evaluator, "llava", mesh), "llava", mesh=mesh, batch_size=6)


# ------------------------------------------------------------------ without the images of the test


@pytest.mark.parametrize("family", others_long(TINY))
def test_blank_and_no_images_show_nothing_of_the_test(family):
    found = family_toys.setup(family)
    found = dataclasses.replace(found, run=replace(found.run, eval__batch_size=BATCH, eval__generate=False))
    records = SOURCE.records("ct-liver-state", "test").select(range(3))
    graphdef, params = build.abstract(found.model)[0], family_toys.placed(family, None)
    tester = subsets.Tester(found, graphdef, sees=True)

    def answers(records):
        again = {name: found.encode_eval(made) for name, made in control_sets(records, WITHOUT, 0).items()}
        return tester.with_controls(params, found.encode_eval(records), again)

    plain, controls = answers(records)
    grey = RecordSet(records.records, [BLANK] * 3)
    np.testing.assert_array_equal(scores(controls["blank_images"]), scores(tester(params, found.encode_eval(grey))))
    turned = RecordSet(records.records, [records.image(i)[::-1, ::-1] for i in range(3)])
    plain_of_turned, controls_of_turned = answers(turned)
    assert np.abs(scores(plain) - scores(plain_of_turned)).max() > 1e-4
    for name in WITHOUT:
        assert [p.id for p in controls[name]] == [r.id for r in records.records]
        np.testing.assert_array_equal(scores(controls[name]), scores(controls_of_turned[name]))
    assert np.abs(scores(controls["blank_images"]) - scores(controls["text_only"])).max() > 1e-4


WITHOUT = ("blank_images", "text_only")
RUN = replace(RunConfig(), data__max_text_tokens=96, data__train_records_per_subset=4, data__test_records_per_subset=6)


class Recorder(subsets.Tester):
    """Answers nothing, and keeps what it was asked."""

    def __init__(self, setup):
        super().__init__(setup, None)
        self.asked = []

    def __call__(self, params, encoded):
        self.asked.append(encoded)
        return [Prediction(r.id, r.subset, r.options, r.answer, "A", (0.0,), "A") for r in encoded.records.records]


def test_only_moved_options_are_asked_by_another_program(monkeypatch):
    setup = open_setup(replace(RUN, eval__controls=CONTROLS))
    records = with_four_options(setup.source.records("oct-skin-grade", "test"))
    again = {name: setup.encode_eval(made) for name, made in control_sets(records, CONTROLS, 0).items()}
    together = []

    def ask_together(evaluator, params, encoded, controls, tokenizer, **options):
        together.extend(controls)
        return [], {name: [] for name in controls}

    monkeypatch.setattr(subsets.letters, "evaluate_controls", ask_together)
    monkeypatch.setattr(subsets.Tester, "_prefix_evaluator", None)
    tester = Recorder(setup)
    tester._sees = True
    _, answers = tester.with_controls(None, setup.encode_eval(records), again)
    assert list(answers) == list(again) and together == [*again][:-2] and [*again][-2:] == list(WITHOUT)
    assert tester.asked == [again[name] for name in WITHOUT]


def test_the_plain_test_is_asked_as_without_a_control_and_then_beside_other_images(monkeypatch):
    setup = open_setup(RUN)
    records = with_four_options(setup.source.records("oct-skin-grade", "test"))
    plain = setup.encode_eval(records)
    again = {
        name: setup.encode_eval(made, memory_limit_bytes=0)
        for name, made in control_sets(records, RUN.eval.controls, 0).items()
    }
    assert list(again) == ["shuffled_images"]
    tester = Recorder(setup)
    answers, others = tester.with_controls(None, plain, again)
    assert tester.asked[0] is plain and [one.generated for one in answers] == ["A"] * 6
    assert [(one.id, one.generated) for one in others["shuffled_images"]] == [(r.id, None) for r in records.records]

    # Row by row what decoding each image anew gives, and nothing is decoded.
    rows = np.array([4, 1, 1, 5])
    wanted, ids = again["shuffled_images"].rows(rows)
    monkeypatch.setattr("medcg_jax.data.encoding._decode", lambda *of: 1 / 0)
    found, same_ids = tester.asked[1].rows(rows)
    assert ids == same_ids and found.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key])
    assert not np.array_equal(found["pixels"], plain.rows(rows)[0]["pixels"])
    far = dataclasses.replace(plain, images=None)
    assert subsets.with_images_of(again["shuffled_images"], far) is again["shuffled_images"]
