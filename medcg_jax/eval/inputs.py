"""What a question needs before there is a model: the checkpoint's folder, the form of its training, pixels, options.

Nothing here imports JAX, so that a wrong path or a broken image is refused at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medcg_jax.config import ConfigError, DataConfig
from medcg_jax.data.images import ImageError, read_image, read_opened
from medcg_jax.data.questions import CLOSING
from medcg_jax.data.reading import Reading, check_reading, check_size
from medcg_jax.data.records import LETTERS, MAX_OPTIONS, DataError
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.families import registry
from medcg_jax.families.weights.files import has_tokenizer
from medcg_jax.families.weights.hub import resolve
from medcg_jax.files import user_path
from medcg_jax.train.meta import META_FILE, read_meta, training_config
from medcg_jax.untrusted import FileError, shown

# Types of an array's pixels, for messages.
ARRAYS = "uint8[h, w] or uint8[h, w, 3] with values 0 to 255, or uint16[h, w] with values 0 to 65535"


@dataclass(frozen=True)
class Form:
    """The form of a checkpoint's questions and how its images are read; fields as of `DataConfig`.

    Attributes:
      system_prompt: None: the one that the family was released with.
      closing: the sentence behind the options of a choice; "": none.
    """

    system_prompt: str | None = None
    closing: str = CLOSING
    window: str = DataConfig.window
    deep_grey: str = DataConfig.deep_grey
    frame: str = DataConfig.frame
    max_pixels: int = DataConfig().max_pixels

    @property
    def reading(self) -> Reading:
        return Reading(self.window, self.deep_grey, self.frame)


def local_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint (`hub.resolve`); of one on the Hugging Face hub the weights are not fetched yet.

    Raises:
      ConfigError: there is no such folder, or as `hub.resolve`.
      RunError: as `hub.resolve`.
    """
    path = resolve(user_path(str(name), "checkpoint"), weights=False)
    if not path.is_dir():
        what = "a file" if path.is_file() else "no such folder"
        raise ConfigError(
            f"checkpoint {name}: {what}; expected a folder that `medcg train` or `medcg convert` wrote, or a released "
            "model's (OWNER/NAME of the Hugging Face hub is fetched)"
        )
    return path


def read_form(checkpoint: Path, **changes: str | int | None) -> Form:
    """The form in which the checkpoint in this folder was trained, or where that is not known the release's.

    changes: fields of `Form` to use instead; None changes nothing.

    Raises:
      ConfigError: `meta.json` of the checkpoint is broken, or a field in it or in `changes` has another type.
      DataError: an unknown window, mapping of deep greys or frame.
    """
    form, path = Form(), checkpoint / META_FILE
    if path.is_file():
        if read_meta(checkpoint) is None:
            raise FileError(f"{path}: no JSON object that can be read; the checkpoint is damaged: make it anew")
        form = _with(form, _trained_form(checkpoint), str(path))
    form = _with(form, {name: value for name, value in changes.items() if value is not None}, "")
    if form.max_pixels < 1:
        raise ConfigError(f"max_pixels={form.max_pixels}: expected 1 or more")
    check_reading(form.reading)
    return form


def _trained_form(checkpoint: Path) -> dict:
    """The fields of `Form` that are recorded of the training of the parameters in this folder."""
    recipe = (read_meta(checkpoint) or {}).get("made_of")
    if isinstance(recipe, dict):  # a base, which phantoms alone pre-train
        return {"closing": "", "system_prompt": recipe.get("system_prompt")}
    data = training_config(checkpoint).get("data", {})
    names = [field.name for field in dataclasses.fields(Form) if field.name != "closing"]
    # Phantoms' questions end with their options (`phantom.world.choice`).
    closing = {"closing": ""} if data.get("source") == "phantom" else {}
    return {name: data[name] for name in names if name in data} | closing


def _with(form: Form, changes: dict, where: str) -> Form:
    """The form with fields changed. where: the file that states them, for the message."""
    for name, value in changes.items():
        kind = int if name == "max_pixels" else str
        if type(value) is not kind and not (name == "system_prompt" and value is None):
            noun = "a whole number" if kind is int else "text"
            raise FileError(f"{where + ': ' if where else ''}{name}={shown(value)}: expected {noun}")
    return dataclasses.replace(form, **changes)


