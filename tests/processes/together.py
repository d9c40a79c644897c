"""One process of two with two devices each: what they say to one another, the rows they supply, what they score.

python together.py COORDINATOR N I
"""

import json
import sys
import time

import numpy as np

from medcg_jax import processes
from medcg_jax.cluster import Cluster
from medcg_jax.config import MeshConfig, RunError


def barriers(own: int) -> dict:
    """Process 1 comes late to one barrier, and not at all to another."""
    processes.REPORT_AFTER_S = 0.5
    if own == 1:
        time.sleep(2.0)
    processes.barrier("a meeting")
    found = {}
    if own == 0:
        try:
            processes.barrier("a meeting", timeout_s=1.0)
        except RunError as error:
            found["missed"] = str(error)
    processes.barrier("the other side", timeout_s=60)
    found["heard"] = [processes.broadcast("a number", lambda place=place: [7, place]) for place in range(3)]
    return found


def rows() -> dict:
    """For meshes of all kinds: whether every device has the rows of the global batch that the sharding gives it."""
    import jax

    from medcg_jax.mesh import batch_sharding, local_rows, local_shards, make_mesh, put_batch

    whole, found = np.arange(8 * 3).reshape(8, 3), {}
    devices = jax.devices()
    orders = {"in order": devices, "crossed": [devices[i] for i in (0, 2, 1, 3)]}
    for shape in ((4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4)):
        for order, placed in orders.items():
            mesh = make_mesh(MeshConfig(1, *shape), placed)
            own = local_rows(mesh, 8)
            made = put_batch({"x": whole[own]}, batch_sharding(mesh))["x"]
            right = all((np.asarray(s.data) == whole[s.index]).all() for s in made.addressable_shards)
            name = f"{shape} {order}"
            found[name] = {"right": right and made.shape == whole.shape, "parts": local_shards(mesh)}
    return found


def scores(count: int) -> list:
    """Predictions for so many records in batches of 4."""
    from eval_toys import TOKENIZER, encoded, model_on, records

    from medcg_jax.eval.letters import evaluate

    evaluator, _, params = model_on(MeshConfig(1, 2, 2, 1))
    found = evaluate(evaluator, params, encoded(records(count)), TOKENIZER, batch_size=4)
    return [[p.id, p.predicted, p.logprobs, p.generated] for p in found]


if __name__ == "__main__":
    coordinator, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    processes.start(Cluster("the test", coordinator, count, index))
    said = {"first": processes.is_first(), "name": processes.whoami(), **barriers(index), "rows": rows()}
    said["scores"] = {size: scores(size) for size in (7, 1)}
    print("SAID " + json.dumps(said))
    processes.finish()
