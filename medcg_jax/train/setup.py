"""What a run needs before its first step: mesh, tokenizer, architecture and data, all checked."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medcg_jax.chips import peak_bf16
from medcg_jax.config import (
    EMBEDDING,
    MASK_PARTS,
    MODELS,
    ConfigError,
    MeshConfig,
    ModelConfig,
    RunConfig,
    trains_masks,
)
from medcg_jax.data.encoding import Encoded, encode, encode_boxes, encode_eval, longest_row, row_length
from medcg_jax.data.general import GeneralRecords, open_general
from medcg_jax.data.layouts import check_layout
from medcg_jax.data.records import RecordSet, Source
from medcg_jax.data.row_format import Format
from medcg_jax.data.sources import open_source, require_subsets
from medcg_jax.data.tokenizer import SMALL, Tokenizer, load_tokenizer
from medcg_jax.families import registry
from medcg_jax.families.build import TINY, Config, architecture, create, join, replicated
from medcg_jax.families.flops import forward, training
from medcg_jax.families.weights.convert import load_checkpoint
from medcg_jax.families.weights.files import has_tokenizer
from medcg_jax.families.weights.kind import check_family, check_weights
from medcg_jax.mesh import check_batches, fitted, make_mesh, num_shards, padded_rows
from medcg_jax.terminal import doing
from medcg_jax.train.checkpoint import check_whole
from medcg_jax.train.losses import mask_loss
from medcg_jax.train.sanity import check_token_ids, check_tokens, pixel_keys
from medcg_jax.train.start import check_architecture, checkpoint_dir, weights_dir

# A tiny model's vocabulary is a multiple of this, so that a mesh can split it.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Setup:
    run: RunConfig
    mesh: Mesh
    tokenizer: Tokenizer
    model: Config
    format: Format
    source: Source

    @functools.cached_property
    def general(self) -> GeneralRecords | None:
        """The general records that every fine-tune mixes in; None without any. Read at first use: a test reads none.

        Raises:
          DataError: it cannot be read.
        """
        return open_general(self.run.data)

    @property
    def pixels(self) -> tuple[str, ...]:
        """Keys of a batch's images that the language model sees."""
        return pixel_keys(self.format.blank)

    @property
    def companions(self) -> tuple[Path, ...]:
        """Paths of what an export needs beside the parameters: the tokenizer's file, the checkpoint's directory."""
        return tuple(path for path in (self.tokenizer.path, checkpoint_dir(self.run.model)) if path)

    @property
    def loss(self) -> Callable:
        """The loss of a fine-tune (`loss_fn`): `mask_loss` if mask parts are trained, else the family's."""
        if trains_masks(self.run.model):
            return mask_loss
        return registry.of(self.model).loss_fn

    def trainable_rows(self, parts: Sequence[str]) -> tuple[int, ...]:
        """Rows of the embedding that a training of these parts changes (`model.trainable_words`); (): all.

        A word has a token behind a space, and in many vocabularies another one at the start of a text.

        Raises:
          ConfigError: a word behind a space is not one token.
        """
        rows: dict[int, None] = {}
        for word in self.run.model.trainable_words if EMBEDDING in parts else ():
            behind_space = self.tokenizer.encode(f" {word}", start=False) if word.strip() else []
            at_start = self.tokenizer.encode(word)
            if len(behind_space) != 1:
                raise ConfigError(
                    f"model.trainable_words={word!r}: it is {len(behind_space)} tokens; expected words of one token"
                )
            rows |= dict.fromkeys((*behind_space, *(at_start if len(at_start) == 1 else ())))
        return tuple(rows)

    def has_boxes(self, subset: str) -> bool:
        """Whether the subset's records have boxes instead of options."""
        return subset not in {s.name for s in self.source.subsets}

    def encode(self, records: RecordSet, **lengths: Any) -> Encoded:
        """Training rows. lengths: `max_text_tokens`, `max_target_tokens`, to replace the configuration's."""
        return encode(records, self.tokenizer, dataclasses.replace(self.run.data, **lengths), self.format)

    def row_length(self, sets: Sequence[RecordSet], **lengths: Any) -> int:
        """Tokens of a training row, if these are all the records (`data.row_multiple`). lengths: as `encode`."""
        data = dataclasses.replace(self.run.data, **lengths)
        longest = (longest_row(records, self.tokenizer, data, self.format) for records in sets)
        return row_length(max(longest, default=data.max_text_tokens + self.format.max_image_tokens), data, self.format)

    def encode_eval(self, records: RecordSet, **options: int) -> Encoded:
        """Choice questions. options: `columns` of letters, `memory_limit_bytes` of the images."""
        return encode_eval(records, self.tokenizer, self.run.data, self.format, **options)

    def encode_boxes(self, records: RecordSet) -> Encoded:
        return encode_boxes(records, self.tokenizer, self.run.data, self.format)


