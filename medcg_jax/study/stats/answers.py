"""The answers of a grid's cells as columns. Each file of `predictions/` and `controls/` is read once."""

import sys
from pathlib import Path

import pandas as pd

from medcg_jax.data.records import LETTERS
from medcg_jax.eval.generation import parse_answer
from medcg_jax.eval.predictions import prediction_lines

# The control of an answer to an unchanged question.
PLAIN = ""


class Answers:
    """The answers of a workdir's cells, kept as a frame for each file.

    Columns of a frame, in the order of the file:
      control: `PLAIN`, or how the question was changed (`controls`). subset, id: of the record.
      options: number of offered letters. texts: the options, in letter order.
      answer, predicted: letters. right: whether they are equal.
      read: the letter in the generated answer, "" where it has none; None where nothing was generated.
      group: patient or lesion of the record; "" where it is not known.
      A, B, ...: log-probability of each letter in nats; NaN where it was not offered or not recorded.
    """

    def __init__(self, workdir: str | Path):
        self.workdir = Path(workdir)
        self._frames: dict[Path, pd.DataFrame] = {}

    def path(self, cell: str, folder: str = "predictions") -> Path:
        return self.workdir / folder / f"{cell}.jsonl"

    def frame(self, cell: str, folder: str = "predictions") -> pd.DataFrame:
        """One cell's answers to unchanged questions, or (folder "controls") to changed ones.

        Raises:
          FileError: the file cannot be read, or a line is no prediction.
        """
        path = self.path(cell, folder)
        if path not in self._frames:
            self._frames[path] = _read(path)
        return self._frames[path]

    def correct_by_id(self, cell: str, subset: str) -> dict[str, bool]:
        """Record id -> whether the likeliest letter was the answer, for one test subset of a cell."""
        frame = self.frame(cell)
        frame = frame[frame["subset"] == subset]
        return dict(zip(frame["id"], frame["right"].tolist(), strict=True))

    def patients(self, cell: str, subset: str) -> dict[str, str]:
        """Record id -> patient or lesion, of the records of one test subset where it is known."""
        frame = self.frame(cell)
        frame = frame[(frame["subset"] == subset) & (frame["group"] != "")]
        return dict(zip(frame["id"], frame["group"], strict=True))


def _read(path: Path) -> pd.DataFrame:
    names = ("control", "subset", "id", "options", "texts", "answer", "predicted", "right", "read", "group")
    columns: dict[str, list] = {name: [] for name in names}
    logprobs: list[dict[str, float]] = []
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}  # the same options return in many records
    for line in prediction_lines(path):
        generated, texts = line["generated"], tuple(line["options"])
        values = (
            sys.intern(line.get("control", PLAIN)),
            sys.intern(line["subset"]),
            sys.intern(line["id"]),
            len(texts),
            seen.setdefault(texts, texts),
            line["answer"],
            line["predicted"],
            line["predicted"] == line["answer"],
            None if generated is None else parse_answer(generated, line["options"]),
            sys.intern(line.get("group", "")),
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        logprobs.append(dict(zip(LETTERS, line["logprobs"] or (), strict=False)))
    frame = pd.DataFrame(columns, dtype=object).astype({"options": int, "right": bool})
    letters = list(LETTERS[: max(map(len, logprobs), default=0)])
    return frame.join(pd.DataFrame(logprobs, index=frame.index, columns=letters, dtype=float))
