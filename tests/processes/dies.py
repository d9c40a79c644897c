"""One process of several that compute together without end, until one of them kills itself.

python dies.py COORDINATOR N I VICTIM WAY     WAY: killed, or raises
"""

import os
import signal
import sys

from medcg_jax import cli, processes
from medcg_jax.cluster import Cluster

SECONDS = 4.0


def work(args) -> dict:
    import jax
    import numpy as np

    from medcg_jax.mesh import batch_sharding, local_rows, make_mesh, put_batch

    mesh = make_mesh()
    total = jax.jit(lambda x: x.sum())
    for step in range(10**9):
        batch = {"x": np.full((jax.device_count(), 4), step)[local_rows(mesh, jax.device_count())]}
        assert total(put_batch(batch, batch_sharding(mesh))["x"]).item() == 4 * step * jax.device_count()
        if step == 20 and index == victim:
            if way == "raises":
                raise cli.ConfigError("data.root=/nowhere: it is not on this host")
            os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


if __name__ == "__main__":
    coordinator, count, index, victim, way = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    # Shorter than a run's, so that a test is short.
    processes.BEAT_S, processes.DEAD_AFTER_S = 0.5, SECONDS
    processes.start(Cluster("the test", coordinator, count, index))
    cli.parse = lambda argv: type("Arguments", (), {"verb": "train", "run": staticmethod(work), "json": ""})
    sys.exit(cli.main([]))
