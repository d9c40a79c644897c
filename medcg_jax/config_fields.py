"""Every field of a configuration with its value, default, unit, limits and meaning, for `medcg config`.

The meanings are the comments above the fields of `config`, read from its source, so that readers of the code and of the
terminal have the same words.
"""

import dataclasses
import functools
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from medcg_jax.config import ABOVE_0, BELOW_1, RunConfig
from medcg_jax.config_checks import settings

_FIELD = re.compile(r"    (\w+): ")


@dataclass(frozen=True)
class FieldInfo:
    """A field of a `RunConfig`.

    key: its name, "train.batch_size". kind: its type in words. choices: allowed texts; (): any. limits: bounds in words;
      "": none. is_free: no result depends on it, but for last digits (`config.setting`).
    """

    key: str
    value: Any
    default: Any
    kind: str
    unit: str
    choices: tuple[str, ...]
    limits: str
    meaning: str
    is_free: bool

    def as_dict(self) -> dict[str, Any]:
        """The field as JSON values."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "is_free"
        }
        return json.loads(json.dumps(fields)) | {"changes_results": not self.is_free}

    def matches(self, word: str) -> bool:
        """Whether its name, meaning, unit or choices hold the word, in whatever case."""
        return word.casefold() in " ".join((self.key, self.meaning, self.unit, *self.choices)).casefold()


def fields_of(run: RunConfig) -> list[FieldInfo]:
    """Every field below the sections of a configuration, in their order."""
    defaults = {key: value for _, key, value in settings(RunConfig())}
    infos = []
    for field, key, value in settings(run):
        limits, cls = field.metadata, _section_type(key)
        infos.append(
            FieldInfo(
                key=key,
                value=value,
                default=defaults[key],
                kind=_kind(typing.get_type_hints(cls)[field.name]),
                unit=limits.get("unit", ""),
                choices=tuple(limits.get("choices") or ()),
                limits=_limits(limits),
                meaning=meanings(cls)[field.name],
                is_free=bool(limits.get("free")),
            )
        )
    return infos


def _section_type(key: str) -> type:
    section, dot, _ = key.partition(".")
    return typing.get_type_hints(RunConfig)[section] if dot else RunConfig


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """Field of a dataclass -> the comment right above it, on one line; "" where there is none."""
    meanings, comment = {}, []
    for line in inspect.getsource(cls).splitlines():
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # ").strip())
            continue
        if match := _FIELD.match(line):
            meanings[match[1]] = " ".join(comment)
        comment = []
    return meanings


def _kind(hint: Any) -> str:
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    arguments = [arg for arg in typing.get_args(hint) if arg is not ...]
    if typing.get_origin(hint) is tuple:
        return f"list of {_kind(arguments[0])}s"
    if typing.get_origin(hint) is dict:
        return f"dict of {_kind(arguments[1])} by {_kind(arguments[0])}"
    return names[hint]


def _limits(limits: typing.Mapping[str, Any]) -> str:
    least, most = limits.get("least"), limits.get("most")
    if least is None:
        return ""
    low = "above 0" if least == ABOVE_0 else f"{least:,}"
    # Bounds that only keep a number within what a device can hold tell nobody anything.
    if most == BELOW_1:
        return f"{low} to below 1"
    return f"{low} to {most:,}" if most <= 10**6 else f"{low} and more" if least != ABOVE_0 else low


def lines_of(infos: list[FieldInfo], width: int) -> Iterator[str]:
    """The fields for people, each as `key = value`, then what is known of it, wrapped at `width` columns."""
    for info in infos:
        value = f"{info.key} = {shown(info.value)}"
        notes = [f"default {shown(info.default)}"] if info.value != info.default else []
        notes += [f"{info.kind}, {info.unit}" if info.unit else info.kind]
        notes += [f"one of {', '.join(shown(choice) for choice in info.choices)}"] if info.choices else []
        notes += [info.limits] if info.limits else []
        notes += ["no result depends on it" if info.is_free else "results depend on it"]
        yield from textwrap.wrap(value, width, subsequent_indent="        ", break_long_words=False)
        for text in (info.meaning, f"[{'; '.join(notes)}]"):
            yield from textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")


def shown(value: Any) -> str:
    """A value as a flag takes it, `--config.KEY=VALUE`; in quotes where it has spaces."""
    if isinstance(value, tuple):
        return ", ".join(map(shown, value)) or "()"
    if isinstance(value, dict):
        return repr(value)
    return '""' if value == "" else str(value)