def pixels_of(image: str | Path | Image.Image | np.ndarray, form: Form) -> tuple[np.ndarray, str]:
    """uint8[h, w, 3] RGB, upright, and how it became 8 bits, "" for an ordinary image (`data.images.read_image`).

    image: a file (JPEG, PNG, BMP, GIF, TIFF, WebP, PPM, DICOM), an image of Pillow, or an array of `ARRAYS`.

    Raises:
      ImageError: no image, too large, or of a type or depth that is not read; the message names the file.
    """
    if isinstance(image, str | Path):
        path = user_path(str(image), "image")
        try:
            pixels, read_as = read_image(path, form.max_pixels, form.reading)
        except ImageError as error:
            raise ImageError(f"{image}: {error}") from error
        return pixels, read_as or remark_on(path)
    if isinstance(image, np.ndarray):
        image = _picture(image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"an image of type {type(image).__name__}; expected a path, a PIL.Image, or {ARRAYS}")
    check_size(image.size, form.max_pixels)
    try:
        return read_opened(image, form.reading)
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything for broken data
        raise ImageError(f"a PIL.Image that cannot be decoded: {' '.join(str(error).split())[:200]}") from error


def remark_on(path: str) -> str:
    """What of a picture that could be read is not shown: further frames, transparent parts; "" for an ordinary one."""
    try:
        with Image.open(path) as picture:
            number = getattr(picture, "n_frames", 1)
            alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
            has_holes = alpha is not None and int(np.asarray(alpha).min()) < 255
    except Exception:  # no picture of Pillow
        return ""
    return ", ".join(filter(None, [f"frame 1 of {number}" * (number > 1), "transparent parts on black" * has_holes]))


def _picture(array: np.ndarray) -> Image.Image:
    is_grey, is_colour = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if not array.size or not (
        (array.dtype == np.uint8 and (is_grey or is_colour)) or (array.dtype == np.uint16 and is_grey)
    ):
        shape = ", ".join(map(str, array.shape))
        raise ImageError(f"an array {array.dtype}[{shape}]; expected {ARRAYS}")
    return Image.fromarray(np.ascontiguousarray(array))


def check_question(question: str) -> str:
    """The question without spaces at its ends. Raises DataError if it is no text, or empty."""
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"question={question!r}: expected text")
    return question.strip()


def check_gives_boxes(family: str) -> None:
    """Raises DataError if a family cannot be asked for boxes."""
    if not registry.family(family).gives_boxes:
        giving = " or ".join(entry.title for entry in registry.families() if entry.gives_boxes)
        raise DataError(f"{registry.family(family).title} gives no boxes; expected a checkpoint of {giving}")


def check_spelling(checkpoint: Path, texts: Sequence[str]) -> None:
    """Raises DataError if a text spells a special token of the tokenizer beside the checkpoint, if there is one."""
    if not has_tokenizer(checkpoint):
        return
    tokenizer = load_tokenizer(checkpoint)
    for text in texts:
        tokenizer.encode(text)


def check_new_tokens(count: int) -> None:
    """Raises ConfigError if an answer cannot have so many tokens at most."""
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"max_new_tokens={count!r}; expected a whole number from 1")


def check_options(options: Sequence[str]) -> tuple[str, ...]:
    """The options without spaces at their ends.

    Raises:
      DataError: not 2 to `MAX_OPTIONS`, not all text, one empty, or two equal.
    """
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        raise DataError(f"options={options!r}: expected a list of texts, such as ['normal', 'abnormal']")
    texts = tuple(option.strip() for option in options)
    if not 2 <= len(texts) <= MAX_OPTIONS:
        raise DataError(f"{len(texts)} option{'s' * (len(texts) != 1)}; expected 2 to {MAX_OPTIONS}")
    for number, text in enumerate(texts):
        if not text:
            raise DataError(f"option {LETTERS[number]} is empty; expected text")
        if text in texts[:number]:
            raise DataError(f"options {LETTERS[texts.index(text)]} and {LETTERS[number]} are both {text!r}")
    return texts


def choice_question(question: str, options: Sequence[str], closing: str) -> str:
    """A question with its options on lines of their own, as records have it, and `closing` behind them.

    Example:
      >>> print(choice_question("Is it normal?", ["yes", "no"], "Answer with a letter."))
      Is it normal?
      A: yes
      B: no
      Answer with a letter.
    """
    lines = [question, *(f"{letter}: {option}" for letter, option in zip(LETTERS, options)), closing]
    return "\n".join(filter(None, lines))
