"""The losses of the steps that follow a checkpoint, kept beside it; the first loss after a restore is compared with it.

Digests show that the files are those that were written. This shows that they make the same run again: the parameters
of that step, the batch that came next, and the program.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax

from medcg_jax.config import RunError

LOSSES_FILE = "losses.jsonl"
# Largest relative difference under the same conditions: none was ever measured on a CPU (kill_processes.py).
SAME_TOLERANCE = 1e-5
# On another mesh or number of processes sums are taken in another order, and a GPU may choose other kernels at every
# start: up to 3e-7 was measured in float32 (kill_processes.py); bfloat16 has three digits.
OTHER_TOLERANCE = 1e-3


class LossDiffers(RunError):
    """The first loss after a restore is not the one that was logged; the message is one line with both."""


class LossCheck:
    """The losses kept in `directory`. All processes read it, the first one writes it.

    conditions: JSON of what may change the last digits: devices, mesh, processes, versions.
    """

    def __init__(self, directory: Path, conditions: dict, say: Callable[[str], None]):
        self._path = directory / LOSSES_FILE
        self._conditions, self._say = json.loads(json.dumps(conditions)), say
        self._saved: set[int] = set()
        self._restored: int | None = None
        self._expected: dict | None = None

    @property
    def due(self) -> bool:
        """Whether the next loss is to be compared."""
        return self._expected is not None

    def restored(self, step: int) -> None:
        """The run goes on from the checkpoint of this step."""
        self._saved, self._expected = {step}, None
        for line in _read(self._path):
            if line["step"] == step + 1:
                self._expected = line  # the last one: its checkpoint may have been written more than once

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step."""
        self._saved.add(step)

    def look(self, name: str, step: int, loss: float) -> None:
        """Takes the loss of a step of the run `name`.

        Raises:
          LossDiffers: it is the first after a restore, and not the one that was logged.
        """
        expected, self._expected = self._expected, None
        if expected is not None:
            self._compare(name, step, loss, expected)
        if step - 1 in self._saved:
            self._saved = {saved for saved in self._saved if saved >= step}
            if jax.process_index() == 0:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "loss": float(loss), "of": self._conditions}) + "\n")

    def _compare(self, name: str, step: int, loss: float, expected: dict) -> None:
        same = expected["of"] == self._conditions and jax.default_backend() != "gpu"
        tolerance = SAME_TOLERANCE if same else OTHER_TOLERANCE
        found, logged = float(loss), expected["loss"]
        difference = abs(found - logged) / max(abs(logged), 1e-12)
        if not difference <= tolerance:
            raise LossDiffers(
                f"{name}: after the restore step {step} has loss {found:.9g}, and {logged:.9g} was logged for it; "
                f"{tolerance:g} of it may differ {'on the same devices' if same else 'on other devices'}: parameters, "
                "data or program are not those of the run that was interrupted"
            )
        if same and found != logged:
            self._say(f"{name}: step {step} has loss {found!r} after the restore, and had {logged!r}: not bit for bit")


def _read(path: Path) -> list[dict]:
    """The lines, without one that a kill cut off."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and math.isfinite(line.get("loss", math.nan)):
            found.append(line)
    return found
