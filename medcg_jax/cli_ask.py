"""`medcg ask`: reads flags, asks a model one question about one image, prints its answer."""

import dataclasses
import io
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from medcg_jax.cli_parser import Parser, add
from medcg_jax.config import BASE_DTYPES, ConfigError

CAUTION = "Research software: no medical device, and an answer is no diagnosis."
# Flags that replace a field of `eval.inputs.Form`.
FORM = {
    "system_prompt": ("TEXT", "before the question; default: the one of its training, else of the model's release"),
    "closing": ("TEXT", "sentence behind the options of a choice; default: as in its training, else the release's"),
    "window": (
        "WINDOW",
        "of DICOM and deep greys: a preset (lung, brain, ...) or CENTER/WIDTH; default: the file's own",
    ),
    "deep_grey": ("WAY", "greys of 16 bits: range, percentile or window"),
    "frame": ("FRAME", "of several: first, middle, last or a number from 0"),
}
_OPTION = re.compile(r"([A-Za-z]+)=(.*)", re.DOTALL)


def add_ask(verbs) -> None:
    """Adds the verb `ask`."""
    ask: Parser = add(verbs, "ask", run_ask, "one question to a model about one image: free text, a choice, or boxes")
    ask.description = f"{ask.description}. {CAUTION}"
    ask.epilog = (
        "Without --option and --boxes the model writes free text. Image flags default to those of its training."
    )
    text = "folder of `medcg train` or `medcg convert`, or of a released model; or its name on the Hugging Face hub"
    ask.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    ask.add_argument("image", metavar="IMAGE", help="JPEG, PNG, BMP, GIF, TIFF, WebP or DICOM")
    ask.add_argument("question", metavar="QUESTION")
    text = "an answer to choose from, A first: give 2 to 10; each gets its probability among them"
    ask.add_argument("--option", action="append", default=[], metavar="A=TEXT", help=text)
    ask.add_argument("--boxes", action="store_true", help="ask for boxes (MiniGPT-v2 and NExT-Chat)")
    ask.add_argument(
        "--out", default="", metavar="FILE.png", help="with --boxes: a copy of the image with them; a new file"
    )
    ask.add_argument(
        "--max_new_tokens", type=int, default=128, metavar="N", help="of free text or boxes, at most (128)"
    )
    text = "of the parameters; default: float32, for a model of more than 500 million parameters bfloat16"
    ask.add_argument("--dtype", choices=BASE_DTYPES, default="", help=text)
    text = "the model's tokenizer, where none is beside its weights"
    ask.add_argument("--tokenizer", default="", metavar="PATH", help=text)
    text = "what CHECKPOINT was trained on, where it holds only the trained parts and that has moved"
    ask.add_argument("--base", default="", metavar="DIR", help=text)
    for name, (metavar, text) in FORM.items():
        ask.add_argument(f"--{name}", default=None, metavar=metavar, help=text)
    ask.add_argument("--max_pixels", type=int, default=None, metavar="N", help="of an image")


