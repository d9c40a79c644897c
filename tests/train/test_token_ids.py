"""Which tokenizer a run takes, and when it is not the checkpoint's."""

import json

import pytest
import tokenizers

from medcg_jax.config import ConfigError, ModelConfig
from medcg_jax.data.tokenizer import SMALL, load_tokenizer
from medcg_jax.families import build
from medcg_jax.train.sanity import check_token_ids, check_tokens
from medcg_jax.train.setup import model_config, run_tokenizer

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
        ConfigError, match=r"few.json: ids of text up to 912, and the model has 903 rows; give the tokenizer"
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
        found["added_tokens"].append(found["added_tokens"][0] | {"content": name, "id": 813 + (name == "<pad>")})
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.image_id, tokenizer.pad_id, tokenizer.text_ids) == (813, 814, 813)
    check_tokens(tokenizer, "llava", build.TINY["llava15_tiny"](813, 813, pad_token_id=814, eos_token_id=2))


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
