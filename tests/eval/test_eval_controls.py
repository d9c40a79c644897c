"""Questions asked again beside the same images: the answers of asking one by one, from rows that are read once."""

import dataclasses
import functools

import family_toys
import jax
import numpy as np
import pytest
from eval_toys import others_long
from family_toys import SOURCE, SUBSETS, TINY
from record_sets import with_four_options

from medcg_jax.config import CONTROLS, ConfigError, Interrupted, RunConfig, replace
from medcg_jax.data.controls import BLANK, control_sets
from medcg_jax.data.records import RecordSet, concat
from medcg_jax.eval import letters, subsets
from medcg_jax.eval.letters import evaluate, make_evaluator
from medcg_jax.eval.predictions import NonFiniteScores
from medcg_jax.eval.subsets import SubsetTest, one_ahead
from medcg_jax.families import build
from medcg_jax.train.setup import open_setup

NEW, BATCH = 3, 4
# Controls beside the images of the test, and those beside none of them.
SHARED = ("shuffled_images", "circular", "two_options")
WITHOUT = ("blank_images", "text_only")
# Families whose free answers are asked for too: each is a program more.
FREE = ("llava", "next_chat")


@functools.cache
def asked(family: str):
    """(questions of two and of four options, the same asked again)."""
    opened = family_toys.setup(family)
    sets = [SOURCE.records(name, "test") for name in SUBSETS]
    records = concat([sets[0].select(range(3)), sets[1].select(range(2))])
    again = control_sets(records, SHARED, 0)
    return opened.encode_eval(records), {
        name: opened.encode_eval(of_control, memory_limit_bytes=0) for name, of_control in again.items()
    }


def made_tester(family: str, mesh: str | None = None, *, batch_size: int = BATCH) -> subsets.Tester:
    opened = family_toys.setup(family, mesh)
    options = dict(eval__batch_size=batch_size, eval__max_new_tokens=NEW, eval__generate=family in FREE)
    opened = dataclasses.replace(opened, run=replace(opened.run, **options))
    return subsets.Tester(opened, build.abstract(opened.model)[0], sees=True)


def one_by_one(family: str, encoded, *, generate: bool):
    """The answers of the program that reads every row and its images whole."""
    opened = family_toys.setup(family)
    graphdef, places = build.abstract(opened.model)[0], build.shardings(opened.model, opened.mesh)
    options = dict(eos_id=opened.tokenizer.eos_id, max_new_tokens=NEW, generate=generate)
    program = make_evaluator(opened.mesh, graphdef, places, **options)
    return evaluate(program, family_toys.placed(family, None), encoded, opened.tokenizer, batch_size=BATCH)


def ask(test: subsets.Tester, family: str, *, mesh: str | None = None, again=None, params=None):
    encoded, controls = asked(family)
    params = family_toys.placed(family, mesh) if params is None else params
    [answers] = test.run(params, [SubsetTest(encoded, controls if again is None else again)])
    return answers


def scores(predictions):
    return np.concatenate([p.logprobs for p in predictions])


def check_alike(answers, expected, *, generated: bool) -> None:
    assert [(p.id, p.options, p.answer, p.predicted) for p in answers] == [
        (p.id, p.options, p.answer, p.predicted) for p in expected
    ]
    assert np.abs(scores(answers) - scores(expected)).max() < 2e-4
    assert [p.generated for p in answers] == [p.generated if generated else None for p in expected]


