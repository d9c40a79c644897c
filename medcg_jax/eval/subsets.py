"""Tests of subsets, with choice questions or questions about boxes; and `medcg eval`."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from medcg_jax.config import ConfigError, Interrupted, RunConfig, trains_masks
from medcg_jax.data.controls import WITHOUT_IMAGES, are_blank
from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import Asked, eval_batches, eval_rows, further_questions
from medcg_jax.data.sources import subset_names
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.eval import boxes, grounding, letters, predictions, trained_with
from medcg_jax.eval.boxes import BoxAnswer
from medcg_jax.eval.features import GIB, FeatureStore
from medcg_jax.eval.predictions import Prediction
from medcg_jax.families import build, registry
from medcg_jax.families.build import shardings
from medcg_jax.families.weights.files import has_tokenizer
from medcg_jax.mesh import batch_sharding, check_batch, local_rows, replicated
from medcg_jax.nn.base import Base
from medcg_jax.terminal import doing
from medcg_jax.train.checkpoint import load_params
from medcg_jax.train.preempt import sigterm_saves
from medcg_jax.train.sanity import check_sees, has_closed_gates
from medcg_jax.train.setup import Setup, open_setup, start_params
from medcg_jax.train.start import with_checkpoint

# A test's answers, a `Prediction` or a `BoxAnswer` for every row, and {control: predictions}.
Answered = tuple[list, dict[str, list[Prediction]]]


@dataclasses.dataclass(frozen=True)
class SubsetTest:
    """A test: questions, their controls, and a name under which features of its images are kept for the next parameters.

    encoded: choice questions, or questions about boxes. controls: choice questions about the same records again.
    name: of the images, so unique among a setup's tests; "": no features are kept.
    """

    encoded: Encoded
    controls: Mapping[str, Encoded] = dataclasses.field(default_factory=dict)
    name: str = ""


class Tester:
    """Tests a setup's model on choice questions or questions about boxes; compiles for each kind at its first use.

    sees: the model is known to see its images; if not, that is checked first (`train.sanity`).
    """

    def __init__(self, setup: Setup, graphdef: nnx.GraphDef, *, sees: bool = False):
        self._setup, self._graphdef, self._sees = setup, graphdef, sees
        self._model = setup.mesh, graphdef, shardings(setup.model, setup.mesh)
        self._image_keys: tuple[str, ...] = registry.of(setup.model).module_type.image_keys  # type: ignore[attr-defined]

    @functools.cached_property
    def _features(self) -> FeatureStore:
        run = self._setup.run
        return FeatureStore(*self._model, trainable=run.model.trainable, limit_bytes=run.eval.features_gib * GIB)

    @functools.cached_property
    def _evaluator(self) -> letters.Evaluator:
        return letters.make_evaluator(*self._model, **self._generation)

    @functools.cached_property
    def _followed_evaluator(self) -> letters.FollowedEvaluator:
        return letters.make_followed_evaluator(*self._model, **self._generation)

    @functools.cached_property
    def _letters_alone(self) -> letters.Evaluator:
        return letters.make_evaluator(*self._model, **self._generation | {"generate": False})

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
        """A `Prediction` or a `BoxAnswer` for every row; as `run`."""
        [(answers, _)] = self.run(params, [SubsetTest(encoded)])
        return answers

    def run(self, params, tests: Iterable[SubsetTest]) -> Iterator[Answered]:
        """Yields the answers of each test.

        The devices go from test to test without a pause: the next test is encoded in another thread, and a test's answers
        are read when the first batches of the next one are with the devices. Controls are scored by the letters only.
        Without free answers (`eval.generate`), controls beside the test's images change its scores in the last digits;
        otherwise no control changes a byte of the test's predictions.

        params: of the whole model, on the setup's mesh.

        Raises:
          BlindModel: the model does not see images.
          NonFiniteScores: the parameters give scores that are not finite.
          Interrupted: the process was told to stop.

        Before any error, also one of a test's own encoding, tests that were asked are yielded.
        """
        check_batch(self._setup.mesh, self._setup.run.eval.batch_size, "eval.batch_size")
        queue, asked = letters.Queue(), deque[Callable[[], Answered]]()
        try:
            for test in one_ahead(tests):
                asked.append(self._ask(queue, params, test))
                if len(asked) > 1:
                    yield asked.popleft()()
        except (Exception, Interrupted):
            while asked:
                yield asked.popleft()()
            raise
        while asked:
            yield asked.popleft()()

    def forget(self) -> None:
        """Frees the memory of features; for when other parameters, or other images of the same names, follow."""
        self._features.clear()

    def _ask(self, queue: letters.Queue, params, test: SubsetTest) -> Callable[[], Answered]:
        """Dispatches a test; returns what reads its answers."""
        encoded, setup = test.encoded, self._setup
        if encoded.asked:
            self._check_sees(params, encoded, self._letter_logits)
            numbers = [queue.add(self._locator(params, *batch)) for batch in self._batches(params, encoded, test.name)]
            size = setup.run.eval.batch_size
            return lambda: (grounding.boxes_of(encoded, queue.take(numbers), setup.tokenizer, batch_size=size), {})
        shared = {name: control for name, control in test.controls.items() if name not in WITHOUT_IMAGES}
        if shared:
            numbers, rounds, further = self._ask_followed(queue, params, test, shared)
        else:
            self._check_sees(params, encoded, self._evaluator)
            numbers, rounds, further = self._ask_plainly(queue, params, encoded, test.name, self._evaluator), [], []
        alone = {
            name: self._ask_plainly(queue, params, control, test.name and f"{test.name}/{name}", self._letters_alone)
            for name, control in test.controls.items()
            if name not in shared
        }

        def read() -> Answered:
            options = {"tokenizer": setup.tokenizer}
            plain = letters.answers_of(encoded, queue.take(numbers), generated=setup.run.eval.generate, **options)
            answers = letters.further_answers(shared, rounds, queue.take(further), **options)
            for name, asked in alone.items():
                answers[name] = letters.answers_of(test.controls[name], queue.take(asked), generated=False, **options)
            return plain, {name: answers[name] for name in test.controls}

        return read

    def _ask_plainly(
        self, queue: letters.Queue, params, encoded: Encoded, name: str, evaluator: letters.Evaluator
    ) -> list[int]:
        """The numbers of an evaluator's outputs for the batches of a set."""
        return [queue.add(evaluator(params, *batch)) for batch in self._batches(params, encoded, name)]

    def _ask_followed(
        self, queue: letters.Queue, params, test: SubsetTest, controls: Mapping[str, Encoded]
    ) -> tuple[list[int], list[Asked], list[int]]:
        """(numbers of an evaluator's outputs, further questions batch by batch, numbers of their outputs)."""
        setup, evaluator = self._setup, self._followed_evaluator

        def plainly(params, batch, features):
            return next(iter(evaluator(params, batch, features, ())))

        self._check_sees(params, test.encoded, plainly)
        size = setup.run.eval.batch_size
        rounds = further_questions(
            test.encoded,
            list(controls.values()),
            size,
            image_token_id=setup.model.image_token_id,
            rows=local_rows(setup.mesh, size),
        )
        numbers, asked, further, ends = list[int](), list[Asked](), list[int](), deque[int]()
        for batch, questions in zip(self._batches(params, test.encoded, test.name), rounds, strict=True):
            if len(ends) == letters.MAX_CACHES:
                queue.wait_for(ends.popleft())
            first, *others = map(queue.add, evaluator(params, *batch, questions))
            numbers.append(first)
            asked += questions
            further += others
            ends.append((first, *others)[-1])
        return numbers, asked, further

    def _batches(self, params, encoded: Encoded, name: str) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """(this process's rows of a batch without the model's images, the features of these) for all batches of a set."""
        size, blank = self._setup.run.eval.batch_size, are_blank(encoded.records)
        of_others = encoded.format.blank.keys() - {*self._image_keys}
        for number, drawn in enumerate(eval_rows(encoded, size, rows=local_rows(self._setup.mesh, size))):
            batch, images = drawn.batch, functools.cache(functools.partial(encoded.image_rows, drawn.indices))
            if of_others:  # those that SAM draws masks in
                batch |= {key: images()[key] for key in of_others}
            key: tuple = (name, number)
            if blank or not any(encoded.records.records[index].image for index in drawn.records):
                key = ("blank" if blank else "no image",)
            yield batch, self._features.get(params, key if name else None, images)

    def _check_sees(self, params, encoded: Encoded, score: Callable) -> None:
        """Raises BlindModel if other pixels change no score; checked once for all tests.

        score: (params, batch without images, features) -> (float32[B, K], ...).
        """
        setup, size = self._setup, self._setup.run.eval.batch_size
        if self._sees or not len(encoded) or has_closed_gates(params):
            return
        batch, _ = next(eval_batches(encoded, size, rows=local_rows(setup.mesh, size)))
        names = encoded.format.blank.keys()

        def scored(batch) -> list[np.ndarray]:
            text, images = ({k: x for k, x in batch.items() if (k in names) is of} for of in (False, True))
            return [jax.device_get(score(params, text, self._features.make(params, images))[0])]

        name = f"subset {encoded.records.records[0].subset}"
        self._sees = check_sees(scored, batch, setup.pixels, name)

    def _letter_logits(self, params, batch, features) -> tuple[jax.Array]:
        """(float32[B, V] logits at each prompt's end,), for questions about boxes."""
        mesh, graphdef, param_shardings = self._model
        jitted = jax.jit(
            lambda params, batch: letters.letter_logits(nnx.merge(graphdef, params), batch),
            in_shardings=(param_shardings, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )
        with jax.set_mesh(mesh):
            return (jitted(params, letters.on_devices(mesh, batch, features)),)


Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order, of which another thread makes the next while one is used."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, source, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, source, end)
            yield item  # type: ignore[misc]


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
    names = subset_names(setup.source, config.data)

    def tests() -> Iterator[SubsetTest]:
        for name in names:
            encode = setup.encode_boxes if setup.has_boxes(name) else setup.encode_eval
            yield SubsetTest(encode(setup.source.records(name, "test")))

    summaries = {}
    answered = Tester(setup, graphdef).run(params, tests())
    for name in names:
        with doing(f"testing {name}"):
            answers, _ = next(answered)
        has_boxes = setup.has_boxes(name)
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
