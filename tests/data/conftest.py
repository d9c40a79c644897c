"""Small tokenizers that the data tests share."""

import io
from pathlib import Path

import pytest
from record_sets import write_word_tokenizer

from medcg_jax.config import DataConfig
from medcg_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    return load_tokenizer(write_word_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer.json"))


@pytest.fixture(scope="session")
def llama_model_file(tmp_path_factory) -> Path:
    """A SentencePiece model of 420 pieces with the Llama family's settings: BPE, bytes, identity, a space in front."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: Which lung cancer category does this slice belong to? A: Malignant B: Normal C: Benign D: Severe "
        "Answer with the option's letter from the given choices directly. "
        "ASSISTANT: A</s>USER: and this one? ASSISTANT: B</s>USER: ASSISTANT: C the answer is D"
    )
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture(scope="session")
def plain_config() -> DataConfig:
    return DataConfig(system_prompt="", max_text_tokens=40, max_target_tokens=6)
