"""What stands on the terminal beside a result: durations in words, and how much is shown (`--quiet`, `--verbose`)."""

from collections.abc import Iterable

QUIET, PLAIN, VERBOSE = range(3)
_shown = PLAIN


def show(amount: int) -> None:
    """Sets for this process how much is shown: results and warnings alone (`QUIET`), progress too (`PLAIN`), or also
    what libraries and compilers say (`VERBOSE`)."""
    global _shown
    _shown = amount


def shows_progress() -> bool:
    return _shown > QUIET


def shows_details() -> bool:
    return _shown == VERBOSE


def install(extra: str) -> str:
    """The command that installs an extra of the project, which no package index has."""
    return f"`pip install '.[{extra}]'` in the project's folder"


def duration(seconds: float) -> str:
    """Seconds for people: "35 s", "48 min", "9 h 31 min", "2 d 5 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return " ".join(f"{number} {unit}" for number, unit in ((minutes // 60, "h"), (minutes % 60, "min")) if number)
    return " ".join(f"{number} {unit}" for number, unit in ((hours // 24, "d"), (hours % 24, "h")) if number)


def bar(items: Iterable, total: int, name: str) -> Iterable:
    """The items, with a bar on a terminal that tells the time left; nothing is shown elsewhere, or with `QUIET`."""
    from tqdm import tqdm

    class Bar(tqdm):
        @property
        def format_dict(self):
            known = super().format_dict
            done, seconds = known["n"] - known["initial"], known["elapsed"]
            left = duration(seconds * (total - known["n"]) / done) + " left" if done else ""
            return known | {"left": left}

    shown = "{desc} {n_fmt}/{total_fmt} |{bar}| {left}"
    return Bar(items, total=total, desc=name, bar_format=shown, disable=None if shows_progress() else True)
