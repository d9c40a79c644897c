"""Tests of subsets, with choice questions or questions about boxes; and `medcg eval`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from medcg_jax.config import ConfigError, RunConfig, trains_masks
from medcg_jax.data.controls import WITHOUT_IMAGES
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import eval_batches, rounds
from medcg_jax.data.sources import subset_names
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.eval import boxes, grounding, letters, predictions, trained_with
from medcg_jax.eval.boxes import BoxAnswer
from medcg_jax.eval.predictions import Prediction
from medcg_jax.families import build
from medcg_jax.families.build import shardings
from medcg_jax.families.weights.files import has_tokenizer
from medcg_jax.mesh import batch_sharding, check_batch, local_rows, put_batch, replicated
from medcg_jax.nn.base import Base
from medcg_jax.terminal import doing
from medcg_jax.train.checkpoint import load_params
from medcg_jax.train.preempt import sigterm_saves
from medcg_jax.train.sanity import check_sees, has_closed_gates
from medcg_jax.train.setup import Setup, open_setup, start_params
from medcg_jax.train.start import with_checkpoint


class Tester:
    """Tests a setup's model on choice questions or questions about boxes; compiles for each kind at its first use.

    sees: the model is known to see its images; if not, that is checked first (`train.sanity`).
    """

    def __init__(self, setup: Setup, graphdef: nnx.GraphDef, *, sees: bool = False):
        self._setup, self._graphdef, self._sees = setup, graphdef, sees
        self._model = setup.mesh, graphdef, shardings(setup.model, setup.mesh)

    @functools.cached_property
    def _evaluator(self) -> letters.Evaluator:
        return letters.make_evaluator(*self._model, **self._generation)

    @functools.cached_property
    def _prefix_evaluator(self) -> letters.PrefixEvaluator:
        return letters.make_prefix_evaluator(*self._model, **self._generation)

    @functools.cached_property
    def _locator(self) -> Callable:
        setup = self._setup
        return grounding.make_locator(
            *self._model,
            eos_id=setup.tokenizer.eos_id,
            max_new_tokens=setup.run.eval.max_box_tokens,
            masks=trains_masks(setup.run.model),
        )

    @property
    def _generation(self) -> dict:
        config, eos_id = self._setup.run.eval, self._setup.tokenizer.eos_id
        return {"eos_id": eos_id, "max_new_tokens": config.max_new_tokens, "generate": config.generate}

    def __call__(self, params, encoded: Encoded) -> list:
        """A `Prediction` or a `BoxAnswer` for every row. params: of the whole model, on the setup's mesh.

        Raises:
          BlindModel: the model does not see images.
          NonFiniteScores: the parameters give scores that are not finite.
        """
        setup, size = self._setup, self._setup.run.eval.batch_size
        if encoded.asked:
            self._check_sees(params, encoded, self._letter_logits)
            return grounding.locate(self._locator, setup.mesh, params, encoded, setup.tokenizer, batch_size=size)
        self._check_sees(params, encoded, self._evaluator)
        return letters.evaluate(self._evaluator, params, encoded, setup.tokenizer, batch_size=size)

    def with_controls(
        self, params, encoded: Encoded, controls: Mapping[str, Encoded]
    ) -> tuple[list[Prediction], dict[str, list[Prediction]]]:
        """(predictions, {control: predictions}) of choice questions; controls ask about the same records again.

        "blank_images" and "text_only", whose images are not those of the test, use the program of the plain test; so
        does "shuffled_images" without "circular" and "two_options". Nothing more is compiled then, and the plain
        predictions have the same bytes as without a control.

        Raises:
          BlindModel, NonFiniteScores: as `__call__`.
        """
        setup, shared = self._setup, {name: asked for name, asked in controls.items() if name not in WITHOUT_IMAGES}
        answers: dict[str, list[Prediction]] = {}
        if shared.keys() <= {"shuffled_images"}:
            plain = self(params, encoded)
            alone = {**controls, **{name: with_images_of(asked, encoded) for name, asked in shared.items()}}
        else:
            evaluator, alone = self._prefix_evaluator, {n: asked for n, asked in controls.items() if n not in shared}

            def score(params, turn):
                return evaluator.ask(params, evaluator.prefill(params, turn.before), turn.asked[0])

            self._check_sees(params, encoded, score, shared)
            plain, answers = letters.evaluate_controls(
                evaluator,
                params,
                encoded,
                shared,
                setup.tokenizer,
                batch_size=setup.run.eval.batch_size,
                image_token_id=setup.model.image_token_id,
            )
        for name, asked in alone.items():
            answers[name] = [dataclasses.replace(prediction, generated=None) for prediction in self(params, asked)]
        return plain, {name: answers[name] for name in controls}

    def _check_sees(
        self, params, encoded: Encoded, score: Callable, controls: Mapping[str, Encoded] | None = None
    ) -> None:
        """Raises BlindModel if other pixels change no score; checked once for all tests.

        score: (params, first batch of the test, or with controls the first round) -> (float32[B, K], ...).
        """
        setup, size = self._setup, self._setup.run.eval.batch_size
        if self._sees or not len(encoded) or has_closed_gates(params):
            return
        check_batch(setup.mesh, size, "eval.batch_size")
        rows = local_rows(setup.mesh, size)
        if controls is None:
            first, (batch, _) = None, next(eval_batches(encoded, size, rows=rows))
        else:
            image = setup.model.image_token_id
            first = next(rounds(encoded, list(controls.values()), size, image_token_id=image, rows=rows))
            batch = first.before

        def scored(batch) -> list[np.ndarray]:
            given = batch if first is None else dataclasses.replace(first, before=batch)
            return [jax.device_get(score(params, given)[0])]

        name = f"subset {encoded.records.records[0].subset}"
        self._sees = check_sees(scored, batch, setup.pixels, name)

    def _letter_logits(self, params, batch) -> tuple[jax.Array]:
        """(float32[B, V] logits at each prompt's end,), for questions about boxes."""
        mesh, graphdef, param_shardings = self._model
        jitted = jax.jit(
            lambda params, batch: letters.letter_logits(nnx.merge(graphdef, params), batch),
            in_shardings=(param_shardings, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )
        arrays = {key: value for key, value in batch.items() if key != "row_mask"}
        with jax.set_mesh(mesh):
            return (jitted(params, put_batch(arrays, batch_sharding(mesh))),)


def with_images_of(control: Encoded, encoded: Encoded) -> Encoded:
    """A control (`data.controls.ControlSet`) with the decoded images of `encoded`, if any; nothing is copied."""
    if encoded.images is None:
        return control
    indices = np.asarray(control.records.places)  # type: ignore[attr-defined]
    images: dict = {key: _RowsOf(array, indices) for key, array in encoded.images.items()}
    return dataclasses.replace(control, images=images)


@dataclasses.dataclass(frozen=True)
class _RowsOf:
    """`array[indices]`, computed only for the rows that are read."""

    array: np.ndarray
    indices: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.array[self.indices[rows]]


def write_tested(workdir: Path, name: str, answers: Sequence[Prediction | BoxAnswer]) -> None:
    """Writes `predictions/NAME.jsonl` for choice questions, `boxes/NAME.jsonl` for questions about boxes."""
    located = [answer for answer in answers if isinstance(answer, BoxAnswer)]
    chosen = [answer for answer in answers if isinstance(answer, Prediction)]
    if chosen:
        predictions.write_predictions(workdir / "predictions" / f"{name}.jsonl", chosen)
    if located:
        boxes.write_answers(workdir / "boxes" / f"{name}.jsonl", located)


@sigterm_saves()
def evaluate_subsets(config: RunConfig, workdir: Path) -> dict:
    """Tests on `data.subsets` (empty: all with choice questions); writes each one's files to `workdir`
    (`write_tested`) and prints a line for it.

    The parameters are those that `medcg train` wrote to `workdir`, else the model's checkpoint.
    Returns {"workdir", "subsets": {name: `predictions.summary` with `predictions.baselines`, or `boxes.summary`}}.

    Raises:
      ConfigError, DataError: as `open_setup`; or there are no parameters, they were trained with another model, tokenizer
        or prompt (`trained_with`), or the model does not see images.
      Interrupted: the process was told to stop; the files of the subsets tested so far are written.
    """
    trained = workdir / "params"
    config = with_checkpoint(config)
    directory = trained_with.parameters_of(config, workdir)
    trained_with.check_same(config, directory)
    setup = held_for_tests(open_setup(config, trained=trained if trained.is_dir() else None))
    check_tokenizer(setup, directory)
    for text in trained_with.lines(config, directory):
        print(text)
    with doing(f"loading {directory}"):
        graphdef, params = parameters(setup, trained)
    test = Tester(setup, graphdef)
    names = subset_names(setup.source, config.data)
    summaries = {}
    for name in names:
        has_boxes, records = setup.has_boxes(name), setup.source.records(name, "test")
        with doing(f"testing {name}, {len(records)} records"):
            answers = test(params, setup.encode_boxes(records) if has_boxes else setup.encode_eval(records))
        if jax.process_index() == 0:
            write_tested(workdir, name, answers)
        summaries[name] = boxes.summary(answers) if has_boxes else scores_of(answers)
        print((box_line if has_boxes else line)(name, summaries[name]), flush=True)
    folders = [str(path) for name in ("predictions", "boxes") if (path := workdir / name).is_dir()]
    print(f"every answer: {', '.join(folders)}")
    return {"workdir": str(workdir), "subsets": summaries}


def held_for_tests(setup: Setup) -> Setup:
    """The setup with a large model's parameters in bfloat16, in which it computes: no test needs them in float32.

    Prints a line where the configuration says nothing of it. Trained parts are held so too.
    """
    config = setup.model
    if config.base.dtype != "float32" or config.compute_dtype != "bfloat16":
        return setup
    if build.num_params(build.abstract(config)[1]) <= build.MOST_IN_FLOAT32:
        return setup
    print("parameters are held in bfloat16, in which they are computed with")
    return dataclasses.replace(setup, model=dataclasses.replace(config, base=Base("bfloat16")))


def scores_of(answers: Sequence[Prediction]) -> dict:
    return predictions.summary(answers) | predictions.baselines(answers)


def check_tokenizer(setup: Setup, directory: Path) -> None:
    """Raises ConfigError if the run names another tokenizer than that of the parameters in `directory`."""
    named = setup.run.model.tokenizer
    if named and has_tokenizer(directory) and load_tokenizer(directory).fingerprint != setup.tokenizer.fingerprint:
        raise ConfigError(
            f"model.tokenizer={named} is another than that in {directory}, which the model was trained with; expected "
            "model.tokenizer='', which takes that one"
        )


def parameters(setup: Setup, trained: Path):
    """(graphdef, params) from `trained` if it exists, else from the model's checkpoint.

    Raises:
      ConfigError: neither exists.
    """
    if trained.is_dir():
        return load_params(trained, setup.model, setup.mesh, base=setup.run.model.checkpoint)[:2]
    if not setup.run.model.checkpoint:
        raise ConfigError(f"{trained} is missing and model.checkpoint is empty: give a workdir of `medcg train`")
    return start_params(setup, seed=setup.run.train.seed)


def line(name: str, scores: dict) -> str:
    """A subset's scores for people."""
    if not scores["n"]:
        return f"{name}: no test records"
    text = f"{name}: {scores['correct']} of {scores['n']} right, {scores['accuracy']:.3f} "
    text += f"[{scores['ci_low']:.3f}, {scores['ci_high']:.3f}]; chance {scores['chance']:.3f}, "
    text += f"the most frequent label {scores['majority']:.3f}; probability of the letters {scores['letter_mass']:.3f}"
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
