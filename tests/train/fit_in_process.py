"""A fit in a process of its own: `python fit_in_process.py WORKDIR KILL_AT`; ends with the final parameters' bytes.

KILL_AT: the process kills itself, with nothing written down, when it draws this batch; -1: never.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from micro import setup
from train_toys import TRAIN, Stream

from medcg_jax.config import replace
from medcg_jax.train.goodput import FILE, Goodput, read_starts
from medcg_jax.train.loop import RunSpec, fit
from medcg_jax.train.optim import hparams_from


def main(workdir: Path, kill_at: int) -> None:
    def kill(position, batch):
        if position == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    program, trainable, frozen = setup()
    cell = RunSpec(
        "run", hparams_from(replace(TRAIN, steps=14), 1), lambda position: Stream(position, change=kill),
        metrics=workdir / "metrics" / "run.jsonl", checkpoints=workdir / "checkpoints", config={"steps": (14,)},
    )  # fmt: skip
    # Every step is written down at once, so that a kill loses none.
    with Goodput(workdir / FILE, earlier=read_starts(workdir / FILE), write_every_s=0.0) as clock:
        state, _ = fit(program, trainable, frozen, cell, log_every_steps=4, checkpoint_every_steps=3, goodput=clock)
    (workdir / "final").write_bytes(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