def run_ask(args) -> dict:
    began = time.monotonic()
    options = read_options(args.option)
    if options and args.boxes:
        raise ConfigError("--option with --boxes: expected one of them")
    if args.out and not args.boxes:
        raise ConfigError(f"--out={args.out}: expected with --boxes only")
    if args.out:
        check_new_png(args.out)
    from medcg_jax.eval import inputs
    from medcg_jax.families.weights.kind import family_in

    form = {name: getattr(args, name) for name in (*FORM, "max_pixels")}
    checkpoint = inputs.local_checkpoint(args.checkpoint)
    inputs.check_question(args.question)
    inputs.check_new_tokens(args.max_new_tokens)
    options = inputs.check_options(options) if options else ()
    if args.boxes and (family := family_in(checkpoint)):
        inputs.check_gives_boxes(family)
    if not args.tokenizer:
        inputs.check_spelling(checkpoint, [args.question, *options])
    pixels, read_as = inputs.pixels_of(args.image, inputs.read_form(checkpoint, **form))

    from medcg_jax import platform

    platform.apply(frozenset({"deterministic"}))
    from medcg_jax.eval import ask

    model = ask.load(args.checkpoint, dtype=args.dtype, tokenizer=args.tokenizer, base=args.base, **form)
    if options:
        answer = model.choose(pixels, args.question, options)
    elif args.boxes:
        answer = model.locate(pixels, args.question, max_new_tokens=args.max_new_tokens)
    else:
        answer = model.generate(pixels, args.question, max_new_tokens=args.max_new_tokens)
    drawn = args.out if answer.boxes else ""
    if drawn:
        write_new_png(drawn, ask.draw_boxes(pixels, answer.boxes))
    seconds = time.monotonic() - began
    about = f"{model.family} from {model.path} in {model.dtype} on {model.device}, {seconds:.1f} s"
    lines = [*answer_lines(answer, args.boxes, args.max_new_tokens), *([drawn] if drawn else [])]
    print("\n".join([*lines, f"{about}; image read as {read_as}" if read_as else about]))
    return {
        **dataclasses.asdict(answer), "question": args.question, "image": args.image, "read_as": read_as,
        "out": drawn, "checkpoint": str(model.path), "family": model.family, "dtype": model.dtype,
        "device": model.device, "system_prompt": model.system_prompt, "closing": model.form.closing,
        "seconds": round(seconds, 3),
    }  # fmt: skip


def read_options(given: Sequence[str]) -> list[str]:
    """The texts of flags "A=TEXT", which must come in the order of the letters.

    Raises:
      ConfigError: a flag of another form, or another letter than the next one.
    """
    from medcg_jax.data.records import LETTERS

    texts: list[str] = []
    for flag in given:
        match = _OPTION.fullmatch(flag)
        if match is None:
            raise ConfigError(f"--option={flag}: expected a letter and its text, such as --option A=normal")
        letter = LETTERS[len(texts)] if len(texts) < len(LETTERS) else ""
        if match[1] != letter:
            again = "stands twice" if match[1] in LETTERS[: len(texts)] else f"is not {letter or 'a further letter'}"
            raise ConfigError(f"--option={flag}: the letter {match[1]} {again}; expected A, B, ... in this order")
        texts.append(match[2])
    return texts


def answer_lines(answer, has_boxes: bool, max_new_tokens: int) -> list[str]:
    """An `eval.ask.Answer` for people: the answer first, then options with probabilities, or boxes."""
    if answer.letter:
        return [f"{answer.letter}: {answer.text}", *option_lines(answer.probabilities, answer.letter_mass)]
    lines = [printable(answer.text) or "(no text)"]
    if not answer.is_whole:
        lines.append(f"(cut off after {max_new_tokens} tokens; --max_new_tokens=N gives more)")
    if has_boxes:
        lines += [" ".join(f"{value:.1f}" for value in box) for box in answer.boxes] or ["(no box could be read)"]
    return lines


def option_lines(probabilities: Mapping[str, float], letter_mass: float) -> list[str]:
    """The options with their probabilities, aligned."""
    from medcg_jax.data.records import LETTERS

    width = max(map(len, probabilities))
    lines = [f"{letter}  {text:{width}}  {p:.3f}" for letter, (text, p) in zip(LETTERS, probabilities.items())]
    return [*lines, f"probability of these letters together, among all tokens: {letter_mass:.3g}"]


def printable(text: str) -> str:
    """A model's text without spaces at its ends and without characters that steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.strip())


def check_new_png(path: str) -> None:
    """Raises ConfigError if `path` exists or does not end in .png."""
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"--out={path}: expected a file name that ends in .png")
    if os.path.lexists(path):
        raise ConfigError(f"--out={path} exists; expected a new file")


def write_new_png(path: str, picture) -> None:
    """Writes an image of Pillow, whole or not at all, and creates its folders. Raises ConfigError if `path` exists."""
    content, target = io.BytesIO(), Path(path)
    picture.save(content, "PNG")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        unfinished.write_bytes(content.getvalue())
        check_new_png(path)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
