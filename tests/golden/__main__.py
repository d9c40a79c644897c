"""Compares this port with folders of arrays from original code: `python -m tests.golden FOLDER [FOLDER ...]`.

A folder has the form of `../shared/golden/minigpt_v2/variant_a` or `../shared/golden/next_chat/variant_a`; all sizes
are read from it. Prints a line for each part of the model. Exit status 0: all are equal within the tolerance; 1: some differ;
2: a folder of another form.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from medcg_jax.families.weights.files import WeightsError
from medcg_jax.parity.rows import Row, report
from tests.golden import minigpt_v2, next_chat

# File that a folder has -> the function that compares its arrays.
READERS: dict[str, Callable[[Path], list[Row]]] = {
    "expected.npz": minigpt_v2.golden_rows,
    "expected_base.npz": next_chat.golden_rows,
}


def compare_folder(folder: Path) -> dict:
    """The `parity.rows.report` of every array in the folder.

    Raises:
      WeightsError: the folder has another form, lacks an array, or has one that is compared with nothing.
    """
    reader = next((rows_of for file, rows_of in READERS.items() if (folder / file).is_file()), None)
    if reader is None:
        raise WeightsError(f"{folder} has none of {', '.join(READERS)}")
    try:
        return report(folder, reader(folder), [])
    except KeyError as error:
        raise WeightsError(f"{folder} lacks an array or a field: {error}") from error


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__.partition("\n")[0], file=sys.stderr)
        return 2
    try:
        return max(compare_folder(Path(folder))["exit_status"] for folder in argv)
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
