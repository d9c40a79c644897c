"""One question to a model about one image: free text, a choice by the letters' likelihood, or boxes.

`load` opens a checkpoint of any family, and the `Model` answers with the programs of `medcg eval`.
Research software: an answer is no diagnosis.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image, ImageDraw

from medcg_jax.config import BASE_DTYPES, ConfigError
from medcg_jax.data.encoding import USUAL_OPTIONS
from medcg_jax.data.records import LETTERS, MAX_OPTIONS, Turn
from medcg_jax.data.row_format import Arrays
from medcg_jax.data.tokenizer import Tokenizer, load_tokenizer
from medcg_jax.eval.boxes import rounded
from medcg_jax.eval.grounding import make_locator
from medcg_jax.eval.inputs import (
    Form,
    check_gives_boxes,
    check_new_tokens,
    check_options,
    check_question,
    choice_question,
    local_checkpoint,
    pixels_of,
    read_form,
)
from medcg_jax.eval.letters import Evaluator, make_evaluator
from medcg_jax.families import build, registry
from medcg_jax.families.build import Config
from medcg_jax.families.weights.convert import check_same, load_checkpoint, read_config
from medcg_jax.families.weights.files import WeightsError, has_tokenizer
from medcg_jax.families.weights.hub import resolve
from medcg_jax.files import user_path
from medcg_jax.mesh import make_mesh
from medcg_jax.nn.base import Base
from medcg_jax.nn.quant import QUANTIZED
from medcg_jax.train import checksums
from medcg_jax.train.checkpoint import load_params
from medcg_jax.train.log import keep_programs
from medcg_jax.train.sanity import check_sees, check_token_ids, check_tokens, has_closed_gates, pixel_keys

MAX_NEW_TOKENS = 128
# A prompt is padded to a multiple of this, so that another question seldom needs another program.
ROW_MULTIPLE = 64
# Colour of a drawn box, and of the edge that sets it off from any image.
BOX_COLOUR, EDGE_COLOUR = (255, 210, 0), (0, 0, 0)

Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Answer:
    """An answer to one question about one image. `str(answer)` is its text.

    Attributes:
      text: what the model wrote; of a choice the chosen option.
      letter: of the chosen option; "" without options.
      probabilities: option -> its probability among the options, 0 to 1; they sum to 1. {} without options.
      letter_mass: the probability, 0 to 1, of all the options' letters among all tokens: near 0 where the model would
        rather write something else. None without options.
      boxes: x1, y1, x2, y2 in pixels from the image's top left; () where none was asked for, or none can be read.
      is_whole: whether the model ended its text; False where `max_new_tokens` cut it off.
      read_as: how the image became 8 bits and which frame of several it is; "" for an ordinary image.

    Example:
      >>> from medcg_jax import Answer
      >>> answer = Answer("normal", "A", {"normal": 0.75, "abnormal": 0.25}, letter_mass=0.98)
      >>> print(answer, answer.probabilities["abnormal"])
      normal 0.25
    """

    text: str
    letter: str = ""
    probabilities: dict[str, float] = field(default_factory=dict)
    letter_mass: float | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    is_whole: bool = True
    read_as: str = ""

    def __str__(self) -> str:
        return self.text


class Model:
    """A checkpoint on the first device, which answers questions about images; `load` opens one.

    Research software: no medical device, and an answer is no diagnosis.

    An image is a file's path (JPEG, PNG, BMP, GIF, TIFF, WebP, PPM, DICOM), a `PIL.Image`, or an array: uint8[h, w] or
    uint8[h, w, 3] with values 0 to 255, or uint16[h, w] with values 0 to 65535. Other arrays are refused: the range of
    floating-point numbers is not known.

    Attributes:
      path: the checkpoint's folder.
      family: "llava", "qwen2_vl", "mllama", "minigpt_v2" or "next_chat".
      dtype: of the parameters, one of `config.BASE_DTYPES`.
      form: how questions are put and images are read.

    Raises, in every method that asks:
      DataError: the image, question or options cannot be used.
      ConfigError: the prompt does not fit the model, its numbers are not finite, or it does not see its images.
    """

    def __init__(
        self, path: Path, config: Config, tokenizer: Tokenizer, form: Form, mesh: Mesh, graphdef: nnx.GraphDef, params
    ):
        self.path, self.form, self._config, self._tokenizer = path, form, config, tokenizer
        self._mesh, self._graphdef, self._params = mesh, graphdef, params
        self._format = registry.of(config).row_format(config)
        self._shardings = build.shardings(config, mesh)
        # By the number of tokens that they generate.
        self._evaluators: dict[int, Evaluator] = {}
        self._locators: dict[int, Any] = {}
        # Llama-3.2-Vision with random weights sees nothing, and is not to.
        self._sees = has_closed_gates(params)

    @property
    def family(self) -> str:
        return self._config.family

    @property
    def dtype(self) -> str:
        return self._config.base.dtype

    @property
    def device(self) -> str:
        """The kind of the device, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
        return self._mesh.devices.flat[0].device_kind

    @property
    def system_prompt(self) -> str:
        """As `DataConfig.system_prompt`."""
        stated = self.form.system_prompt
        return self._format.prompts.released_system_prompt if stated is None else stated

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, family={self.family!r}, dtype={self.dtype!r}, device={self.device!r})"

    @overload
    def ask(self, image: Picture, question: str, options: None = None, *, max_new_tokens: int = ...) -> str: ...

    @overload
    def ask(self, image: Picture, question: str, options: Sequence[str]) -> Answer: ...

    def ask(self, image, question, options=None, *, max_new_tokens=MAX_NEW_TOKENS):
        """The model's text; with options an `Answer`, as of `choose`. A convenience over `generate` and `choose`.

        Example:
          >>> import medcg_jax as m
          >>> model = m.load("runs/first")
          >>> text = model.ask("scan.png", "What is this?", max_new_tokens=8)
          >>> answer = model.ask("scan.png", "Is it normal?", options=["normal", "abnormal"])
          >>> answer.letter in ("A", "B")
          True
          >>> answer.text == {"A": "normal", "B": "abnormal"}[answer.letter]
          True
        """
        if options is None:
            return self.generate(image, question, max_new_tokens=max_new_tokens).text
        return self.choose(image, question, options)

    def score(self, image: Picture, question: str, options: Sequence[str]) -> dict[str, float]:
        """Option -> its probability among the options, 0 to 1.

        Example:
          >>> import medcg_jax as m
          >>> scores = m.load("runs/first").score("scan.png", "Is it normal?", ["normal", "abnormal"])
          >>> list(scores), round(sum(scores.values()), 6)
          (['normal', 'abnormal'], 1.0)
        """
        return self.choose(image, question, options).probabilities

    def generate(self, image: Picture, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """Free text, generated greedily: always the likeliest next token."""
        check_new_tokens(max_new_tokens)
        pixels, read_as = pixels_of(image, self.form)
        row = self._row(pixels, check_question(question), max_new_tokens)
        # The score of the token that ends a text is only checked.
        _, tokens = self._scores(self._evaluator(max_new_tokens), row, [self._tokenizer.eos_id])
        return dataclasses.replace(self._text(tokens), read_as=read_as)

    def choose(self, image: Picture, question: str, options: Sequence[str]) -> Answer:
        """The option whose letter is the likeliest next token, with the probability of each.

        options: 2 to 10 different texts. The model is asked `question` with the options as A, B, ... on lines below it.
        """
        options = check_options(options)
        asked = choice_question(check_question(question), options, self.form.closing)
        pixels, read_as = pixels_of(image, self.form)
        row = self._row(pixels, asked)
        ids = self._format.prompts.option_ids(
            self._tokenizer, (Turn(asked, ""),), len(options), system_prompt=self.system_prompt, has_image=True
        )
        logprobs, _ = self._scores(self._evaluator(0), row, ids)
        shares = np.exp(logprobs.astype(np.float64))
        best = int(logprobs.argmax())
        # Against the largest, since all of them may be tiny.
        among = np.exp(logprobs.astype(np.float64) - logprobs.max())
        probabilities = dict(zip(options, (among / among.sum()).tolist(), strict=True))
        mass = min(1.0, float(shares.sum()))
        return Answer(options[best], LETTERS[best], probabilities, letter_mass=mass, read_as=read_as)

    def locate(self, image: Picture, question: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """An answer with boxes, of MiniGPT-v2 and NExT-Chat. MiniGPT-v2 is asked with its tag `[detection]`.

        Raises:
          DataError: the family gives no boxes.

        Example:
          >>> import medcg_jax as m
          >>> model = m.load("runs/boxes")
          >>> answer = model.locate("scan.png", "Where is the liver?", max_new_tokens=8)
          >>> all(len(box) == 4 for box in answer.boxes)
          True
        """
        check_gives_boxes(self.family)
        ask_for, read = self._format.box_question, self._format.read_boxes
        assert ask_for is not None and read is not None, "a family with boxes"
        check_new_tokens(max_new_tokens)
        pixels, read_as = pixels_of(image, self.form)
        row = self._row(pixels, ask_for(check_question(question)), max_new_tokens)
        self._scores(self._evaluator(0), row, [self._tokenizer.eos_id])
        if max_new_tokens not in self._locators:
            self._locators[max_new_tokens] = make_locator(
                self._mesh,
                self._graphdef,
                self._shardings,
                eos_id=self._tokenizer.eos_id,
                max_new_tokens=max_new_tokens,
            )
        output = jax.device_get(self._locators[max_new_tokens](self._params, row))
        answer = dataclasses.replace(self._text(output["tokens"]), read_as=read_as)
        decoded = output["boxes"][0, : output["count"][0]] if "boxes" in output else None
        boxes = read(answer.text, decoded, pixels.shape[:2])
        if boxes is None:
            return answer
        self._check_finite(boxes)
        return dataclasses.replace(answer, boxes=rounded(boxes))

    def _evaluator(self, num_new: int) -> Evaluator:
        """The program that scores letters, and generates `num_new` tokens if that is above 0."""
        if num_new not in self._evaluators:
            self._evaluators[num_new] = make_evaluator(
                self._mesh, self._graphdef, self._shardings, eos_id=self._tokenizer.eos_id, max_new_tokens=num_new,
                generate=num_new > 0,
            )  # fmt: skip
        return self._evaluators[num_new]

    def _row(self, pixels: np.ndarray, question: str, max_new_tokens: int = 0) -> Arrays:
        """The batch of one prompt: what `data.encoding.Encoded.rows` gives, without options. pixels: uint8[h, w, 3]."""
        fmt, (height, width) = self._format, pixels.shape[:2]
        num_image = fmt.max_image_tokens if fmt.num_image_tokens is None else fmt.num_image_tokens(height, width)
        ids = fmt.prompts.evaluation_prompt(
            self._tokenizer, (Turn(question, ""),), system_prompt=self.system_prompt, num_image_tokens=num_image
        )
        context = self._config.text.max_positions
        if len(ids) + max_new_tokens > context:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens}; expected at most {context} "
                "tokens, the model's context"
            )
        length = -(-len(ids) // ROW_MULTIPLE) * ROW_MULTIPLE
        tokens = np.full((1, length), self._tokenizer.pad_id, np.int32)
        tokens[0, : len(ids)] = ids
        images = {key: np.array(array)[None, None] for key, array in fmt.preprocess(pixels).items()}
        return {
            "tokens": tokens, "segment_ids": (np.arange(length) < len(ids)).astype(np.int32)[None],
            "last_position": np.array([len(ids) - 1], np.int32), **images,
        }  # fmt: skip

    def _scores(self, evaluator: Evaluator, row: Arrays, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(float32[K] log-probabilities of these K tokens at the prompt's end, int32[1, N] generated tokens)."""
        option_ids = np.full((1, USUAL_OPTIONS if len(ids) <= USUAL_OPTIONS else MAX_OPTIONS), -1, np.int32)
        option_ids[0, : len(ids)] = ids
        batch = {**row, "option_ids": option_ids}
        logprobs, tokens = jax.device_get(evaluator(self._params, batch))
        self._check_finite(logprobs[0, : len(ids)])
        if not self._sees:

            def scored(other) -> list[np.ndarray]:
                return [logprobs if other is batch else jax.device_get(evaluator(self._params, other)[0])]

            self._sees = check_sees(scored, batch, pixel_keys(self._format.blank), str(self.path))
        return logprobs[0, : len(ids)], tokens

    def _check_finite(self, numbers: np.ndarray) -> None:
        if not np.isfinite(numbers).all():
            raise ConfigError(
                f"{self.path}: the model answers with numbers that are not finite; its weights are damaged, or its "
                "training diverged"
            )

    def _text(self, tokens: np.ndarray) -> Answer:
        """The answer of generated tokens int32[1, N]."""
        generated = tokens[0].tolist()
        return Answer(self._tokenizer.decode(generated), is_whole=self._tokenizer.eos_id in generated)


def load(
    checkpoint: str | Path, *, dtype: str = "", tokenizer: str | Path = "", base: str | Path = "", **form: Any
) -> Model:
    """Opens a checkpoint of any of the five families on the first device.

    Compiled programs are kept for later starts, as by every verb (`train.log.keep_programs`).

    Args:
      checkpoint: folder of `medcg train` (its workdir, or `params` in it) or of `medcg convert`, or a released model's;
        or its name on the Hugging Face hub, "OWNER/NAME" or "OWNER/NAME@REVISION", which is fetched (`weights.hub`).
      dtype: of the parameters: "float32", "bfloat16", "int8" or "nf4"; with any but float32 the model computes in
        bfloat16. "": int8 or nf4 where the checkpoint was trained on such a base, else float32 up to 500 million
        parameters and bfloat16 above.
      tokenizer: file or folder; "": the one beside the weights.
      base: folder of the checkpoint that this one was trained on, where it is not known or has moved.
      form: to replace what the checkpoint was trained with: `system_prompt`, `closing` (the sentence behind the options
        of a choice), and for the images `window`, `deep_grey`, `frame`, `max_pixels` (as `DataConfig`'s).

    Raises:
      ConfigError: no checkpoint, or one that cannot be read or is of another architecture than its files state.
      DataError: the tokenizer cannot be used, or is of another family.

    Example:
      >>> import medcg_jax as m
      >>> model = m.load("runs/first")
      >>> model.dtype, model.device
      ('float32', 'cpu')
    """
    path = local_checkpoint(checkpoint)
    if unknown := sorted(form.keys() - {field.name for field in dataclasses.fields(Form)}):
        accepted = ", ".join(field.name for field in dataclasses.fields(Form))
        raise ConfigError(f"load: {unknown[0]} is unknown; accepted: {accepted}")
    wanted = read_form(path, **form)
    keep_programs()
    below = resolve(user_path(str(base), "base")) if base else None
    config = architecture(path, below)
    words = tokenizer_of(path, below, tokenizer)
    ids: dict[str, Any] = registry.of(config).token_ids(words)
    config = dataclasses.replace(config, **ids)
    check_tokens(words, config.family, config)
    check_token_ids(words, config.family, path)
    config = with_dtype(config, dtype)
    # Of the hub the weights are fetched last.
    resolve(user_path(str(checkpoint), "checkpoint"))
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        if checksums.are_in(path):
            graphdef, params, _ = load_params(path, config, mesh, base=str(below or ""))
        else:
            graphdef, params = load_checkpoint(path, config, mesh, parts={"base": below} if below else {})
    return Model(path, config, words, wanted, mesh, graphdef, params)


def architecture(path: Path, base: Path | None = None) -> Config:
    """The architecture that a checkpoint's files state, with the vocabulary of the named size that it is, if any.

    A release may have more rows than its vocabulary (llava-hf pads 32000 to 32064); `medcg eval` drops them too.

    Raises:
      WeightsError: as `convert.open_checkpoint`.
    """
    config = read_config(path, parts={"base": base} if base else {})
    for size in registry.of(config).released:
        named = build.SIZES[size]()
        try:
            check_same(config, named, path)
        except WeightsError:
            continue
        return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=named.text.vocab_size))
    return config


def tokenizer_of(path: Path, base: Path | None, tokenizer: str | Path) -> Tokenizer:
    """The tokenizer in `tokenizer`, else beside the weights, else beside those of the base.

    Raises:
      ConfigError: there is none. DataError: it cannot be used.
    """
    if tokenizer:
        return load_tokenizer(tokenizer)
    beside = next(filter(has_tokenizer, filter(None, (path, base))), None)
    if beside is None:
        raise ConfigError(
            f"{path} has no tokenizer.model or tokenizer.json; give one with --tokenizer=FILE (Python: tokenizer=FILE)"
        )
    return load_tokenizer(beside)


def with_dtype(config: Config, dtype: str) -> Config:
    """The architecture as it runs: parameters in `dtype` (`load`), without rematerialisation."""
    if not dtype:
        if config.base.dtype in QUANTIZED:
            dtype = config.base.dtype
        else:
            many = build.num_params(build.abstract(config)[1]) > build.MOST_IN_FLOAT32
            dtype = "bfloat16" if many else "float32"
    if dtype not in BASE_DTYPES:
        raise ConfigError(f"dtype={dtype!r}; expected {', '.join(BASE_DTYPES)}")
    # A quantised base as it was in training, with the parts beside it that were trained; of other bases all parts.
    base = config.base if dtype in QUANTIZED and dtype == config.base.dtype else Base(dtype)
    compute = "float32" if dtype == "float32" else "bfloat16"
    # One layer a step of the scan: a single question takes less time than the compilation of all layers at once.
    runs: dict[str, Any] = dict(remat="none", attention="auto", scan_unroll=1)
    return dataclasses.replace(config, compute_dtype=compute, base=base, **runs)


def draw_boxes(pixels: np.ndarray, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """A copy of an image uint8[h, w, 3] with boxes x1, y1, x2, y2 in pixels; what lies outside it is cut off."""
    picture = Image.fromarray(np.array(pixels, np.uint8))
    pen = ImageDraw.Draw(picture)
    width = max(1, round(max(picture.size) / 300))
    for x1, y1, x2, y2 in boxes:
        # Corners lie between pixels, and Pillow's between the middles of pixels.
        left, top, right, bottom = (
            int(np.clip(value, -width, side + width)) - last
            for value, side, last in zip((x1, y1, x2, y2), picture.size * 2, (0, 0, 1, 1))
        )
        right, bottom = max(left, right), max(top, bottom)
        pen.rectangle((left - width, top - width, right + width, bottom + width), outline=EDGE_COLOUR, width=width)
        pen.rectangle((left, top, right, bottom), outline=BOX_COLOUR, width=width)
    return picture
