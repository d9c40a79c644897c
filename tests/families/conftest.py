"""The data tests' small tokenizers, for prompts."""

from tests.data.conftest import llama_model_file, word_tokenizer  # noqa: F401
