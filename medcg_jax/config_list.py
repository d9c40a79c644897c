"""Config files by name: where they lie, and, without running them, what each is for and which arguments it takes.

A file that takes an argument (`FILE.py:ARG`) says so once, by `ARGS = {argument: what it does}`; where a second one may
follow a comma, by `SECOND_ARGS` in the same form. Both are plain dicts, or those of a file beside it (`ARGS = paper.ARGS`).
The argument that is taken where none is given is the default of `get_config(arg)`.
"""

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medcg_jax.config import ConfigError

FOLDER = "configs"
NAMES = ("ARGS", "SECOND_ARGS")
MOST_ARGS = 6


@dataclass(frozen=True)
class ConfigFile:
    """A config file.

    summary: the first line of its docstring. args, second_args: argument -> what it does. default: the argument that is
      taken where none is given; "" where it takes none.
    """

    path: Path
    summary: str
    default: str
    args: Mapping[str, str]
    second_args: Mapping[str, str]

    @property
    def form(self) -> str:
        """How it is named with its arguments: "configs/phantom.py[:quick|study]"; ARG: as of `paper.py`, one of many."""
        first = "ARG" if self.has_many else "|".join(self.args)
        second = f"[,{'|'.join(self.second_args)}]" if self.second_args else ""
        return f"{FOLDER}/{self.path.name}" + (f"[:{first}{second}]" if self.args else "")

    @property
    def has_many(self) -> bool:
        """Whether its arguments are too many for a line."""
        return len(self.args) > MOST_ARGS


def project_folder() -> Path:
    """The folder of the project's config files: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    return next((path for path in (package / FOLDER, package.parent / FOLDER) if path.is_dir()), package / FOLDER)


def find(name: str) -> Path:
    """The file of a `--config` without its argument: a path, or, from any folder, NAME.py of the project's own files,
    with or without `configs/` before it. A file in the working directory comes first.

    Raises:
      ConfigError: there is none; the message has close names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path(FOLDER)) and (packaged := project_folder() / path.name).is_file():
        return packaged
    known = [file.name for file in project_files()]
    close = difflib.get_close_matches(f"{path.name.removesuffix('.py')}.py", known, n=1)
    hint = f"did you mean {FOLDER}/{close[0]}? " if close else ""
    raise ConfigError(f"--config={name}: there is no such file; {hint}`medcg config` lists the project's own")


def project_files() -> list[Path]:
    """The project's config files, sorted; files that start with _ are parts of others."""
    return sorted(path for path in project_folder().glob("*.py") if not path.name.startswith("_"))


def read(path: Path) -> ConfigFile:
    """What a config file says of itself, without running it.

    Raises:
      ConfigError: it cannot be read or is no Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    values = {
        target.id: _read_args(node.value, path)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in NAMES
    }
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    defaults = [
        default.value
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "get_config"
        for default in node.args.defaults
        if isinstance(default, ast.Constant)
    ]
    return ConfigFile(path, summary, (*defaults, "")[0], *(values.get(name, {}) for name in NAMES))


def _read_args(node: ast.expr, path: Path) -> dict[str, str]:
    """The dict that an expression of a config file gives: a plain one, or `other.NAME` of `other.py` beside it."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        other = ast.parse((path.parent / f"{node.value.id}.py").read_text(encoding="utf-8"))
        for entry in other.body:
            if isinstance(entry, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == node.attr for t in entry.targets
            ):
                return ast.literal_eval(entry.value)
    return ast.literal_eval(node)


def check_arg(name: str, arg: str, args: Mapping[str, str], second_args: Mapping[str, str] = {}) -> None:
    """Raises ConfigError if a config file that has these arguments does not take `arg`. name: the file's."""
    first, comma, second = arg.partition(",")
    for value, choices in ((first, args), (second, second_args)) if comma else ((first, args),):
        if value not in choices:
            close = difflib.get_close_matches(value, choices, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            accepted = f"one of {', '.join(args)}"
            accepted += f"; behind a comma one of {', '.join(second_args)}" if second_args else ""
            raise ConfigError(f"--config={name}:{arg}: {hint}expected {accepted}")


def listing() -> list[str]:
    """Lines about the project's config files: each one's name with its arguments, its first line, what arguments do."""
    lines, backbones, second = [], {}, {}
    for file in map(read, project_files()):
        lines += [file.form, f"    {file.summary}"]
        if file.has_many:  # the same in many files: they are told once
            lines.append(f"    {file.default} unless another ARG is given")
            backbones |= file.args
            second |= file.second_args
        else:
            lines += _told(file.args, file.default)
    return [*lines, "ARG is one of", *_told(backbones), "behind a comma", *_told(second)]


def _told(args: Mapping[str, str], default: str = "") -> list[str]:
    return [
        f"    {arg:20} {text}{' (unless another is given)' if arg == default else ''}" for arg, text in args.items()
    ]
