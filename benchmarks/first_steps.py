"""A process that makes one training step of a `RunConfig` kept as JSON and prints when each phase of it ended, as JSON.

    python -m benchmarks.first_steps RUN.json

It does what `medcg train` does until then, but for the workdir; weights are random. XLA's flags are those that
`medcg bench` has put in the environment.
"""

import json
import sys
import time
from pathlib import Path


def first_step(kept: Path) -> dict[str, float]:
    """Unix time at which each phase ended: "imports", "data" (rows encoded), "compiled", "first_step"."""
    from medcg_jax.config_file import from_config_dict

    run = from_config_dict(json.loads(kept.read_text()))
    from medcg_jax.platform import keep_freed_memory

    keep_freed_memory()
    from medcg_jax.bench.rows import open_rows, training_batch
    from medcg_jax.bench.steps import Port

    marks = {"imports": time.time()}
    rows = open_rows(run)
    batch = training_batch(rows)
    marks["data"] = time.time()
    port = Port(rows.setup.model, rows.setup.mesh, run.train, run.model, loss_fn=rows.setup.loss)
    port.compile(batch)
    marks["compiled"] = time.time()
    port.seconds(1)
    return marks | {"first_step": time.time()}


if __name__ == "__main__":
    print(json.dumps(first_step(Path(sys.argv[1]))))
