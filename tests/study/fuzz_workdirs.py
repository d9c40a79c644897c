"""Broken files of a finished grid's workdir by the thousand: `medcg report` must write its page or refuse in one line.

    python -m tests.study.fuzz_workdirs COUNT SEED

One file of a small grid is touched at a time. A failure is whatever raises, a status other than 0 and 2, a refusal that
is not one line or names no file of the workdir, an answer that takes too long, a page with a character that no page may
hold, and scores that are other ones than the grid's and are taken. The same seed gives the same inputs.
"""

import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "data")]

from fuzz_mutations import JSON_CLASSES, mutated
from report_grids import quick, run, small_grid

from medcg_jax.study.report import escape
from medcg_jax.study.stats import grid_files

MAX_SECONDS = 30.0


def touched(path: Path, content: bytes, random: Random) -> bytes:
    """The file's bytes with mutations of one class; of JSON lines and CSV often those of one line."""
    where = random.choice(JSON_CLASSES)
    if path.suffix == ".json" or random.random() < 0.3:
        return mutated("json", where, content, random)
    lines = content.split(b"\n")
    place = random.randrange(len(lines))
    if path.suffix == ".csv" and random.random() < 0.5:
        cells = lines[place].split(b",")
        column = random.randrange(len(cells))
        others = (random.choice(cells), b"", b"1", b"-1", b"nan", b"../../x", b"\xe2\x80\xae")
        cells[column] = random.choice(others)
        lines[place] = b",".join(cells)
    elif random.random() < 0.2:
        lines.insert(place, random.choice(lines)) if random.random() < 0.5 else lines.pop(place)
    elif lines[place]:
        lines[place] = mutated("json", where, lines[place], random)
    return b"\n".join(lines)


def fault(workdir: Path, known: list[dict]) -> str:
    """What is wrong with a report of the workdir; "" where nothing is. known: rows of its results.csv as they were."""
    began = time.monotonic()
    try:
        status, said = run("report", str(workdir), "--format=md,tex")
    except Exception:
        return traceback.format_exc()
    seconds = time.monotonic() - began
    if seconds > MAX_SECONDS:
        return f"{seconds:.0f} s"
    if status == 2:
        lines = [line for line in said.splitlines() if line.startswith("medcg: ")]
        is_one = len(lines) == 1 and said.endswith(lines[0] + "\n")
        if not is_one or str(workdir) not in lines[0] or len(lines[0]) > 1000:
            return f"refused by {said[:2000]!r}"
    elif status:
        return f"status {status}: {said}"
    else:
        if grid_files.read_results(workdir) != known:
            return "other results were taken"
        for page in (workdir / "report").rglob("*.*"):
            text = page.read_text(encoding="utf-8")
            if escape.plain(text) != text:
                return f"{page.name} holds characters that it may not"
    return ""


def fuzz(count: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """(number of inputs taken and refused, by file's kind; what failed)."""
    clean = small_grid(folder / "clean")
    known = grid_files.read_results(clean)
    files = sorted(path.relative_to(clean) for path in clean.rglob("*") if path.is_file())
    kinds = sorted({path.parts[0] for path in files})
    seen: Counter = Counter()
    failures: list[str] = []
    with quick():
        for index in range(count):
            random = Random(f"{seed}/{index}")
            kind = kinds[index % len(kinds)]
            path = random.choice([file for file in files if file.parts[0] == kind])
            workdir = folder / "w"
            shutil.copytree(clean, workdir)
            (workdir / path).write_bytes(touched(path, (workdir / path).read_bytes(), random))
            what = fault(workdir, known)
            if what:
                failures.append(f"{seed}/{index} {path}: {what}")
            seen[kind, "failed" if what else "taken" if (workdir / "report").exists() else "refused"] += 1
            shutil.rmtree(workdir)
    return seen, failures


def main() -> int:
    count, seed = (int(word) for word in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        seen, failures = fuzz(count, seed, Path(folder))
    for key, number in sorted(seen.items()):
        print(*key, number)
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
