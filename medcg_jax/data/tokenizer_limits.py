"""Checks of untrusted tokenizer files before a library reads them: structures that could fill the memory, never end, or
abort the process are refused. Also reads the small JSON files beside them, within limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medcg_jax.data.records import DataError
from medcg_jax.untrusted import FileError, article_of, check_number, parsed, read_bytes, read_json, shown

# Llama 3's tokenizer.json has 17 MB in its longest form, Qwen2's 11.
MAX_TOKENIZER_BYTES = 2**25
# Pieces and merges, counted by the file's commas: 1.2 million in Llama 3's longest form.
MAX_TOKENIZER_ITEMS = 1_500_000
# tokenizer_config.json and the like: chat templates have some 10 kB, lists of added tokens some 100 kB.
MAX_CONFIG_BYTES = 2**24
# The largest vocabulary in use has 262,144 pieces.
MAX_TOKEN_ID = 2**20 - 1
MAX_PIECE_CHARS = 1024
MAX_ADDED_TOKENS = 2**14
# The most by which a file's replacement rules may lengthen a text.
MAX_GROWTH = 16
# Text that a rule puts before or behind a text.
MAX_AFFIX_CHARS = 16
MAX_PATTERN_CHARS = 4096
# Unbounded repeats in one alternative of a pattern: with more, matching time grows with the cube of a text's length.
MAX_REPEATS = 2
MAX_RULES = 64

NORMALIZERS = tuple(
    "NFC NFD NFKC NFKD Lowercase Strip StripAccents Prepend Replace Sequence ByteLevel BertNormalizer Nmt".split()
)
PRE_TOKENIZERS = tuple(
    "ByteLevel Metaspace Split Sequence Digits Punctuation Whitespace WhitespaceSplit BertPreTokenizer UnicodeScripts "
    "CharDelimiterSplit".split()
)
DECODERS = tuple("ByteLevel Metaspace Replace ByteFallback Fuse Strip Sequence WordPiece BPEDecoder".split())
MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# Section of the file -> key of the list of rules in its Sequence.
INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def read_tokenizer_json(path: Path) -> tuple[dict[str, Any], bytes]:
    """(the JSON of a tokenizer.json, its bytes), after a check of its structure.

    Raises:
      DataError: it cannot be read, or could do harm. The message is one line: file, rule, what is expected.
    """
    with one_line():
        content = read_bytes(path, MAX_TOKENIZER_BYTES)
        if content.count(b",") > MAX_TOKENIZER_ITEMS:
            raise FileError(f"{path}: {content.count(b','):,} entries; at most {MAX_TOKENIZER_ITEMS:,} are read")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{path}: not UTF-8 (byte {error.start})") from error
        tokenizer = parsed(text, path)
        check_structure(tokenizer, path)
    return tokenizer, content


def check_structure(tokenizer: dict[str, Any], path: Path) -> None:
    """Raises FileError for the first part of a tokenizer.json that could do harm or has another form."""
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise FileError(f"{path}: model is {article_of(model)}; expected an object")
    kind = model.get("type", "BPE")
    if kind not in MODELS:
        raise FileError(f"{path}: model.type={shown(kind)}; accepted: {', '.join(MODELS)}")
    if model.get("dropout"):
        raise FileError(f"{path}: model.dropout={shown(model['dropout'])}: ids would be drawn at random; expected null")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        _check_affix(model.get(field), f"{path}: model.{field}")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict | list) or not vocab:
        raise FileError(f"{path}: model.vocab is {article_of(vocab)}; expected the pieces with their ids")
    if isinstance(vocab, list):
        pieces = [entry[0] if isinstance(entry, list) and entry else None for entry in vocab]
    else:
        pieces = list(vocab)
        for piece, number in vocab.items():
            if type(number) is not int or not 0 <= number <= MAX_TOKEN_ID:
                check_number(number, f"{path}: model.vocab[{shown(piece)}]", least=0, most=MAX_TOKEN_ID, whole=True)
    for piece in pieces:
        if not isinstance(piece, str) or len(piece) > MAX_PIECE_CHARS:
            raise FileError(
                f"{path}: model.vocab has {shown(piece)}; expected pieces of at most {MAX_PIECE_CHARS} characters"
            )
    _check_added(tokenizer.get("added_tokens") or [], path)
    for section, accepted in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS), ("decoder", DECODERS)):
        _check_rules(tokenizer.get(section), section, accepted, path)


def _check_added(entries: Any, path: Path) -> None:
    if not isinstance(entries, list) or len(entries) > MAX_ADDED_TOKENS:
        many = f"{len(entries):,} entries" if isinstance(entries, list) else article_of(entries)
        raise FileError(f"{path}: added_tokens has {many}; expected a list of at most {MAX_ADDED_TOKENS:,}")
    for token in entries:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FileError(f"{path}: added_tokens has {shown(token)}; expected objects with content and id")
        check_added(token["content"], token.get("id"), f"{path}: added_tokens")


def check_added(content: str, number: Any, name: str) -> None:
    """Raises FileError if an added token has no text, too long a text, or no id."""
    if not 0 < len(content) <= MAX_PIECE_CHARS:
        raise FileError(f"{name}: token {shown(content)}; expected 1 to {MAX_PIECE_CHARS} characters")
    check_number(number, f"{name}[{shown(content)}]", least=0, most=MAX_TOKEN_ID, whole=True)


def _check_rules(top: Any, section: str, accepted: tuple[str, ...], path: Path) -> None:
    """Raises FileError for rules of a section that are unknown, lengthen texts, or have patterns that match too long."""
    growth, waiting, count = 1.0, [top], 0
    while waiting:
        rule = waiting.pop()
        if rule is None:
            continue
        count += 1
        kind = rule.get("type") if isinstance(rule, dict) else rule
        if kind not in accepted or count > MAX_RULES:
            many = f"more than {MAX_RULES} rules" if count > MAX_RULES else f"type={shown(kind)}"
            raise FileError(f"{path}: {section} has {many}; accepted: at most {MAX_RULES} of {', '.join(accepted)}")
        if kind == "Sequence":
            inner = rule.get(INNER[section])
            if not isinstance(inner, list):
                raise FileError(f"{path}: {section}.{INNER[section]} is {article_of(inner)}; expected a list")
            waiting += inner
        for field in ("prepend", "prefix", "suffix", "replacement"):
            _check_affix(rule.get(field), f"{path}: {section}.{field}")
        pattern = rule.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(regex, str):
            check_pattern(regex, f"{path}: {section}.pattern")
        if kind == "Replace":
            content, plain = rule.get("content"), pattern.get("String") if isinstance(pattern, dict) else None
            if not isinstance(content, str) or not (isinstance(regex, str) or isinstance(plain, str) and plain):
                raise FileError(
                    f"{path}: {section} has a Replace of {shown(pattern)} by {shown(content)}; expected texts"
                )
            # A pattern may match between any two characters.
            growth *= max(1.0, len(content) / len(plain) if plain else len(content) + 1)
            if growth > MAX_GROWTH:
                raise FileError(
                    f"{path}: the {section}'s Replace rules make a text {growth:,.0f} times as long; at most "
                    f"{MAX_GROWTH} is allowed"
                )


def _check_affix(value: Any, name: str) -> None:
    if value is not None and (not isinstance(value, str) or len(value) > MAX_AFFIX_CHARS):
        raise FileError(f"{name}={shown(value)}: expected text of at most {MAX_AFFIX_CHARS} characters")


# One element of a pattern: a back reference, escape, class, bracket, bar, quantifier or other character.
_ATOMS = re.compile(
    r"(?P<back>\\(?:[1-9]|k[<']|g[<']))"
    r"|(?P<escape>\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.))"
    r"|(?P<class>\[\^?\]?(?:\\.|\[:[^\]]*:\]|[^\]\\])*\])"
    r"|(?P<open>\((?:\?(?:[imsx-]*:|[=!>|]|<[=!]|<[A-Za-z_]\w*>|[imsx-]+(?=\))))?)"
    r"|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{\d*,\d*\}|\{\d+\})[+?]?)"
    r"|(?P<other>.)",
    re.DOTALL,
)
# A repeat of more turns than this counts as unbounded.
_FEW_TURNS, _ENDLESS = 8, 1 << 30


def check_pattern(pattern: str, name: str) -> None:
    """Raises FileError for a pattern whose matching time could grow faster than the square of a text's length.

    Refused: repeats of a group that holds a repeat or alternatives, more than `MAX_REPEATS` unbounded repeats in one
    alternative, and back references.
    """
    why = _fault_of(pattern) if len(pattern) <= MAX_PATTERN_CHARS else f"it has {len(pattern):,} characters"
    if why:
        raise FileError(
            f"{name}={shown(pattern)}: {why}; accepted: at most {MAX_PATTERN_CHARS:,} characters and {MAX_REPEATS} "
            "repeats in an alternative, none inside another"
        )


def _fault_of(pattern: str) -> str:
    # For each open group: repeats in its current alternative, the most in any alternative, whether it has alternatives.
    groups: list[list[int]] = [[0, 0, 0]]
    closed = [0, 0, 0]
    after: str | None = ""
    for atom in _ATOMS.finditer(pattern):
        kind, text = atom.lastgroup, atom.group()
        if kind == "back":
            return "it refers back to what was matched"
        if kind == "open":
            groups.append([0, 0, 0])
        elif kind == "bar":
            groups[-1] = [0, max(groups[-1][:2]), 1]
        elif kind == "close":
            if len(groups) == 1:
                return "a bracket is not opened"
            group = groups.pop()
            closed = [max(group[:2]), max(group[:2]), group[2]]
            groups[-1][0] += closed[0]
        elif kind == "repeat":
            if after == "repeat" or text.endswith("}+"):
                return "it repeats a repeat"
            turns = _most_turns(text)
            if after == "close" and turns > 1 and (closed[0] or closed[2]):
                return "it repeats what holds a repeat or alternatives"
            groups[-1][0] += turns > _FEW_TURNS
        if max(groups[-1][:2]) > MAX_REPEATS:
            return f"{max(groups[-1][:2])} repeats without an end follow each other"
        after = kind
    return "a bracket is not closed" if len(groups) > 1 else ""


def _most_turns(repeat: str) -> int:
    """The most turns of a quantifier: 5 for "{2,5}", 1 for "?", `_ENDLESS` for "*", "+" and "{2,}"."""
    if repeat[0] in "*+?":
        return 1 if repeat[0] == "?" else _ENDLESS
    last = repeat.strip("{}?").rpartition(",")[2]
    return int(last[:9]) if last else _ENDLESS


def read_config(path: Path) -> dict[str, Any]:
    """The object in a small JSON file beside a tokenizer; {} without the file.

    Raises:
      DataError: the file exists and cannot be read.
    """
    if not path.is_file() and not path.is_fifo():
        return {}
    with one_line():
        return read_json(path, max_bytes=MAX_CONFIG_BYTES, encoding="utf-8-sig")


def added_tokens(directory: Path) -> dict[str, int]:
    """Token -> id, for those that added_tokens.json and tokenizer_config.json add to a directory's SentencePiece model.

    Raises:
      DataError: a file is broken, an id is no id, one name has two ids, or one id two names.
    """
    entries: list[tuple[str, int, str]] = []
    with one_line():
        name = directory / "added_tokens.json"
        for content, number in read_config(name).items():
            check_added(content, number, str(name))
            entries.append((content, number, str(name)))
        entries += [(content, number, where) for number, content, where in added_in_config(directory)]
        ids: dict[str, int] = {}
        names: dict[int, str] = {}
        for content, number, where in entries:
            if ids.setdefault(content, number) != number:
                raise FileError(
                    f"{where}: {shown(content)} has the id {number}, and {ids[content]} elsewhere beside it"
                )
            if names.setdefault(number, content) != content:
                raise FileError(f"{where}: {number} is the id of {shown(content)} and of {shown(names[number])}")
    return ids


def added_in_config(directory: Path) -> Iterator[tuple[int, str, str]]:
    """(id, content, name for messages) of each entry of `added_tokens_decoder` in a directory's tokenizer_config.json.

    Raises:
      FileError: an entry has another form.
    """
    path = directory / "tokenizer_config.json"
    entries = read_config(path).get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or len(entries) > MAX_ADDED_TOKENS:
        raise FileError(f"{path}: added_tokens_decoder is {article_of(entries)}; expected an object of ids")
    for key, token in entries.items():
        content = token.get("content") if isinstance(token, dict) else None
        where = f"{path}: added_tokens_decoder"
        if not isinstance(content, str) or not re.fullmatch(r"[0-9]{1,9}", key):
            raise FileError(f"{where}[{shown(key)}]={shown(token)}: expected ids with the content of their tokens")
        check_added(content, int(key), where)
        yield int(key), content, where


def named_tokens(directory: Path) -> dict[str, str]:
    """Role -> token by tokenizer_config.json: "bos_token", "eos_token", "pad_token", "image_token".

    The image token may stand in processor_config.json alone. Missing and null roles are left out.

    Raises:
      DataError: a file is broken, or a name is no text.
    """
    names: dict[str, str] = {}
    with one_line():
        for file, roles in (
            ("tokenizer_config.json", ("bos_token", "eos_token", "pad_token", "image_token")),
            ("processor_config.json", ("image_token",)),
        ):
            config = read_config(directory / file)
            for key in ("extra_special_tokens", "model_specific_special_tokens"):
                inner = config.get(key)
                config = {**inner, **config} if isinstance(inner, dict) else config
            for role in roles:
                value = config.get(role)
                value = value.get("content") if isinstance(value, dict) else value
                if value is None:
                    continue
                if not isinstance(value, str):
                    raise FileError(f"{directory / file}: {role} is {article_of(value)}; expected text or null")
                names.setdefault(role, value)
    return names


@contextmanager
def one_line():
    """Turns a FileError of the block into a DataError that begins with `tokenizer`."""
    try:
        yield
    except FileError as error:
        raise DataError(f"tokenizer {error}") from error


@contextmanager
def library_errors(what: str):
    """Turns a library's errors in the block into a one-line DataError; also panics of its Rust, which are no Exception."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {_brief(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: the library has failed: {_brief(error)}") from error


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def short(text: str) -> str:
    """A text for a message, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
