"""Config files: `get_config` builds an ml_collections ConfigDict; with flags applied it becomes a checked RunConfig.

run = load("configs/phantom.py:quick", {"train.learning_rate": "1e-3"})
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from medcg_jax.config import ConfigError, RunConfig, marked, replace
from medcg_jax.config_checks import check, settings
from medcg_jax.config_list import check_arg, find
from medcg_jax.files import user_path


def to_config_dict(run: RunConfig) -> ConfigDict:
    """`run` as a locked ConfigDict, for a config file's `get_config` to return."""
    return ConfigDict(dataclasses.asdict(run)).lock()


def from_config_dict(config: Mapping, cls: type = RunConfig, path: str = "") -> RunConfig:
    """The frozen dataclass with the values of a ConfigDict, which must have every field with the right type.

    Raises:
      ConfigError: a key is unknown or missing, or a value has another type; the message names the key.
    """
    hints = typing.get_type_hints(cls)
    for key in config:
        if key not in hints:
            raise unknown_key(path + key, hints, path)
    values = {}
    for key, kind in hints.items():
        if key not in config:
            raise ConfigError(f"config.{path}{key} is missing")
        value = config[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping | ConfigDict):
                raise ConfigError(f"config.{path}{key}={value!r}: expected a section with keys")
            values[key] = from_config_dict(value, kind, f"{path}{key}.")
        else:
            values[key] = checked(value, kind, path + key)
    return cls(**values)


# Fields that every grid has recorded; other fields were added later.
ALWAYS_RECORDED = ("name", "model.name", "data.source", "data.root", "study.tables")


def check_recorded(config: Mapping, file: str | Path) -> None:
    """Raises ConfigError if a recorded configuration lacks one of `ALWAYS_RECORDED`, or a field has another type.

    config: JSON of a `RunConfig`. Unknown fields pass, since another version may have had them. file: its file, for the
      message.
    """
    for key in ALWAYS_RECORDED:
        section, _, name = key.rpartition(".")
        values = config.get(section, {}) if section else config
        if isinstance(values, Mapping) and name not in values:
            raise ConfigError(f"{file}: config.{key} is missing: expected the config.json of a grid's workdir")
    sections = [
        (name, kind) for name, kind in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)
    ]
    for section, cls in (("", RunConfig), *sections):
        values = config.get(section, {}) if section else config
        if not isinstance(values, Mapping):
            raise ConfigError(f"{file}: config.{section}={short(values)}: expected an object")
        for name, kind in typing.get_type_hints(cls).items():
            if name in values and not dataclasses.is_dataclass(kind):
                try:
                    checked(values[name], kind, f"{section}.{name}" if section else name)
                except ConfigError as error:
                    raise ConfigError(f"{file}: {error}") from None


