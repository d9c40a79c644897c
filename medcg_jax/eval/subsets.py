"""Subsets tested with one set of parameters, choice questions and questions about boxes alike; and `medcg eval`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from medcg_jax.config import ConfigError, RunConfig, trains_masks
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import eval_batches, rounds
from medcg_jax.data.sources import subset_names
from medcg_jax.eval import box_answers, locate, run
from medcg_jax.eval.again import Asker, evaluate_again, make_asker
from medcg_jax.eval.box_answers import BoxAnswer
from medcg_jax.eval.choice import letter_logits
from medcg_jax.eval.run import Evaluator, Prediction
from medcg_jax.families.build import shardings
from medcg_jax.mesh import batch_sharding, check_batch, own_rows, put_batch, replicated
from medcg_jax.train.checkpoint import load_params
from medcg_jax.train.preempt import sigterm_saves
from medcg_jax.train.sanity import check_sees, has_closed_gates
from medcg_jax.train.setup import Setup, open_setup, start_params


class Tester:
    """Tests one setup's model on encoded test records of either kind, each of which is compiled when first met.

    sees: whether it is known that the model sees its images; else that is looked at first (`train.sanity`).
    """

    def __init__(self, setup: Setup, graphdef: nnx.GraphDef, *, sees: bool = False):
        self._setup, self._graphdef, self._sees = setup, graphdef, sees
        self._shardings = shardings(setup.model, setup.mesh)
        self._evaluator: Evaluator | None = None
        self._asker: Asker | None = None
        self._locator: Callable | None = None

    def __call__(self, params, encoded: Encoded) -> list[Prediction] | list[BoxAnswer]:
        """An answer for every row. params: of the whole model, on the setup's mesh.

        Raises:
          BlindModel: the model does not see images.
          NonFiniteScores: the parameters are no use.
        """
        setup, config = self._setup, self._setup.run.eval
        if encoded.asked:
            self._look(params, encoded, self._letter_logits)
            if self._locator is None:
                self._locator = locate.make_locator(
                    setup.mesh, self._graphdef, self._shardings, eos_id=setup.tokenizer.eos_id,
                    max_new_tokens=config.max_box_tokens, masks=trains_masks(setup.run.model),
                )  # fmt: skip
            return locate.locate(
                self._locator, setup.mesh, params, encoded, setup.tokenizer, batch_size=config.batch_size
            )
        if self._evaluator is None:
            self._evaluator = run.make_evaluator(setup.mesh, self._graphdef, self._shardings, **self._answers)
        self._look(params, encoded, self._evaluator)
        return run.evaluate(self._evaluator, params, encoded, setup.tokenizer, batch_size=config.batch_size)

    def again(
        self, params, encoded: Encoded, again: Mapping[str, Encoded]
    ) -> tuple[list[Prediction], dict[str, list[Prediction]]]:
        """Predictions of choice questions, and those of the controls in which the same images are asked about again.

        Where each image is asked about once more alone ("shuffled_images"), the program of the plain test asks: it need
        not be compiled anew, and the plain predictions are the bytes that they are without a control.

        Raises:
          BlindModel, NonFiniteScores: as of a call.
        """
        setup = self._setup
        if again.keys() == {"shuffled_images"}:
            plain, other = self(params, encoded), self(params, with_images_of(again["shuffled_images"], encoded))
            return plain, {"shuffled_images": [dataclasses.replace(one, generated=None) for one in other]}
        if self._asker is None:
            self._asker = make_asker(setup.mesh, self._graphdef, self._shardings, **self._answers)
        self._look(params, encoded, self._asker.score, again)
        return evaluate_again(
            self._asker, params, encoded, again, setup.tokenizer, batch_size=setup.run.eval.batch_size,
            image_token_id=setup.model.image_token_id,
        )  # fmt: skip

    def _look(self, params, encoded: Encoded, score: Callable, again: Mapping[str, Encoded] | None = None) -> None:
        """Raises BlindModel where other pixels change nothing of what `score` gives; once for all tests.

        score: (params, the first batch of the test) -> float32[B, K], and what is not looked at.
        """
        setup, size = self._setup, self._setup.run.eval.batch_size
        if self._sees or not len(encoded) or has_closed_gates(params):
            return
        check_batch(setup.mesh, size, "eval.batch_size")
        rows, more = own_rows(setup.mesh, size), {}
        if again is None:
            batch, _ = next(eval_batches(encoded, size, rows=rows))
        else:
            image = setup.model.image_token_id
            first = next(rounds(encoded, list(again.values()), size, image_token_id=image, rows=rows))
            batch, more = first.before, {"asked": first.asked[0]}

        def scored(batch) -> list[np.ndarray]:
            return [jax.device_get(score(params, batch, **more)[0])]

        self._sees = check_sees(scored, batch, setup.pixels, f"subset {encoded.records.records[0].subset}")

    def _letter_logits(self, params, batch):
        """(float32[B, V] logits behind each prompt,): of questions that are answered in boxes."""
        mesh = self._setup.mesh
        jitted = jax.jit(
            lambda params, batch: letter_logits(nnx.merge(self._graphdef, params), batch),
            in_shardings=(self._shardings, batch_sharding(mesh)), out_shardings=replicated(mesh),
        )  # fmt: skip
        arrays = {key: value for key, value in batch.items() if key != "row_mask"}
        with jax.set_mesh(mesh):
            return (jitted(params, put_batch(arrays, batch_sharding(mesh))),)

    @property
    def _answers(self) -> dict:
        config = self._setup.run.eval
        return {
            "eos_id": self._setup.tokenizer.eos_id, "max_new_tokens": config.max_new_tokens, "generate": config.generate
        }  # fmt: skip


def with_images_of(again: Encoded, encoded: Encoded) -> Encoded:
    """The rows of a control (`data.controls.AskedAgain`) with the images of the set that it asks about, where these are
    decoded already; nothing is copied."""
    if encoded.images is None:
        return again
    places = np.asarray(again.records.places)
    return dataclasses.replace(again, images={key: _Taken(array, places) for key, array in encoded.images.items()})


@dataclasses.dataclass(frozen=True)
class _Taken:
    """`array[places]`, of which the rows that are asked for alone are copied."""

    array: np.ndarray
    places: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.array[self.places[rows]]


def write_tested(workdir: Path, name: str, answers: Sequence[Prediction | BoxAnswer]) -> None:
    """Writes `predictions/NAME.jsonl` of choice questions, `boxes/NAME.jsonl` of questions about boxes."""
    located = [answer for answer in answers if isinstance(answer, BoxAnswer)]
    chosen = [answer for answer in answers if isinstance(answer, Prediction)]
    if chosen:
        run.write_predictions(workdir / "predictions" / f"{name}.jsonl", chosen)
    if located:
        box_answers.write_answers(workdir / "boxes" / f"{name}.jsonl", located)


@sigterm_saves()
def evaluate_subsets(config: RunConfig, workdir: Path) -> dict:
    """Tests on `data.subsets` (empty: all of choice questions) and leaves `write_tested`'s files of each in `workdir`;
    prints a line for each.

    The parameters are those that `medcg train` left in `workdir`, else the model's checkpoint.
    Returns {"workdir", "subsets": {name: `run.summary`, or `box_answers.summary` of boxes}}.

    Raises:
      ConfigError, DataError: as `open_setup`; or there are no parameters, or the model does not see images.
      Interrupted: the process was told to stop; files of the subsets tested so far are there.
    """
    trained = workdir / "params"
    setup = open_setup(config, trained=trained if trained.is_dir() else None)
    graphdef, params = parameters(setup, trained)
    test = Tester(setup, graphdef)
    names = subset_names(setup.source, config.data)
    found = {}
    for name in names:
        has_boxes, records = setup.has_boxes(name), setup.source.records(name, "test")
        answers = test(params, setup.encode_boxes(records) if has_boxes else setup.encode_eval(records))
        if jax.process_index() == 0:
            write_tested(workdir, name, answers)
        found[name] = box_answers.summary(answers) if has_boxes else run.summary(answers)
        print(box_line(name, found[name]) if has_boxes else line(name, found[name]), flush=True)
    return {"workdir": str(workdir), "subsets": found}


def parameters(setup: Setup, trained: Path):
    """(graphdef, params) of `trained` where it exists, else of the model's checkpoint.

    Raises:
      ConfigError: neither is there.
    """
    if trained.is_dir():
        return load_params(trained, setup.model, setup.mesh, base=setup.run.model.checkpoint)[:2]
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


def box_line(name: str, scores: dict) -> str:
    """A subset's scores of boxes for people."""
    if not scores["n"]:
        return f"{name}: no test records with boxes"
    text = f"{name}: {scores['correct']} of {scores['n']} boxes found (IoU above 0.5), {scores['accuracy']:.3f} "
    text += f"[{scores['accuracy_low']:.3f}, {scores['accuracy_high']:.3f}]"
    if scores["by_chance"] is not None:
        text += f", of another image's {scores['by_chance']:.3f}"
    text += f"; IoU mean {scores['mean_iou']:.3f}, cumulative {scores['cumulative_iou']:.3f}"
    text += f"; unparsed {scores['unparsed_rate']:.3f}"
    if scores["dice"] is not None:
        text += f"; Dice {scores['dice']:.3f} [{scores['dice_low']:.3f}, {scores['dice_high']:.3f}]"
    return text
