"""Writes benchmarks/README.md from what is measured and recorded here: `python -m benchmarks`.

A measurement is an entry of `measured.json`: what, the command that shows it, the figure, and optionally `record`, a JSON
file in this folder with all figures, the date and the versions of the run.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEAD = """# What was measured, and the command that shows it

Written by `python -m benchmarks` from `measured.json`; scripts and records are files of this folder, which is not
installed. Run a command from the checkout. Times are of two CPU cores unless a machine is named.

| what | command | figure | record |
|---|---|---|---|
"""


def table(measured: list[dict]) -> str:
    """The page.

    Raises:
      ValueError: no measurement names a script or record of this folder, or a measurement names a missing record.
    """
    commands = " ".join(entry["command"] for entry in measured)
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"__main__", "records", "build_tokenizers"}
    records = {path.name for path in FOLDER.glob("*.json")} - {"measured.json"}
    unused = [f"{name}.py" for name in sorted(scripts) if f"benchmarks.{name}" not in commands]
    named = {entry["record"] for entry in measured if "record" in entry}
    if unused or named != records:
        raise ValueError(f"not in measured.json: {', '.join(unused + sorted(records - named))}; "
                         f"not here: {', '.join(sorted(named - records))}")  # fmt: skip
    rows = (
        [entry["what"], entry["command"], entry["figure"], record_text(entry.get("record", ""))] for entry in measured
    )
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def record_text(name: str) -> str:
    """[name](name), date, versions of a record."""
    if not name:
        return ""
    record = json.loads((FOLDER / name).read_text())
    last = record[-1] if isinstance(record, list) else record
    last = last.get("runs", [last])[-1]
    versions = ", ".join(
        f"{key} {last['versions'][key]}" for key in ("jax", "libtpu", "torch") if key in last["versions"]
    )
    return f"[{name}]({name}), {last['date'][:10]}{f', {versions}' if versions else ''}"


def main() -> int:
    page = table(json.loads((FOLDER / "measured.json").read_text()))
    (FOLDER / "README.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
