"""One process of a tiny run: `python one_of_processes.py WORKDIR STEPS INDEX COUNT PORT`; see `kill_processes.py`.

Leaves in WORKDIR, from the first process: `final` (the state's bytes), `predictions` (the logits of a batch that was
not trained on, and the likeliest tokens), and from every process `batches.INDEX` (each batch that it drew: step and
records of its rows). Saves after every step. Ends with 0, or 75 where it was told to stop.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from micro import setup
from train_toys import ROWS, TRAIN, Stream, batch

from medcg_jax import processes
from medcg_jax.cluster import Cluster
from medcg_jax.config import ConfigError, Interrupted, MeshConfig, RunError, replace
from medcg_jax.families import build
from medcg_jax.mesh import put_batch
from medcg_jax.train.log import enable_cache
from medcg_jax.train.loop import RunSpec, fit
from medcg_jax.train.optim import hparams_from
from medcg_jax.train.preempt import sigterm_saves

UNSEEN = 10_000


def own_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    own = ROWS // jax.process_count()
    return {key: value[jax.process_index() * own :][:own] for key, value in rows.items()}


class OwnRows(Stream):
    """The rows of this process; every batch is written down."""

    def __init__(self, position: int, log: Path):
        super().__init__(position, seed=int(os.environ.get("TOY_DATA_SEED", "0")))
        self._log = log.open("a")

    def __next__(self):
        rows, records = super().__next__()
        own = ROWS // jax.process_count()
        records = records[jax.process_index() * own :][:own]
        self._log.write(json.dumps([self.position, records]) + "\n")
        self._log.flush()
        return own_rows(rows), records


def whole_bytes(tree) -> bytes:
    """The bytes of all arrays, gathered from all processes."""
    return b"".join(multihost_utils.process_allgather(x, tiled=True).tobytes() for x in jax.tree.leaves(tree))


def main(workdir: Path, steps: int, index: int, count: int, port: int) -> int:
    enable_cache(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    if count > 1:
        processes.start(Cluster("the test", f"127.0.0.1:{port}", count, index))
    with sigterm_saves():
        program, trainable, frozen = setup(MeshConfig(data=-1, fsdp=min(2, jax.device_count())))
        cell = RunSpec(
            "run", hparams_from(replace(TRAIN, steps=steps), 1), lambda at: OwnRows(at, workdir / f"batches.{index}"),
            metrics=workdir / "metrics.jsonl", checkpoints=workdir / "checkpoints", config={"steps": steps},
        )  # fmt: skip
        state, result = fit(
            program, trainable, frozen, cell, log_every_steps=3, checkpoint_every_steps=1, keep_every_steps=10
        )
    unseen = put_batch(own_rows(batch(UNSEEN)), program.batch_sharding)
    with jax.set_mesh(program.mesh):
        found = jax.jit(lambda params, rows: nnx.merge(program.graphdef, params)(rows))(
            build.join(state.params, frozen), unseen
        )
    final, found = whole_bytes(state), multihost_utils.process_allgather(found, tiled=True)
    if index == 0:
        (workdir / "predictions").write_bytes(found.tobytes() + found.argmax(-1).astype(np.int32).tobytes())
        (workdir / "final.part").write_bytes(final)
        os.replace(workdir / "final.part", workdir / "final")
        print(f"done; skipped {result.skipped_checkpoints}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
    except Interrupted as error:
        print(error, flush=True)
        sys.exit(os.EX_TEMPFAIL)
    except ConfigError as error:
        print(error, flush=True)
        sys.exit(2)
    except RunError as error:
        print(error, flush=True)
        sys.exit(1)
