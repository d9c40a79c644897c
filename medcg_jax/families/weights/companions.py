"""What lies in a checkpoint's directory beside weights and config: a tokenizer, how images are taken, chat templates."""

import shutil
from collections.abc import Sequence
from pathlib import Path

TOKENIZER = ("tokenizer.json", "tokenizer.model")
# What a tokenizer's own files say of its tokens.
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
OTHERS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
# A folder of further templates, one a file.
TEMPLATES = "additional_chat_templates"


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER)


def copy(sources: Sequence[Path], dst: Path) -> None:
    """Copies what is there into the directory `dst`; of two files of one name the first is taken.

    sources: checkpoint directories, and files of tokenizers. A tokenizer comes with its own files, and whole: where one
      is copied, nothing of a later source's is.
    """
    for source in sources:
        directory = source if source.is_dir() else source.parent
        if not has_tokenizer(dst):
            for path in _tokenizer_files(source):
                _copy(path, dst / (path.name if path.name in OF_TOKENIZER else f"tokenizer{path.suffix}"))
        # Of a tokenizer that lies elsewhere, its image processor is not the checkpoint's.
        if source.is_dir():
            for name in OTHERS:
                _copy(directory / name, dst / name)
            for path in sorted((directory / TEMPLATES).glob("*.jinja")):
                (dst / TEMPLATES).mkdir(exist_ok=True)
                _copy(path, dst / TEMPLATES / path.name)


def _tokenizer_files(source: Path) -> list[Path]:
    """The files of the tokenizer in a directory, or of one whose file is named."""
    if source.is_dir():
        names = [*TOKENIZER, *OF_TOKENIZER] if has_tokenizer(source) else OF_TOKENIZER
        return [source / name for name in names]
    # A file among others, as the package's own, is a tokenizer by itself.
    whole = source.name in TOKENIZER
    beside = [source.parent / name for name in (*TOKENIZER, *OF_TOKENIZER)] if whole else []
    return [source, *(path for path in beside if path != source)]


def _copy(source: Path, dst: Path) -> None:
    if source.is_file() and not dst.exists():
        shutil.copyfile(source, dst)
