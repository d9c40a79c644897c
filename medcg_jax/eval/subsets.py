"""`medcg eval`: a checkpoint's scores and predictions on the test records of subsets."""

from pathlib import Path

import jax

from medcg_jax.eval.run import evaluate, make_evaluator, summary, write_predictions
from medcg_jax.models.build import shardings
from medcg_jax.run_config import ConfigError, RunConfig
from medcg_jax.train.checkpoint import load_params
from medcg_jax.train.setup import Setup, open_setup, start_params


def evaluate_subsets(run: RunConfig, workdir: Path) -> dict:
    """Tests on `data.subsets` (empty: all) and leaves `predictions/SUBSET.jsonl` in `workdir`; prints a line for each.

    The parameters are those that `medcg train` left in `workdir`, else the model's checkpoint.
    Returns {"workdir", "subsets": {name: `run.summary`}}.

    Raises:
      ConfigError, DataError: as `open_setup`; or there are no parameters.
    """
    trained = workdir / "params"
    setup = open_setup(run, has_weights=trained.is_dir())
    graphdef, params = parameters(setup, trained)
    evaluator = make_evaluator(
        setup.mesh, graphdef, shardings(setup.model, setup.mesh), eos_id=setup.tokenizer.eos_id,
        max_new_tokens=run.eval.max_new_tokens, generate=run.eval.generate,
    )  # fmt: skip
    names = run.data.subsets or tuple(subset.name for subset in setup.source.subsets)
    found = {}
    for name in names:
        encoded = setup.encode_eval(setup.source.records(name, "test"))
        predictions = evaluate(evaluator, params, encoded, setup.tokenizer, batch_size=run.eval.batch_size)
        if jax.process_index() == 0:
            write_predictions(workdir / "predictions" / f"{name}.jsonl", predictions)
        found[name] = summary(predictions)
        print(line(name, found[name]), flush=True)
    return {"workdir": str(workdir), "subsets": found}


def parameters(setup: Setup, trained: Path):
    """(graphdef, params) of `trained` where it exists, else of the model's checkpoint.

    Raises:
      ConfigError: neither is there.
    """
    if trained.is_dir():
        return load_params(trained, setup.model, setup.mesh)[:2]
    if not setup.run.model.checkpoint:
        raise ConfigError(f"{trained} is missing and model.checkpoint is empty: a workdir of `medcg train` is accepted")
    return start_params(setup, seed=setup.run.train.seed)


def line(name: str, scores: dict) -> str:
    """A subset's scores for people."""
    if not scores["n"]:
        return f"{name}: no test records"
    text = f"{name}: {scores['correct']} of {scores['n']} right, {scores['accuracy']:.3f} "
    text += f"[{scores['ci_low']:.3f}, {scores['ci_high']:.3f}], probability of the letters {scores['letter_mass']:.3f}"
    if scores["unparsed_rate"] is not None:
        text += f"; generated {scores['generated_accuracy']:.3f}, unparsed {scores['unparsed_rate']:.3f}"
    return text