@pytest.mark.parametrize("family", others_long(TINY))
def test_answers_are_those_of_asking_one_by_one(family):
    (encoded, again), test, free = asked(family), made_tester(family), family in FREE
    program, firsts, further = test._followed_evaluator, [], []

    def first(params, batch):
        firsts.append(batch["tokens"].size)
        return program.first(params, batch)

    def more(params, cache, batch, questions):
        further.append(questions["tokens"].size)
        return program.again(params, cache, batch, questions)

    test._followed_evaluator = dataclasses.replace(program, first=first, again=more)
    plain, controls = ask(test, family)
    check_alike(plain, one_by_one(family, encoded, generate=free), generated=free)
    assert set(controls) == {"shuffled_images", "shift_1", "shift_2", "shift_3", "two_options"} == set(again)
    for name, predictions in controls.items():
        check_alike(predictions, one_by_one(family, again[name], generate=False), generated=False)
    # Five rows in two batches; of 16 further questions at most five to a row, and of these only what differs.
    assert len(firsts) == 2 and sum(map(len, controls.values())) == 16
    assert len(further) <= 10 and max(further) < min(firsts)
    # Planted: a control believed to be about other images than it is.
    shifted = again["shift_1"]
    records = shifted.records.select(range(len(shifted)))
    records.places = shifted.records.places[1:] + shifted.records.places[:1]
    _, wrong = ask(test, family, again={"shift_1": dataclasses.replace(shifted, records=records)})
    assert np.abs(scores(wrong["shift_1"]) - scores(controls["shift_1"])).max() > 1e-2


@pytest.mark.parametrize("family", others_long(FREE))
def test_no_control_changes_a_byte_of_the_test_itself(family):
    plain, _ = ask(made_tester(family), family, again={})
    assert ask(made_tester(family), family)[0] == plain


@pytest.mark.long
def test_the_mesh_and_the_batch_change_nothing():
    alone, mesh = ask(made_tester("llava"), "llava"), "data, fsdp, tensor"
    on_mesh = ask(made_tester("llava", mesh, batch_size=8), "llava", mesh=mesh)
    for a, b in zip([on_mesh[0], *on_mesh[1].values()], [alone[0], *alone[1].values()], strict=True):
        check_alike(a, b, generated=True)


def test_what_is_no_use_is_told():
    broken = jax.tree.map(lambda w: w * np.nan, family_toys.placed("llava", None))
    with pytest.raises(NonFiniteScores, match="record .*/test/"):
        ask(made_tester("llava"), "llava", params=broken)
    mesh = "data, fsdp, tensor"
    with pytest.raises(ConfigError, match="eval.batch_size=6"):
        ask(made_tester("llava", mesh, batch_size=6), "llava", mesh=mesh)


# ------------------------------------------------------------------ one queue


