"""What is said before the first step: emulated products, another checkpoint's family, another tokenizer."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.eval.subsets import check_tokenizer
from medcg_jax.train.setup import open_setup

TINY = str(Path(__file__).parents[2] / "configs" / "phantom.py") + ":tiny"
BATCHES = {"train.batch_size": "8", "base.batch_size": "8", "eval.batch_size": "8"}


@pytest.mark.parametrize(("matmul", "is_told"), [("", False), ("int8", False), ("fp8", True)])
def test_fp8_on_a_cpu_is_said_to_be_emulated(matmul, is_told, capsys):
    pytest.importorskip("qwix")
    open_setup(load(TINY, BATCHES | {"model.matmul": matmul}))
    assert ("model.matmul=fp8 is emulated on a CPU" in capsys.readouterr().out) == is_told


def test_a_checkpoint_of_another_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(ConfigError, match="is a qwen2_vl checkpoint, and model.name=llava15_tiny is of llava"):
        open_setup(load(TINY, BATCHES | {"model.checkpoint": str(tmp_path)}))


def test_another_tokenizer_than_that_of_the_training_is_refused(tmp_path):
    own, other = SMALL, SMALL.with_stem("chatml")
    shutil.copy(own, tmp_path / "tokenizer.json")
    for path, accepted in ((own, True), (other, False)):
        run = replace(RunConfig(), model__tokenizer=str(path))
        setup = SimpleNamespace(run=run, tokenizer=load_tokenizer(str(path)))
        if accepted:
            check_tokenizer(setup, tmp_path)
        else:
            with pytest.raises(ConfigError, match="expected model.tokenizer='', which takes that one"):
                check_tokenizer(setup, tmp_path)
    # Without a tokenizer beside the parameters there is nothing to compare.
    check_tokenizer(setup, tmp_path / "none")
