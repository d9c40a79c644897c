"""What a base knows of a subset without a fine-tune: a linear probe of the image features that its decoder is given.

A multinomial logistic regression reads the right option from the features of the subset's own training images, which
no arm of pairs, triples and ablations is trained on; its accuracy on the test images, among the offered options, is what the tower and the
projector make linearly readable, at least: phantoms of a test are harder than those of a training. Where it is high and a fine-tune's accuracy low, the image is seen and the rule is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.optimize import minimize
from scipy.special import log_softmax

from medcg_jax.data.encoding import Encoded
from medcg_jax.data.eval_batches import eval_batches, eval_order
from medcg_jax.data.leaks import find_leaks, hashed
from medcg_jax.data.records import Record
from medcg_jax.data.splits import balanced, group_key
from medcg_jax.eval.letters import run_ahead
from medcg_jax.families.build import shardings
from medcg_jax.mesh import batch_sharding, check_batch, local_rows, put_batch, replicated

if TYPE_CHECKING:
    from medcg_jax.train.setup import Setup

# "mean": over an image's tokens. "tokens": side by side, those of each of `SIDE` x `SIDE` cells of the image averaged:
# every token by itself where the tower has no more of them, as tiny ones have.
FEATURES = ("mean", "tokens")
SIDE = 4
# The most training records of a probe, and the fewest.
MAX_RECORDS, MIN_RECORDS = 1000, 20
# Strengths of the L2 penalty that cross-validation chooses among, for features of mean squared length 1.
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FOLDS = 5
# Of the optimizer: enough for accuracies that no longer change.
MAX_STEPS = 200


@dataclass(frozen=True)
class ProbeResult:
    """A probe's accuracy on test records.

    Attributes:
      features: of `FEATURES`. records: training records. n, correct: test records, and those read rightly.
      strength: of `STRENGTHS`, by cross-validation. validated: the accuracy in cross-validation.
    """

    features: str
    records: int
    n: int
    correct: int
    strength: float
    validated: float


class Prober:
    """Probes a setup's subsets with one set of parameters; its program compiles at first use."""

    def __init__(self, setup: "Setup", graphdef: nnx.GraphDef, params):
        self._setup, self._params = setup, params
        self._encoder = make_encoder(setup.mesh, graphdef, shardings(setup.model, setup.mesh))

    def __call__(self, test: Encoded) -> list[ProbeResult]:
        """A result for each of `FEATURES`; [] where a subset has fewer than `MIN_RECORDS` to train on, or no test image.

        test: a subset's choice questions, as encoded for its test. Its own training records are trained on, labels
        balanced, without those that show a test image or a test patient.

        Raises:
          DataError: an image cannot be read.
        """
        tested = [i for i, record in enumerate(test.records.records) if record.image]
        if not tested:
            return []
        records = self._setup.source.records(test.records.records[0].subset, "train")
        leaks = find_leaks(hashed(records), hashed(test.records))
        left_out = {leak.training for leak in leaks if leak.kind != "likely same group"}
        usable = [i for i, record in enumerate(records.records) if record.image and record.id not in left_out]
        labels = [records.records[i].label for i in usable]
        chosen = records.select(usable[i] for i in balanced(labels, MAX_RECORDS, self._setup.run.data.seed))
        if len(chosen) < MIN_RECORDS:
            return []
        train, of_test = (self._features(encoded) for encoded in (self._setup.encode_eval(chosen), test))
        asked = [test.records.records[i] for i in tested]
        return [probe(name, train[name], chosen.records, of_test[name][tested], asked) for name in FEATURES]

    def _features(self, encoded: Encoded) -> dict[str, np.ndarray]:
        size = self._setup.run.eval.batch_size
        return image_features(self._setup.mesh, self._encoder, self._params, encoded, batch_size=size)


def make_encoder(mesh, graphdef: nnx.GraphDef, param_shardings) -> Callable:
    """(params, batch of images) -> {"mean": float32[B, D], "tokens": float32[B, SIDE**2, D]}, of `FEATURES`.

    param_shardings: NamedSharding of each parameter.
    """

    def pooled(params, images):
        features, cells = nnx.merge(graphdef, params).image_tokens(images, SIDE)
        features = features.astype(jnp.float32)

        def mean(member):
            share = member / jnp.maximum(member.sum(1, keepdims=True), 1)
            return jnp.einsum("bpc,bpd->bcd", share, features, precision="highest")

        return {
            "mean": mean((cells >= 0).astype(jnp.float32)[..., None])[:, 0],
            "tokens": mean(jax.nn.one_hot(cells, SIDE**2)),  # other cells have no column
        }

    return jax.jit(pooled, in_shardings=(param_shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))