def test_the_devices_have_the_next_test_before_the_last_one_is_read(monkeypatch):
    """And what they have answered is not lost when the process is told to stop."""
    events, test = [], made_tester("llava")
    monkeypatch.setattr(subsets.Tester, "_ask", lambda self, queue, params, item: recorded(item))

    def recorded(item):
        events.append(f"ask {item.name}")
        if item.name == "c":
            raise Interrupted("told to stop")
        return lambda: events.append(f"read {item.name}") or ([item.name], {})

    results = test.run(None, (SubsetTest(None, name=name) for name in "abcd"))
    answered = [next(results)[0], next(results)[0]]
    assert answered == [["a"], ["b"]] and events == ["ask a", "ask b", "read a", "ask c", "read b"]
    with pytest.raises(Interrupted):
        next(results)
    # The same where a later test cannot be encoded.
    results = test.run(None, (SubsetTest(None, name="ab"[1 // (1 - i)]) for i in range(2)))
    assert next(results) == (["b"], {})
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_the_next_item_is_made_while_one_is_used():
    drawn = []
    items = one_ahead(drawn.append(i) or i for i in range(3))
    assert next(items) == 0
    while drawn != [0, 1]:  # in another thread
        pass
    assert list(items) == [1, 2] and drawn == [0, 1, 2]
    failing = one_ahead(1 // i for i in (1, 0))
    assert next(failing) == 1
    with pytest.raises(ZeroDivisionError):
        next(failing)


def test_outputs_wait_on_the_devices_and_no_more_than_a_few(monkeypatch):
    monkeypatch.setattr(letters, "stop_if_told", lambda: None)
    fetched = []
    monkeypatch.setattr(letters.jax, "device_get", lambda output: fetched.append(output) or output)
    queue = letters.Queue()
    numbers = [queue.add(f"output {i}") for i in range(letters.MAX_AHEAD + 2)]
    assert fetched == ["output 0", "output 1"]
    queue.wait_for(numbers[3])
    queue.wait_for(numbers[0])
    assert fetched == ["output 0", "output 1", "output 3"]
    assert queue.take(numbers[:4]) == [f"output {i}" for i in range(4)] and len(fetched) == 4
    assert queue.add("later") == numbers[-1] + 1 and queue._outputs.keys() == {4, 5, 6}


def test_no_more_than_a_few_batches_have_their_caches_on_the_devices(monkeypatch):
    monkeypatch.setattr(letters, "stop_if_told", lambda: None)
    monkeypatch.setattr(letters, "MAX_AHEAD", 100)
    events, fetch = [], lambda output: events.append(f"there {output}") or output
    monkeypatch.setattr(letters.jax, "device_get", fetch)
    monkeypatch.setattr(subsets, "further_questions", lambda *_, **__: iter([("a", "b")] * 4))
    monkeypatch.setattr(subsets.Tester, "_batches", lambda *_: iter([(i, None) for i in range(4)]))
    test = made_tester("llava")

    def evaluate(params, batch, features, asked):
        for output in (f"{batch}", *(f"{batch}{question}" for question in asked)):
            events.append(f"ask {output}")
            yield output

    test._followed_evaluator = evaluate
    encoded, again = asked("llava")
    numbers, questions, further = test._ask_followed(letters.Queue(), None, SubsetTest(encoded), again)
    assert (numbers, questions, further) == ([0, 3, 6, 9], ["a", "b"] * 4, [1, 2, 4, 5, 7, 8, 10, 11])
    # The last answer of a batch is there before the next but one starts.
    for batch in (2, 3):
        assert events.index(f"there {batch - 2}b") + 1 == events.index(f"ask {batch}")
    assert len(events) == 12 + 2


# ------------------------------------------------------------------ without the images of the test


@pytest.mark.parametrize("family", others_long(TINY))
def test_blank_and_no_images_show_nothing_of_the_test(family):
    test, opened = made_tester(family), family_toys.setup(family)
    records = SOURCE.records("ct-liver-state", "test").select(range(3))
    params = family_toys.placed(family, None)

    def answers(records):
        again = {name: opened.encode_eval(of_control) for name, of_control in control_sets(records, WITHOUT, 0).items()}
        [answers] = test.run(params, [SubsetTest(opened.encode_eval(records), again)])
        return answers

    plain, controls = answers(records)
    grey = one_by_one(family, opened.encode_eval(RecordSet(records.records, [BLANK] * 3)), generate=False)
    check_alike(controls["blank_images"], grey, generated=False)
    turned = RecordSet(records.records, [records.image(i)[::-1, ::-1] for i in range(3)])
    plain_of_turned, controls_of_turned = answers(turned)
    assert np.abs(scores(plain) - scores(plain_of_turned)).max() > 1e-4
    for name in WITHOUT:
        assert [p.id for p in controls[name]] == [r.id for r in records.records]
        np.testing.assert_array_equal(scores(controls[name]), scores(controls_of_turned[name]))
    assert np.abs(scores(controls["blank_images"]) - scores(controls["text_only"])).max() > 1e-4


def test_each_control_is_asked_by_the_cheapest_program_that_knows_it(monkeypatch):
    """Controls beside the test's images go on from its rows; the others need no free answer, and are decoded once."""
    setup = open_setup(replace(RunConfig(), data__max_text_tokens=96, data__test_records_per_subset=6))
    records = with_four_options(setup.source.records("oct-skin-grade", "test"))
    again = {name: setup.encode_eval(of_control) for name, of_control in control_sets(records, CONTROLS, 0).items()}
    together, alone = [], []
    read = lambda self, queue, params, encoded, name, evaluator: alone.append((encoded, name, evaluator)) or []
    monkeypatch.setattr(subsets.Tester, "_ask_plainly", read)
    follow = lambda self, queue, params, test, controls: together.extend(controls) or ([], [], [])
    monkeypatch.setattr(subsets.Tester, "_ask_followed", follow)
    test = subsets.Tester(setup, build.abstract(setup.model)[0], sees=True)
    test._ask(letters.Queue(), None, SubsetTest(setup.encode_eval(records), again, name="skin"))
    assert together == [*again][:-2] and [*again][-2:] == list(WITHOUT)
    assert alone == [(again[name], f"skin/{name}", test._letters_alone) for name in WITHOUT]
    assert not test._letters_alone.num_new