def load(file: str, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The checked RunConfig of a config file, `PATH.py` or `PATH.py:arg`, with overrides `{"a.b": "value"}` applied.

    Raises:
      ConfigError: the file is missing or broken, or a key, type or value cannot be used.
    """
    path, _, arg = file.partition(":")
    return with_flags(from_config_dict(run_file(path, arg)), overrides or {})


def with_flags(run: RunConfig, flags: Mapping[str, str]) -> RunConfig:
    """`run` with the flags `{"a.b": "value"}` applied, checked.

    Raises:
      ConfigError: a key, type or value cannot be used.
    """
    config = ConfigDict(dataclasses.asdict(run))
    for key, text in flags.items():
        override(config, key, text)
    changed = with_homes(from_config_dict(config))
    check(changed)
    return changed


def with_homes(run: RunConfig) -> RunConfig:
    """`run` with ~ in every path replaced by the home folder. Raises ConfigError if there is none."""
    changes = {}
    for key in marked("path"):
        section, _, name = key.partition(".")
        value = getattr(getattr(run, section), name)
        changes[f"{section}__{name}"] = user_path(value, f"config.{key}")
    return replace(run, **changes)


def run_file(name: str, arg: str) -> ConfigDict:
    """What `get_config(arg)` of the file returns (`get_config()` if `arg` is empty). name: as of `config_list.find`."""
    path = find(name)
    spec = importlib.util.spec_from_file_location("medcg_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name}: expected a Python file ending in .py")
    module = importlib.util.module_from_spec(spec)
    folder = path.resolve().parent
    before = set(sys.modules)
    sys.path.insert(0, str(folder))  # config files may import one another
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config={name}: the file defines no get_config()")
        if arg and hasattr(module, "ARGS"):
            check_arg(name, arg, module.ARGS, getattr(module, "SECOND_ARGS", {}))
        elif arg and not inspect.signature(module.get_config).parameters:
            raise ConfigError(f"--config={name}:{arg}: expected {name} alone, the file takes no argument")
        config = module.get_config(arg) if arg else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # anything that the user's file raises
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"--config={name}{':' + arg if arg else ''}: {why}") from error
    finally:
        sys.path.remove(str(folder))
        forget(folder, set(sys.modules) - before)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={name}: get_config returned {type(config).__name__}; expected a ConfigDict")
    return config


def forget(folder: Path, names: set[str]) -> None:
    """Removes modules in `folder` from `sys.modules`, since another folder may have files of the same names."""
    tops = set()
    for name in {name.partition(".")[0] for name in names} & names - {"medcg_jax"}:
        file = Path(getattr(sys.modules[name], "__file__", None) or ".").resolve()
        if folder in (file.parent, file.parent.parent if file.name == "__init__.py" else None):
            tops.add(name)
    for name in names:
        if name.partition(".")[0] in tops:
            del sys.modules[name]


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `config.KEY` from the text of a flag, parsed as the field's type."""
    kind: type = RunConfig
    section, seen = config, ""
    *parents, last = key.split(".")
    for name in parents:
        hints = field_types(kind, seen)
        if name not in hints:
            raise unknown_key(seen + name, hints, seen)
        kind, section, seen = hints[name], section[name], f"{seen}{name}."
    hints = field_types(kind, seen)
    if last not in hints:
        raise unknown_key(key, hints, seen)
    if dataclasses.is_dataclass(hints[last]):
        raise ConfigError(f"config.{key} is a section; its keys are {', '.join(typing.get_type_hints(hints[last]))}")
    value = parse(text, hints[last], key)
    with section.ignore_type():  # a tuple may change its length, and a float may be given as 1
        section[last] = value


def field_types(kind: type, path: str) -> dict[str, type]:
    if not dataclasses.is_dataclass(kind):
        raise ConfigError(f"config.{path.rstrip('.')} is a value and has no keys below it")
    return typing.get_type_hints(kind)


def parse(text: str, kind: type, key: str):
    """The value of a flag's text: itself for str, comma-separated entries for tuples, else a Python literal."""
    if kind is str:
        return text
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and not text.strip().startswith(("(", "[")):
        return tuple(parse(item.strip(), args[0], key) for item in text.split(",") if item.strip())
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: nested too deep
        raise ConfigError(f"config.{key}={text[:200]}: expected {accepts(kind)}") from None
    return checked(value, kind, key)


def checked(value, kind: type, key: str):
    """`value` in its field's type (an int becomes a float, a list a tuple). Raises ConfigError for other types."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(checked(item, args[0], key) for item in value)
    if origin is dict and isinstance(value, Mapping | ConfigDict):
        return {checked(k, args[0], key): checked(v, args[1], key) for k, v in dict(value).items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"config.{key}={short(value)}: expected {accepts(kind)}")


def short(value, limit: int = 200) -> str:
    """A value for a message, at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def accepts(kind: type) -> str:
    if isinstance(kind, types.GenericAlias):
        inner = [
            accepts(arg) if typing.get_origin(arg) else arg.__name__ for arg in typing.get_args(kind) if arg is not ...
        ]
        if typing.get_origin(kind) is tuple:
            return f"a comma-separated list of {inner[0]}"
        return f"a dict of {inner[0]} to {inner[1]}"
    return {int: "an int", float: "a float", bool: "true or false", str: "a string"}[kind]


def unknown_key(key: str, known: Mapping[str, type], path: str) -> ConfigError:
    """The refusal of a field that does not exist, with fields of the same or a close name, of any section."""
    name = key.rsplit(".", 1)[-1]
    close = [f"{path}{match}" for match in difflib.get_close_matches(name, known, n=1)]
    close = close or close_fields(name)
    meant = " or ".join(f"config.{field}" for field in close)
    hint = f"did you mean {meant}?" if meant else f"known here: {', '.join(known)}"
    return ConfigError(f"config.{key} is unknown; {hint}")


def close_fields(name: str) -> list[str]:
    """Fields of any section whose last name is this one, or nearly: ["train.learning_rate", "base.learning_rate"]."""
    fields = [key for _, key, _ in settings(RunConfig())]
    matches = difflib.get_close_matches(name, {field.rpartition(".")[2] for field in fields}, n=1, cutoff=0.8)
    # A base is rarely meant.
    candidates = sorted(
        (field for field in fields if field.rpartition(".")[2] in matches), key=lambda f: f.startswith("base.")
    )
    return candidates[:3]
