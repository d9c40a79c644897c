"""Tests asked beside other images alone: by the program of the plain test, with images that are there already."""

import dataclasses

import numpy as np

from medcg_jax.config import RunConfig, replace
from medcg_jax.data.controls import control_sets
from medcg_jax.eval import subsets
from medcg_jax.eval.run import Prediction
from medcg_jax.train.setup import open_setup

RUN = replace(RunConfig(), data__max_text_tokens=96, data__train_records_per_subset=4, data__test_records_per_subset=6)


class Recorder(subsets.Tester):
    """Answers nothing, and keeps what it was asked."""

    def __init__(self, setup):
        super().__init__(setup, None)
        self.asked = []

    def __call__(self, params, encoded):
        self.asked.append(encoded)
        return [Prediction(r.id, r.subset, r.options, r.answer, "A", (0.0,), "A") for r in encoded.records.records]


def test_the_plain_test_is_asked_as_without_a_control_and_then_beside_other_images(monkeypatch):
    setup = open_setup(RUN)
    records = setup.source.records("oct-skin-grade", "test")
    plain = setup.encode_eval(records)
    again = {
        name: setup.encode_eval(made, memory_limit_bytes=0)
        for name, made in control_sets(records, RUN.eval.controls, 0).items()
    }
    assert list(again) == ["shuffled_images"]
    tester = Recorder(setup)
    answers, others = tester.again(None, plain, again)
    assert tester.asked[0] is plain and [one.generated for one in answers] == ["A"] * 6
    assert [(one.id, one.generated) for one in others["shuffled_images"]] == [(r.id, None) for r in records.records]

    # Row by row what decoding each image anew gives, and nothing is decoded.
    rows = np.array([4, 1, 1, 5])
    wanted, ids = again["shuffled_images"].rows(rows)
    monkeypatch.setattr("medcg_jax.data.encoding._image_arrays", lambda *of: 1 / 0)
    found, same_ids = tester.asked[1].rows(rows)
    assert ids == same_ids and found.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_array_equal(found[key], wanted[key])
    assert not np.array_equal(found["pixels"], plain.rows(rows)[0]["pixels"])
    far = dataclasses.replace(plain, images=None)
    assert subsets.with_images_of(again["shuffled_images"], far) is again["shuffled_images"]