def open_setup(
    run: RunConfig, *, devices: list[jax.Device] | None = None, has_weights: bool = False, trained: Path | None = None
) -> Setup:
    """The setup of a run on `devices` (default: all); puts nothing on them.

    has_weights: the run already has parameters, and needs no checkpoint to start from. trained: the directory of such
      parameters and of their tokenizer.

    Raises:
      ConfigError: weights, tokenizer or data are missing, the checkpoint is of another architecture or the tokenizer of
        another model, the mesh does not fit the devices or the batch, or a subset does not exist.
      DataError: the data cannot be read.
    """
    starts = not has_weights and trained is None
    if starts:
        check_weights(run.model)
        if directory := checkpoint_dir(run.model):
            check_family(directory, run.model.name)
    asked, run = run.mesh, fitted(run, devices or jax.devices())
    mesh = make_mesh(run.mesh, devices)
    if run.mesh != asked:
        print(f"mesh.elastic: {'; '.join(changes(asked, mesh, run))}")
    if run.model.matmul == "fp8" and mesh.devices.flat[0].platform == "cpu":
        print("model.matmul=fp8 is emulated on a CPU: rounded as fp8 is, and slower than float32")
    check_batches(num_shards(mesh), run)
    family = MODELS[run.model.name]
    tokenizer = run_tokenizer(run.model, trained)
    source = open_source(run.data)
    require_subsets(source, (*run.data.subsets, *run.data.subset_weights))
    model = model_config(run.model, tokenizer)
    check_tokens(tokenizer, family, model)
    for directory in filter(None, (trained, checkpoint_dir(run.model))):
        # Random weights may have the package's small tokenizer beside the checkpoint's config.json.
        if not has_weights or has_tokenizer(directory):
            check_token_ids(tokenizer, family, directory)
    if starts:
        check_architecture(run.model, model)
    whole = replicated(model, mesh)
    if whole:
        print(
            f"mesh.tensor={mesh.shape['tensor']} does not divide them, so every device holds whole: {', '.join(whole)}"
        )
    if run.data.source == "prepared":
        check_layout(source.layout, family, model)  # type: ignore[attr-defined]
    row_format = registry.of(model).row_format(model, with_masks=trains_masks(run.model))
    return Setup(run, mesh, tokenizer, model, row_format, source)


def changes(asked: MeshConfig, mesh: Mesh, run: RunConfig) -> Iterator[str]:
    """What an elastic mesh costs. asked: the configuration's."""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if axis != "cell" or size > 1)
    yield f"{mesh.size} devices as {shape}"
    empty = padded_rows(mesh, run.train) - run.train.batch_size
    if empty:
        yield f"batches have {run.train.batch_size + empty} rows, of which {empty} stay empty"
    if asked.fsdp > 0 and asked.tensor > 0:
        share = asked.fsdp * asked.tensor / (mesh.shape["fsdp"] * mesh.shape["tensor"])
        if share > 1:
            yield f"a device holds {share:g} times as much of the parameters and their moments"


