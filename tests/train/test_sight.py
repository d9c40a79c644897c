"""A run is refused where the model does not see its images, and where its tokenizer is not the checkpoint's."""

import json
import shutil
from pathlib import Path

import family_toys
import jax
import numpy as np
import pytest
from flax import nnx

from medcg_jax.cli import main
from medcg_jax.data.tokenizer import SMALL
from medcg_jax.families import build, registry
from medcg_jax.families.weights.convert import open_leaves, read_config
from medcg_jax.train.sanity import BlindModel, check_sees, has_closed_gates, pixel_keys

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
RUN = [
    f"--config={CONFIG}:tiny", "--config.data.subsets=ct-brain-state", "--config.train.steps=2",
    "--config.train.batch_size=8", "--config.eval.batch_size=8",
]  # fmt: skip


def run(verb: str, workdir: Path, capsys, *flags: str) -> tuple[int, str]:
    status = main([verb, *RUN, f"--workdir={workdir}", *flags])
    return status, capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    assert main(["train", *RUN, f"--workdir={workdir}"]) == 0
    return workdir


def blind(monkeypatch):
    """The fault: the model looks for an id that no prompt has."""
    right = registry.Family.token_ids

    def wrong(family, tokenizer):
        return right(family, tokenizer) | {"image_token_id": tokenizer.vocab_size + 5}

    monkeypatch.setattr(registry.Family, "token_ids", wrong)


def test_training_of_a_model_that_does_not_see_is_refused(tmp_path, capsys, monkeypatch):
    blind(monkeypatch)
    status, line = run("train", tmp_path, capsys)
    assert status == 2 and "the model does not see images" in line and "\n" not in line
    assert not (tmp_path / "params").exists()


def test_evaluation_of_a_model_that_does_not_see_is_refused(trained, tmp_path, capsys, monkeypatch):
    blind(monkeypatch)
    shutil.copytree(trained / "params", tmp_path / "params")
    file = tmp_path / "params" / "model.json"
    about = json.loads(file.read_text())
    number = about["image_token_id"]
    # Against the checkpoint's id it is refused before anything is computed.
    status, line = run("eval", tmp_path, capsys)
    assert status == 2 and f"image_token_id is {number}" in line and "\n" not in line
    monkeypatch.setattr("medcg_jax.train.setup.check_token_ids", lambda *_: None)
    status, line = run("eval", tmp_path, capsys)
    assert status == 2 and "subset ct-brain-state: the model does not see images" in line and "\n" not in line
    assert not (tmp_path / "predictions").exists()


@pytest.mark.long
def test_a_grid_of_a_model_that_does_not_see_is_refused(tmp_path, capsys, monkeypatch):
    blind(monkeypatch)
    flags = ["--config.base.steps=0", "--config.study.jobs=1"]
    status, line = run("reproduce", tmp_path, capsys, *flags)
    assert status == 2 and "the model does not see images" in line.splitlines()[-1]


@pytest.mark.long
def test_the_look_changes_nothing_of_a_training(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medcg_jax.train.loop.check_sees", lambda *_: True)
    assert run("train", tmp_path, capsys)[0] == 0
    with_look, without = ((d / "metrics" / "train.jsonl").read_text() for d in (trained, tmp_path))
    for a, b in zip(with_look.splitlines(), without.splitlines(), strict=True):
        a, b = json.loads(a), json.loads(b)
        assert {k: a[k] for k in ("step", "loss", "grad_norm")} == {k: b[k] for k in ("step", "loss", "grad_norm")}
    config = read_config(trained / "params")
    leaves = [jax.tree.leaves(open_leaves(d / "params", config)) for d in (trained, tmp_path)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("family", family_toys.TINY)
def test_every_family_has_pixels_that_it_sees(family):
    setup = family_toys.setup(family)
    keys = pixel_keys(setup.format.blank)
    assert keys == ("pixels",)
    batch, _ = family_toys.training_rows(family).rows(np.arange(2))
    graphdef, params = build.abstract(setup.model)[0], family_toys.weights(family)
    assert not has_closed_gates(params)
    jitted = jax.jit(lambda params, batch: _last_logits(nnx.merge(graphdef, params), batch))

    def score(batch):
        return [np.asarray(jitted(params, dict(batch)))]

    assert check_sees(score, batch, keys, "run")
    assert not check_sees(score, {**batch, "pixels": np.zeros_like(batch["pixels"])}, keys, "run")
    other = np.where(batch["tokens"] == setup.model.image_token_id, 9, batch["tokens"])
    if family != "mllama":  # its images are no tokens of the text: it sees them there, too
        with pytest.raises(BlindModel, match="run: the model does not see images"):
            check_sees(score, {**batch, "tokens": other}, keys, "run")


def _last_logits(model, batch):
    images = {key: batch[key] for key in model.image_keys}
    last = (batch["segment_ids"] != 0).sum(1, keepdims=True) - 1
    return model.logits(model.hidden(batch["tokens"], images, segment_ids=batch["segment_ids"], at=last)[0][:, 0])


# ------------------------------------------------------------------ the tokenizer beside the weights


def test_parameters_keep_their_tokenizer_and_are_tested_with_it(trained, tmp_path, capsys):
    kept = trained / "params" / "tokenizer.json"
    assert kept.read_bytes() == SMALL.read_bytes()
    shutil.copytree(trained / "params", tmp_path / "params")
    about = json.loads((tmp_path / "params" / "model.json").read_text())
    # Another tokenizer of the same size with the image and the padding exchanged.
    found = json.loads(SMALL.read_text())
    found["model"]["vocab"][0], found["model"]["vocab"][3] = found["model"]["vocab"][3], found["model"]["vocab"][0]
    for token in found["added_tokens"]:
        token["id"] = {0: 3, 3: 0}.get(token["id"], token["id"])
    found["added_tokens"].sort(key=lambda token: token["id"])
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    status, line = run("eval", tmp_path, capsys, f"--config.model.tokenizer={other}")
    expected = f"model.json: image_token_id is {about['image_token_id']}, and 0 in the tokenizer {other}"
    assert status == 2 and expected in line and "\n" not in line
    status, line = run("train", tmp_path / "w", capsys, f"--config.model.checkpoint={trained / 'params'}",
                       f"--config.model.tokenizer={other}")  # fmt: skip
    assert status == 2 and expected in line