def image_features(mesh, encoder: Callable, params, encoded: Encoded, *, batch_size: int) -> dict[str, np.ndarray]:
    """Of `FEATURES` -> float32[N, F], for every record in the order of `encoded`. params: of the whole model."""
    check_batch(mesh, batch_size, "eval.batch_size")

    def encode(item):
        batch, _ = item
        images = {key: batch[key] for key in encoded.format.blank if key in batch}
        with jax.set_mesh(mesh):
            return encoder(params, put_batch(images, batch_sharding(mesh)))

    outputs = jax.device_get(run_ahead(encode, eval_batches(encoded, batch_size, rows=local_rows(mesh, batch_size))))
    order = np.argsort(eval_order(encoded))
    return {
        name: np.concatenate([output[name].reshape(len(output[name]), -1) for output in outputs])[order]
        for name in FEATURES
    }


def probe(
    features: str, train: np.ndarray, training: Sequence[Record], test: np.ndarray, tests: Sequence[Record]
) -> ProbeResult:
    """A probe that is trained on float[N, F] of N records and read out on float[K, F] of K others.

    Records are those of choice questions. The strength is that with the best accuracy over `FOLDS` parts of the training
    records, the strongest of equals; records of one patient are in one part.
    """
    names = sorted({record.label for record in training})
    labels = np.array([names.index(record.label) for record in training])
    train, test = _rotated(train, test)
    folds, allowed = _folds(training), _offered(training, names)
    accuracies = np.zeros(len(STRENGTHS))
    for fold in np.unique(folds):
        kept, held = folds != fold, folds == fold
        for place, weights in enumerate(_path(train[kept], labels[kept], len(names))):
            accuracies[place] += (_read(train[held], weights, allowed[held]) == labels[held]).sum()
    best = int(accuracies.argmax())
    *_, weights = _path(train, labels, len(names), STRENGTHS[: best + 1])
    read = _read(test, weights, _offered(tests, names))
    correct = sum(place >= 0 and names[place] == record.label for place, record in zip(read, tests, strict=True))
    return ProbeResult(
        features, len(training), len(tests), int(correct), STRENGTHS[best], float(accuracies[best] / len(training))
    )


def _rotated(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features, centred and scaled by the training records, in at most as many dimensions as there are of these.

    A penalty on the length of weights does not change under rotation, and weights outside of the span of the training
    records only add to it: the regression is the same.
    """
    mean = train.mean(0, dtype=np.float64).astype(np.float32)
    train, test = train - mean, test - mean
    scale = np.sqrt(np.square(train, dtype=np.float64).sum(1).mean()) or 1.0
    if train.shape[1] <= len(train):
        return train.astype(np.float64) / scale, test.astype(np.float64) / scale
    values, vectors = np.linalg.eigh((train @ train.T).astype(np.float64))
    kept = values > 1e-6 * values.max(initial=0)
    lengths, vectors = np.sqrt(values[kept]), vectors[:, kept]
    return vectors * lengths / scale, (test @ train.T).astype(np.float64) @ vectors / lengths / scale


def _folds(records: Sequence[Record]) -> np.ndarray:
    """int[N]: the part of each record, about equal in size."""
    keys = [group_key(record) or record.id for record in records]
    distinct = sorted(set(keys))
    order = np.random.default_rng(0).permutation(len(distinct))
    fold_of = {key: int(place) % FOLDS for key, place in zip(distinct, order, strict=True)}
    return np.array([fold_of[key] for key in keys])


def _offered(records: Sequence[Record], names: Sequence[str]) -> np.ndarray:
    """bool[N, L]: whether each label is among the options of each record."""
    return np.array([[name in record.options for name in names] for record in records], bool).reshape(-1, len(names))


def _path(x: np.ndarray, labels: np.ndarray, num: int, strengths: Sequence[float] = STRENGTHS):
    """Yields float64[F + 1, L], the weights and the bias, for each strength; each starts from the one before."""
    weights = np.zeros((x.shape[1] + 1, num))
    wanted = np.eye(num)[labels]

    def loss(flat: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        w = flat.reshape(weights.shape)
        logs = log_softmax(x @ w[:-1] + w[-1], axis=1)
        error = (np.exp(logs) - wanted) / len(x)
        gradient = np.concatenate([x.T @ error + strength * w[:-1], error.sum(0)[None]])
        return float(-(wanted * logs).sum() / len(x) + strength / 2 * (w[:-1] ** 2).sum()), gradient.ravel()

    for strength in strengths:
        minimum = minimize(
            loss, weights.ravel(), args=(strength,), jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS}
        )
        weights = minimum.x.reshape(weights.shape)
        yield weights


def _read(x: np.ndarray, weights: np.ndarray, offered: np.ndarray) -> np.ndarray:
    """int[N]: the best offered label of each row; -1 where no offered label was in the training."""
    scores = np.where(offered, x @ weights[:-1] + weights[-1], -np.inf)
    return np.where(offered.any(1), scores.argmax(1), -1)