def run_tokenizer(model: ModelConfig, trained: Path | None = None) -> Tokenizer:
    """The tokenizer that `model.tokenizer` names; else the one beside the weights; else the package's small one.

    trained: directory of parameters that were trained from the checkpoint; its tokenizer takes precedence.

    Raises:
      ConfigError: a model of released size has no tokenizer.
      DataError: the tokenizer cannot be used.
    """
    if model.tokenizer:
        return load_tokenizer(model.tokenizer)
    paths = list(filter(None, (trained, checkpoint_dir(model))))
    if beside := next(filter(has_tokenizer, paths), None):
        return load_tokenizer(beside)
    if model.name in TINY:
        return load_tokenizer("", registry.of_model(model.name).tokenizer)
    where = f"{paths[-1]} has no tokenizer.model or tokenizer.json" if paths else "model.checkpoint is empty, too"
    raise ConfigError(
        f"model.tokenizer is empty, and {where}; give --config.model.tokenizer=PATH, the tokenizer's file or directory, "
        "of the release that the weights are of"
    )


def with_small_tokenizer(run: RunConfig) -> RunConfig:
    """The run, with the package's small tokenizer if it has none: for random weights whose speed is measured."""
    model, directory = run.model, checkpoint_dir(run.model)
    if model.tokenizer or directory and has_tokenizer(directory):
        return run
    small = SMALL.with_stem(registry.of_model(model.name).tokenizer)
    return dataclasses.replace(run, model=dataclasses.replace(model, tokenizer=str(small)))


def model_config(model: ModelConfig, tokenizer: Tokenizer) -> Config:
    """The architecture of a run's model with its tokenizer's ids, and if it is tiny, with its vocabulary."""
    rows = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if model.name in TINY else None
    return architecture(model, vocab_size=rows, **registry.of_model(model.name).token_ids(tokenizer))


def start_params(setup: Setup, *, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) that a run starts from: those of its checkpoint, or random ones if it names none."""
    directory = weights_dir(setup.run.model)
    if directory is not None:
        check_whole(directory)
    with jax.set_mesh(setup.mesh):
        if directory is None:
            return create(setup.model, setup.mesh, seed=seed)
        with doing(f"loading {directory}"):
            return load_checkpoint(directory, setup.model, setup.mesh, seed=seed)


def to_keep(setup: Setup, trained: nnx.State, frozen: nnx.State, base: str) -> tuple[nnx.State, str]:
    """(parameters, `trained_on`) for `save_params`: all parameters, or with adapters the trained ones and their base.

    base: the checkpoint that the run started from; "": there is none, so all parameters are saved.
    """
    if setup.run.model.lora_rank and base:
        return trained, base
    return join(trained, frozen), ""


def step_flops(encoded: Encoded, config: Config, *, trainable: tuple[str, ...], batch_size: int) -> float | None:
    """FLOPs that the model needs for a step of `batch_size` rows, on average over the records.

    Counts real tokens only, attention as the full square, and no rematerialisation (arXiv 2204.02311, appendix B).
    None for trainings of masks: `families.flops` has no formula for SAM.
    """
    if set(trainable) & set(MASK_PARTS):
        return None
    lengths, counts = np.unique(encoded.arrays["length"], return_counts=True)
    num_logits = encoded.arrays["targets"].shape[1]

    def of_row(length: int) -> float:
        return training(forward(config, length=length, num_logits=num_logits), trainable=trainable)

    mean = sum(int(n) * of_row(int(length)) for length, n in zip(lengths, counts, strict=True)) / counts.sum()
    return float(batch_size * mean)


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bf16 FLOP/s of all devices of the mesh together; None if `chips` does not list them (a CPU)."""
    peak = peak_bf16(mesh.devices.flat[0].device_kind)
    return peak and peak * mesh.devices.size
