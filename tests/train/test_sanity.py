"""A run is refused where the model does not see its images, and where its tokenizer is not the checkpoint's."""

import json
import shutil
from pathlib import Path

import family_toys
import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from train_toys import others_long

from medcg_jax.cli import main
from medcg_jax.config import ConfigError, ModelConfig
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families import build, registry
from medcg_jax.families.weights.convert import open_leaves
from medcg_jax.train.sanity import BlindModel, check_sees, check_token_ids, check_tokens, has_closed_gates, pixel_keys
from medcg_jax.train.setup import model_config, run_tokenizer

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
    status, text = run("train", tmp_path, capsys)
    # On a busy machine lines of progress stand before the refusal.
    assert status == 2 and "the model does not see images" in text.splitlines()[-1]
    assert text.count("medcg:") == 1
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
    leaves = [jax.tree.leaves(open_leaves(d / "params")) for d in (trained, tmp_path)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize("family", others_long(family_toys.TINY))
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


# ------------------------------------------------------------------ which tokenizer a run takes

SMALL_CHATML = SMALL.with_stem("chatml")


def with_added(path, *, pieces: int):
    """The package's small tokenizer with so many ordinary added tokens."""
    inner = tokenizers.Tokenizer.from_file(str(SMALL))
    inner.add_tokens([f"pad{i}word" for i in range(pieces)])
    inner.save(str(path))
    return load_tokenizer(path)


def test_more_text_ids_than_rows_are_refused(tmp_path):
    config = build.SIZES["llava15_7b"]()
    few = with_added(tmp_path / "few.json", pieces=100)
    check_tokens(few, "llava", config)
    small = build.TINY["llava15_tiny"](few.vocab_size - 10, few.image_id, pad_token_id=0, eos_token_id=2)
    with pytest.raises(
        ConfigError, match=r"few.json: ids of text up to 942, and the model has 933 rows; give the tokenizer"
    ):
        check_tokens(few, "llava", small)


def test_image_and_padding_need_no_row(tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(SMALL))
    found = json.loads(inner.to_str())
    # As llava-hf has them: behind the rows of the decoder.
    vocab = found["model"]["vocab"]
    vocab[0], vocab[3] = ["<a>", -9.0], ["<b>", -9.0]
    found["added_tokens"] = [t for t in found["added_tokens"] if t["id"] not in (0, 3)]
    for name in ("<image>", "<pad>"):
        found["added_tokens"].append(found["added_tokens"][0] | {"content": name, "id": 843 + (name == "<pad>")})
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.image_id, tokenizer.pad_id, tokenizer.text_ids) == (843, 844, 843)
    check_tokens(tokenizer, "llava", build.TINY["llava15_tiny"](843, 843, pad_token_id=844, eos_token_id=2))


def test_a_released_size_never_gets_the_packages_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("llava15_7b", "qwen2_vl_2b", "next_chat_7b_336"):
        with pytest.raises(
            ConfigError, match="model.tokenizer is empty, and .* has no tokenizer.model or tokenizer.json"
        ):
            run_tokenizer(ModelConfig(name=name, checkpoint=str(tmp_path)))
        with pytest.raises(ConfigError, match="model.checkpoint is empty, too"):
            run_tokenizer(ModelConfig(name=name))


def test_the_tokenizer_beside_the_weights_is_taken(tmp_path):
    assert run_tokenizer(ModelConfig(checkpoint=str(tmp_path))).path == SMALL
    (tmp_path / "tokenizer.json").write_bytes(SMALL_CHATML.read_bytes())
    for name in ("llava15_tiny", "llava15_7b"):
        found = run_tokenizer(ModelConfig(name=name, checkpoint=str(tmp_path)))
        assert found.path == tmp_path / "tokenizer.json"
    named = run_tokenizer(ModelConfig(checkpoint=str(tmp_path), tokenizer=str(SMALL)))
    assert named.path == SMALL
    # What was trained has its own, which comes first.
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tokenizer.json").write_bytes(SMALL.read_bytes())
    assert run_tokenizer(ModelConfig(checkpoint=str(tmp_path)), tmp_path / "params").path.parent.name == "params"


RIGHT = {
    "image_token_id": 5, "eos_token_id": [2], "pad_token_id": 0, "vision_start_token_id": 3, "vision_end_token_id": 4,
    "bos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [("image_token_id", 7, 5), ("image_token_index", 1, 5), ("eos_token_id", 9, 2), ("eos_token_id", [8, 9], 2),
     ("pad_token_id", 2, 0), ("vision_start_token_id", 4, 3), ("vision_end_token_id", 3, 4)],
)  # fmt: skip
@pytest.mark.parametrize("where", ["config.json", "text_config", "model.json"])
def test_ids_that_are_not_the_checkpoints_are_refused(tmp_path, field, value, ours, where):
    tokenizer = load_tokenizer(SMALL_CHATML)
    part = {**RIGHT, field: value}
    about = {"text_config": part} if where == "text_config" else part
    file = "model.json" if where == "model.json" else "config.json"
    (tmp_path / file).write_text(json.dumps(about))
    prefix = "text_config." if where == "text_config" else ""
    with pytest.raises(ConfigError) as error:
        check_token_ids(tokenizer, "qwen2_vl", tmp_path)
    expected = f"{tmp_path / file}: {prefix}{field} is {value}, and {ours} in the tokenizer {SMALL_CHATML}; "
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "about",
    [RIGHT, RIGHT | {"pad_token_id": None, "eos_token_id": None}, RIGHT | {"pad_token_id": -1}, {},
     RIGHT | {"eos_token_id": 0}, RIGHT | {"eos_token_id": [9, 2]}, {"text_config": RIGHT}],
    ids=str,
)  # fmt: skip
def test_ids_that_say_the_same_or_nothing_are_taken(tmp_path, about):
    (tmp_path / "config.json").write_text(json.dumps(about))
    check_token_ids(load_tokenizer(SMALL_CHATML), "qwen2_vl", tmp_path)


def test_a_bos_that_prompts_begin_with_is_compared(tmp_path):
    tokenizer = load_tokenizer(SMALL)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5}))
    with pytest.raises(ConfigError, match="bos_token_id is 5, and 1 in the tokenizer"):
        check_token_ids(tokenizer, "llava", tmp_path)


def test_the_tokens_that_a_checkpoint_lists_are_compared(tmp_path):
    listed = {"added_tokens_decoder": {"9": {"content": "<image>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match='added_tokens_decoder: "<image>" is 9, and 3 in the tokenizer'):
        check_token_ids(load_tokenizer(SMALL), "llava", tmp_path)


def test_a_box_token_of_next_chat_is_its_vocabularys(tmp_path):
    """NExT-Chat's config.json states no such ids: they are its last rows."""
    tokenizer = load_tokenizer(SMALL.with_stem("next_chat"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nextchat", "architectures": ["NextChatForCausalLM"], "vocab_size": 832})
    )
    with pytest.raises(ConfigError) as error:
        check_token_ids(tokenizer, "next_chat", tmp_path)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_ids_of_the_model_are_the_tokenizers(tmp_path):
    config = model_config(ModelConfig(name="qwen2_vl_tiny"), load_tokenizer(SMALL_CHATML))
    assert (config.image_token_id, config.vision_start_token_id, config.eos_token_id) == (5, 3, 2)
