"""What products in 8 bits change, on the phantom world: logits, gradients, and the losses of a training from nothing.

    python -m benchmarks.matmul_accuracy [--config=configs/phantom.py] [--steps=200] [--json=FILE]

Every kind starts from the same weights and has the same batches: float32, bfloat16, and each of `nn.matmul.KINDS` with
activations in bfloat16. Differences are relative to float32's, in the Euclidean norm.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medcg_jax.bench.steps import about_here
from medcg_jax.config import TRAINABLE, ConfigError, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.records import concat
from medcg_jax.families.build import abstract, join, shardings, split_trainable
from medcg_jax.files import write_whole
from medcg_jax.mesh import put_batch
from medcg_jax.nn.matmul import KINDS
from medcg_jax.train.optim import hparams_from, make_optimizer
from medcg_jax.train.setup import model_config, open_setup, start_params, with_small_tokenizer
from medcg_jax.train.step import make_step

# Name -> what is set of the model.
RUNS = {"float32": {"model__compute_dtype": "float32"}, "bfloat16": {"model__compute_dtype": "bfloat16"}} | {
    kind: {"model__compute_dtype": "bfloat16", "model__matmul": kind} for kind in KINDS
}
# Steps at the end whose losses are averaged.
TAIL = 20


def matmul_accuracy(run: RunConfig, *, num_steps: int = 200, runs: dict[str, dict] = RUNS) -> dict:
    """Of every run of `runs`: {"logits", "gradient"}, relative differences at the start and after the training;
    "losses" of the steps, and "loss", the mean of the last `TAIL`.

    The training is that of a base (all parts, `run.base`'s recipe, `num_steps`) over rows of the first two subsets.

    Raises:
      ConfigError, DataError: as `open_setup`; or qwix is not installed.
    """
    run = replace(run, model__compute_dtype="float32", model__matmul="")
    setup = open_setup(with_small_tokenizer(run), has_weights=True)
    encoded = setup.encode(concat([setup.source.records(s.name, "train") for s in setup.source.subsets[:2]]))
    config = dataclasses.replace(run.base, steps=num_steps)
    _, start = start_params(setup, seed=config.seed)
    places, found, exact, params = shardings(setup.model, setup.mesh), {}, None, [start]
    for name, changes in runs.items():
        mine = dataclasses.replace(setup, run=replace(run, **changes))
        mine = dataclasses.replace(mine, model=model_config(mine.run.model, mine.tokenizer))
        graphdef, _ = abstract(mine.model)
        trainable, frozen = split_trainable(start, TRAINABLE)
        program = make_step(
            setup.mesh, graphdef, *split_trainable(places, TRAINABLE), make_optimizer(config), loss_fn=mine.loss,
            compute_dtype=mine.run.model.compute_dtype,
        )  # fmt: skip
        state, losses, hparams = program.start(trainable), [], program.put_hparams(hparams_from(config, len(encoded)))
        batches = Batches(encoded, batch_size=config.batch_size, seed=config.seed, position=0)
        try:
            rows = put_batch(next(batches)[0], program.batch_sharding)
            for _ in range(num_steps):
                batch = put_batch(next(batches)[0], program.batch_sharding)
                state, metrics = program(state, frozen, hparams, batch)
                losses.append(metrics["loss"])
        finally:
            batches.close()
        losses = [round(float(loss), 4) for loss in jax.device_get(losses)]
        if exact is None:
            # The weights that all are compared with.
            params.append(join(state.params, frozen))
        looks = [_look(mine, graphdef, weights, rows) for weights in params]
        exact = exact or looks
        differences = [_relative(a, b) for a, b in zip(looks, exact, strict=True)]
        logits, gradient = zip(*differences, strict=True)
        found[name] = {"logits": logits, "gradient": gradient, "loss": float(np.mean(losses[-TAIL:])), "losses": losses}
    return {"num_steps": num_steps, "device": jax.devices()[0].device_kind, "runs": found}


def _look(setup, graphdef, params, rows):
    """(logits of the rows, gradient of their loss by the decoder's parameters), in float32."""

    @jax.jit
    def both(params, rows):
        cast = jax.tree.map(lambda w: w.astype(setup.model.compute_dtype), params)
        model = nnx.merge(graphdef, cast)
        logits = model(rows["tokens"], {"pixels": rows["pixels"]}, segment_ids=rows["segment_ids"])
        real = rows["segment_ids"][..., None] != 0

        def loss(decoder):
            part = {"decoder": decoder}
            return setup.loss(nnx.merge(graphdef, nnx.State({**cast.raw_mapping, **part})), rows)[0]

        gradient = jax.grad(loss)(cast["decoder"])
        return jnp.where(real, logits, 0), gradient

    with jax.set_mesh(setup.mesh):
        return jax.device_get(both(params, rows))


def _relative(found, exact) -> tuple[float, float]:
    def one(a, b) -> float:
        a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return tuple(one(a, b) for a, b in zip(found, exact, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/phantom.py", metavar="FILE.py[:arg]")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args(argv)
    try:
        found = matmul_accuracy(load(args.config, {}), num_steps=args.steps)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"relative difference from float32, with the first weights and with those of {args.steps} steps in float32;")
    print(f"mean loss of the last {TAIL} steps of its own training")
    print(f"{'':10}{'logits':>18}{'gradient':>18}{'loss':>10}")
    for name, one in found["runs"].items():
        pairs = ["{:.4f} {:.4f}".format(*one[key]) for key in ("logits", "gradient")]
        print(f"{name:10}{pairs[0]:>18}{pairs[1]:>18}{one['loss']:10.4f}")
    if args.json:
        here = about_here()
        write_whole(Path(args.json), json.dumps({k: here[k] for k in ("date", "versions")} | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
