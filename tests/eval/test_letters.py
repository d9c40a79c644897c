"""Predictions: from the logits at each prompt's end, the same on any mesh and in any batch; their file and summary."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from eval_toys import TOKENIZER, encoded, model_on, records
from flax import nnx

from medcg_jax.config import ConfigError, MeshConfig
from medcg_jax.eval.letters import evaluate, option_logprobs
from medcg_jax.eval.predictions import NonFiniteScores, Prediction, prediction_lines, summary, write_predictions
from medcg_jax.untrusted import FileError


@pytest.fixture(scope="module")
def alone():
    """(evaluator, graphdef, params, predictions) on one device in batches of 8."""
    evaluator, graphdef, params = model_on()
    return evaluator, graphdef, params, evaluate(evaluator, params, encoded(), TOKENIZER, batch_size=8)


def check_alike(found, expected) -> None:
    assert [(p.id, p.predicted, p.generated) for p in found] == [(p.id, p.predicted, p.generated) for p in expected]
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a.logprobs, b.logprobs, atol=2e-4)


def test_letters_are_scored_at_the_end_of_each_prompt(alone):
    _, graphdef, params, predictions = alone
    rows, ids = encoded().rows(np.arange(21))
    model = nnx.merge(graphdef, params)
    logits = nnx.jit(lambda m, r: m(r["tokens"], {"pixels": r["pixels"]}, segment_ids=r["segment_ids"]))(model, rows)
    logits = np.asarray(logits, np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ends = rows["segment_ids"].sum(1) - 1
    differs = 0
    for i, p in enumerate(predictions):
        letters = rows["option_ids"][i][: len(p.options)]
        assert np.allclose(p.logprobs, logprobs[i, ends[i], letters], atol=2e-4) and p.id == ids[i]
        assert p.predicted == "ABCD"[int(logprobs[i, ends[i], letters].argmax())]
        differs += not np.allclose(p.logprobs, logprobs[i, -1, letters], atol=1e-2)
    # The last column, which is padding, would have given other numbers.
    assert differs > 10 and len({p.predicted for p in predictions}) > 1


@pytest.mark.parametrize("batch_size", [7, 32])
def test_the_batch_changes_no_prediction(alone, batch_size):
    evaluator, _, params, expected = alone
    check_alike(evaluate(evaluator, params, encoded(), TOKENIZER, batch_size=batch_size), expected)


def test_padding_changes_no_prediction(alone):
    evaluator, _, params, expected = alone
    check_alike(evaluate(evaluator, params, encoded(text_tokens=60), TOKENIZER, batch_size=8), expected)


def test_the_mesh_changes_no_prediction(alone):
    evaluator, _, params = model_on(MeshConfig(data=2, fsdp=2, tensor=2))
    found = evaluate(evaluator, params, encoded(), TOKENIZER, batch_size=8)
    check_alike(found, alone[3])
    with pytest.raises(AssertionError):
        check_alike(found[1:] + found[:1], alone[3])
    with pytest.raises(ConfigError, match="eval.batch_size=6"):
        evaluate(evaluator, params, encoded(), TOKENIZER, batch_size=6)


def test_other_weights_compile_nothing(alone):
    evaluator, _, params, expected = alone
    before = evaluator.jitted._cache_size()
    other = jax.tree.map(lambda w: w * 1.1, params)
    found = evaluate(evaluator, other, encoded(), TOKENIZER, batch_size=8)
    assert evaluator.jitted._cache_size() == before
    assert [p.logprobs for p in found] != [p.logprobs for p in expected]


def test_without_generation(alone):
    evaluator, _, params = model_on(generate=False)
    found = evaluate(evaluator, params, encoded(), TOKENIZER, batch_size=8)
    assert [p.predicted for p in found] == [p.predicted for p in alone[3]]
    assert all(p.generated is None for p in found) and summary(found)["generated_accuracy"] is None


def test_scores_that_are_no_numbers_name_the_record(alone):
    evaluator, _, params, _ = alone
    broken = jax.tree.map(lambda w: w * np.nan, params)
    with pytest.raises(NonFiniteScores, match="ct/test/0"):
        evaluate(evaluator, broken, encoded(), TOKENIZER, batch_size=8)


def test_no_records_no_predictions(alone):
    evaluator, _, params, _ = alone
    assert evaluate(evaluator, params, encoded(records(0)), TOKENIZER, batch_size=8) == []


def test_missing_options_have_no_score():
    logits = np.random.default_rng(0).normal(0, 3, (2, 9)).astype(np.float32)
    found = np.asarray(option_logprobs(logits, np.array([[3, 1, -1], [0, 8, 2]], np.int32)))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    assert np.allclose(found[0, :2], expected[0, [3, 1]], atol=1e-5) and found[0, 2] == -np.inf
    assert np.allclose(found[1], expected[1, [0, 8, 2]], atol=1e-5)


PREDICTIONS = [
    Prediction("04/test/1", "04", ("no", "yés"), "B", "B", (-1.5, -0.25), "B: yés"),
    Prediction("04/test/2", "04", ("no", "yés"), "A", "B", (-2.0, -0.0), "so"),
    Prediction("04/test/3", "04", ("no", "yés"), "A", "A", (-0.125, -3.0), "(A)"),
    Prediction("04/test/4", "04", ("no", "yés"), "A", "A", (-0.125, -3.0), "B\x85"),
]


def test_the_file_is_the_same_bytes_and_appears_whole(tmp_path):
    path = tmp_path / "predictions" / "cell.jsonl"
    write_predictions(path, PREDICTIONS[:1])
    expected = (
        '{"id": "04/test/1", "subset": "04", "options": ["no", "yés"], "answer": "B", "predicted": "B", '
        '"logprobs": [-1.5000, -0.2500], "generated": "B: yés"}\n'
    )
    assert path.read_text(encoding="utf-8") == expected

    def breaks():
        yield PREDICTIONS[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, breaks())
    assert path.read_text(encoding="utf-8") == expected and len(list(path.parent.iterdir())) == 1
    write_predictions(path, PREDICTIONS)
    lines = [json.loads(json.dumps(dataclasses.asdict(p))) for p in PREDICTIONS]
    assert [line | {"group": ""} for line in prediction_lines(path)] == lines
    # The last one's text ends in a character that some readers take for the end of a line.
    assert [list(json.loads(line)) for line in path.read_text().split("\n")[:-1]] == [
        ["id", "subset", "options", "answer", "predicted", "logprobs", "generated"]
    ] * 4


def test_a_known_patient_is_a_key_of_its_line_alone(tmp_path):
    path = tmp_path / "cell.jsonl"
    write_predictions(path, [dataclasses.replace(PREDICTIONS[0], group="patient 7"), PREDICTIONS[1]])
    known, unknown = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(known) == {**json.loads(known), "group": "patient 7"} and "group" not in unknown
    assert [line.get("group") for line in prediction_lines(path)] == ["patient 7", None]
    path.write_text(known.replace('"patient 7"', "7") + "\n")
    with pytest.raises(FileError, match="line 1: group=7: expected text"):
        list(prediction_lines(path))


def test_summary():
    found = summary(PREDICTIONS)
    assert 0 < found.pop("ci_low") < 0.75 < found.pop("ci_high") < 1
    mass = np.exp([p.logprobs for p in PREDICTIONS]).sum() / 4
    assert found.pop("letter_mass") == pytest.approx(mass)
    assert found == {
        "n": 4, "correct": 3, "accuracy": 0.75, "letters": {"A": 2, "B": 2}, "answers": {"A": 3, "B": 1},
        "generated_accuracy": 0.5, "unparsed_rate": 0.25,
    }  # fmt: skip
    assert summary([])["accuracy"] is None
