"""The port's evaluation as a benchmark runs it: test records in, predictions out, as `medcg eval` makes them."""

from medcg_jax.data.encoding import Encoded
from medcg_jax.eval.letters import evaluate, make_evaluator
from medcg_jax.families import build
from medcg_jax.plan import flops
from medcg_jax.train.setup import Setup

# No token is the end, so that random weights generate as long as they are asked to.
NO_END = -1


class Evaluation:
    """Letters of all rows of `encoded` (`encode_eval`'s), and `num_new` generated tokens of each; a step is all rows.

    params: of the whole model, on the setup's mesh. `predictions` are the last step's.
    """

    def __init__(self, setup: Setup, graphdef, params, encoded: Encoded, *, num_new: int):
        self.setup, self.params, self.encoded = setup, params, encoded
        self.evaluator = make_evaluator(
            setup.mesh, graphdef, build.shardings(setup.model, setup.mesh), eos_id=NO_END, max_new_tokens=num_new,
            generate=num_new > 0,
        )  # fmt: skip

    def run(self, steps: int) -> None:
        setup = self.setup
        for _ in range(steps):
            self.predictions = evaluate(
                self.evaluator, self.params, self.encoded, setup.tokenizer, batch_size=setup.run.eval.batch_size
            )


def needed_flops(setup: Setup, encoded: Encoded, *, num_new: int) -> float:
    """FLOPs that the model needs for all rows at their real lengths: a forward pass with one position's logits, and
    `num_new` - 1 further tokens."""
    return sum(
        flops.evaluation(setup.model, num_rows=1, length=int(length), num_new=num_new)
        for length in encoded.arrays["length"]
    )
