"""Every row of `shared/cases/README.md`, run as the row says: one line each, and status 1 where one is not as it should be.

    python -m tests.cases [ROW ...]

Small inputs lie in `shared/cases`; those that a row describes alone are made here.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
for folder in ("", "study", "weights", "data", "cases"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))

from harness import SHARED  # noqa: E402


def rows() -> dict:
    """Row -> the function that runs it."""
    import case_checkpoints
    import case_images
    import case_processes
    import case_trees
    import case_workdirs

    modules = (case_checkpoints, case_images, case_trees, case_workdirs, case_processes)
    return {name: run for module in modules for name, run in module.ROWS.items()}


def listed() -> list[str]:
    """The rows of the README, in its order."""
    lines = (SHARED / "cases" / "README.md").read_text("utf-8").splitlines()
    return [line.split("`")[1] for line in lines if line.startswith("| `")]


def main(names: list[str]) -> int:
    known, failures = rows(), []
    wanted = names or listed()
    for name in wanted:
        folder, began = Path(tempfile.mkdtemp(prefix="case-")), time.monotonic()
        try:
            line = known[name](folder)
            word = "right"
        except Exception as error:  # one row that cannot be run does not hide the others
            failures.append(name)
            word, line = (
                "WRONG",
                f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error),
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        shown = " ".join(str(line).replace(str(folder), "").split())
        print(f"{word}  {name:34} {time.monotonic() - began:5.1f} s  {shown[:200]}", flush=True)
    print(f"{len(wanted) - len(failures)} of {len(wanted)} rows are as they should be")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
