"""The comparison of products in 8 bits: float32 is itself, and int8 stands near it with a difference that is there."""

import pytest

from benchmarks.matmul_accuracy import RUNS, matmul_accuracy
from medcg_jax.config_file import load
from medcg_jax.nn import matmul

pytest.importorskip("qwix", reason="qwix is not installed")


def compare() -> dict:
    config = {"data.train_records_per_subset": "16", "eval.batch_size": "64", "base.batch_size": "16"}
    return matmul_accuracy(
        load("configs/phantom.py", config), num_steps=3, runs={name: RUNS[name] for name in ("float32", "int8")}
    )["runs"]


def test_int8_is_near_float32():
    found = compare()
    assert found["float32"]["logits"] == (0, 0) and found["float32"]["gradient"] == (0, 0)
    assert all(1e-4 < one < 0.1 for one in found["int8"]["logits"])
    assert found["int8"]["losses"] == pytest.approx(found["float32"]["losses"], abs=0.1)


def test_a_product_with_a_wrong_scale_is_seen(monkeypatch):
    monkeypatch.setattr(matmul, "_product", lambda *args, right=matmul._product: 1.3 * right(*args))
    assert compare()["int8"]["logits"][0] > 0.1
