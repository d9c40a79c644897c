"""The model card of exported weights: data, recipe, results with their intervals, limits, licence, how it was made.

Everything in it was recorded by the training (`meta.json`, or a grid's `config.json`) or by `medcg eval` beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medcg_jax.eval import boxes
from medcg_jax.eval.predictions import Prediction, prediction_lines, summary
from medcg_jax.families import registry
from medcg_jax.families.weights.convert import Checkpoint
from medcg_jax.families.weights.hub import REPOSITORY
from medcg_jax.families.weights.processor import FILES
from medcg_jax.train.meta import META_FILE, grid_cell, training_config
from medcg_jax.untrusted import FileError

# Folders of answers with letters, and with boxes.
ANSWERS, BOXES = "predictions", "boxes"
# What a reader of a recipe looks for, in this order.
RECIPE = (
    "train.epochs", "train.steps", "train.batch_size", "train.learning_rate", "train.warmup_frac",
    "train.end_learning_rate_frac", "train.weight_decay", "train.clip_norm", "train.param_dtype", "train.seed",
    "model.trainable", "model.trainable_words", "model.lora_rank", "model.lora_alpha", "model.base_dtype",
    "model.compute_dtype", "data.system_prompt", "data.max_text_tokens", "data.seed",
)  # fmt: skip
# The original code of families that transformers does not have.
ORIGINAL = {"minigpt_v2": "Vision-CAIR/MiniGPT-4", "next_chat": "NExT-ChatV/NExT-Chat"}
HOW = {
    "hf": """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("PATH")
model = AutoModelForImageTextToText.from_pretrained("PATH")
question = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "..."}]}
inputs = processor.apply_chat_template(
    [question], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
print(processor.decode(model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]))
```
""",
    "peft": """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("BASE"), "PATH")
```
""",
}


@dataclass(frozen=True)
class Training:
    """What is recorded of the training that wrote a checkpoint.

    config: sections of its `RunConfig`; {} if the checkpoint was not trained here. cell: of a grid; "": `medcg train`.
    results: "predictions/SUBSET" or "boxes/SUBSET" -> "n", and as shares "accuracy", "ci_low", "ci_high", "chance".
    notes: why something is not among the results.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    cell: str = ""
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def system_prompt(self) -> str | None:
        """`data.system_prompt` of the training; None if there was none."""
        prompt = self.config.get("data", {}).get("system_prompt")
        return prompt if isinstance(prompt, str) else None


def training_of(src: Path) -> Training:
    """What is recorded of the training that wrote the checkpoint `src`: WORKDIR/params, or a grid's WORKDIR/weights/JOB.

    Raises:
      FileError: the grid's config.json is damaged.
    """
    cell, workdir, names = grid_cell(src), src.absolute().parent, "*"
    if cell:
        workdir, names = workdir.parent, cell
    config = training_config(src)
    if not {"model", "data"} <= config.keys():
        return Training()
    files = [path for folder in (ANSWERS, BOXES) for path in sorted((workdir / folder).glob(f"{names}.jsonl"))]
    results: dict[str, dict] = {}
    notes = []
    for file in files:
        if file.stat().st_mtime < (src / META_FILE).stat().st_mtime:
            notes.append(f"`{file.name}` is older than these weights and is not among the results")
            continue
        try:
            by_subset = box_results_of(file) if file.parent.name == BOXES else results_of(file)
            results |= {f"{file.parent.name}/{subset}": scores for subset, scores in by_subset.items()}
        except FileError:  # its message has a path of this machine
            notes.append(f"`{file.name}` cannot be read and is not among the results")
    return Training(config, cell, results, tuple(notes))


def results_of(file: Path) -> dict[str, dict]:
    """Subset -> the summary of its predictions in a file, with "chance"."""
    by_subset: dict[str, list[Prediction]] = {}
    for line in prediction_lines(file):
        fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in line.items()}
        prediction = Prediction(**(fields | {"logprobs": fields["logprobs"] or ()}))
        by_subset.setdefault(prediction.subset, []).append(prediction)
    return {
        subset: scores_of(answers) | {"chance": sum(1 / len(answer.options) for answer in answers) / len(answers)}
        for subset, answers in by_subset.items()
    }


def scores_of(answers: list[Prediction]) -> dict:
    scores = summary(answers)
    return {name: scores[name] for name in ("n", "accuracy", "ci_low", "ci_high")}


def box_results_of(file: Path) -> dict[str, dict]:
    """As `results_of`, of questions about boxes; "n" boxes, "chance" by another image of the same label, or None."""
    by_subset: dict[str, list[boxes.BoxAnswer]] = {}
    for answer in boxes.read_answers(file):
        by_subset.setdefault(answer.subset, []).append(answer)
    results = {}
    for subset, answers in by_subset.items():
        scores = boxes.summary(answers)
        low, high = scores["accuracy_low"], scores["accuracy_high"]
        named = {"ci_low": low, "ci_high": high, "chance": scores["by_chance"]}
        results[subset] = {"n": scores["n"], "accuracy": scores["accuracy"]} | named
    return results


def model_card(checkpoint: Checkpoint, training: Training, to: str, notes: Sequence[str] = ()) -> str:
    """The text of the card. to: as of `medcg convert`, "hf" or "peft". notes: further limits, of this export."""
    family = registry.of(checkpoint.config)
    base = start_of(checkpoint, training)
    title = f"{family.title.removesuffix('-7B')}, {'fine-tuned' if training.config else 'converted'} with medcg-jax"
    sections = {}
    if training.config:
        sections["Data"] = data_lines(training.config["data"])
        sections["Recipe"] = recipe_lines(training, base)
        sections["Result"] = result_lines(training)
    else:
        release = code(base or name_of(checkpoint.src))
        sections["What it is"] = [
            f"The weights of {release} in transformers' layout; the card of that release applies."
        ]
    sections["Limits"] = [*limit_lines(checkpoint.config, training), *(f"- In this export {note}." for note in notes)]
    sections["Licence"] = licence_lines(base, training)
    sections["How it was made, and how to use it"] = use_lines(family, base, to)
    lines = [*front_matter(family, base, to), f"# {title}"]
    for heading, content in sections.items():
        lines += ["", f"## {heading}", "", *content]
    return "\n".join(lines) + "\n"


def start_of(checkpoint: Checkpoint, training: Training) -> str:
    """The hub's name of what the training started from, or its folder's name; "": random weights, or not known."""
    name = training.config.get("model", {}).get("checkpoint", "") or checkpoint.trained_on
    # Runs write down a repository with its commit, which a path does not have.
    return name if "@" in name and REPOSITORY.fullmatch(name) else Path(name).name


def name_of(folder: Path) -> str:
    """A checkpoint's folder by its name; one in the hub's cache by its repository and commit."""
    if folder.parent.name != "snapshots":
        return folder.name
    return f"{folder.parents[1].name.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"


def front_matter(family: registry.Family, base: str, to: str) -> list[str]:
    """The fields that the hub reads."""
    library = "peft" if to == "peft" else "transformers" if family.name in FILES else "pytorch"
    named = [f"base_model: {base.partition('@')[0]}"] if REPOSITORY.fullmatch(base) else []
    about = [f"library_name: {library}", "pipeline_tag: image-text-to-text", *named, "license: other"]
    return ["---", *about, "tags:", "- medical", "- medcg-jax", f"- {family.name}", "---", ""]


def code(text: Any) -> str:
    """A value as code in Markdown."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def data_lines(data: Mapping[str, Any]) -> list[str]:
    names = data.get("subsets") or []
    which = f"the subsets {', '.join(map(code, names))}" if names else "all subsets with choice questions"
    if data.get("source") == "phantom":
        return [f"Drawn pictures of a made-up world (phantoms), {which}: no medical image was used."]
    most = data.get("train_records_per_subset")
    share = f"; a share of {data['imagewikiqa_share']:g} general records" if data.get("imagewikiqa_share") else ""
    return [
        f"Med-MAT (FreedomIntelligence/Med-MAT; arXiv 2412.20070), {which}, at most {most} label-balanced training records of "
        f"each{share}. Records that leak a test were treated as the recipe's `study.leaks` says."
    ]


def recipe_lines(training: Training, base: str) -> list[str]:
    values = [(key, training.config.get(key.partition(".")[0], {}).get(key.partition(".")[2])) for key in RECIPE]
    rows = [f"| {code(key)} | {code(json.dumps(value))} |" for key, value in values if value not in (None, "", [], 0)]
    start = code(base) if base else "random weights, or a base that was trained from them"
    cell = [f"Cell {code(training.cell)} of a grid."] if training.cell else []
    return [f"Started from {start}. {' '.join(cell)}".strip(), "", "| field | value |", "|---|---|", *rows]


def result_lines(training: Training) -> list[str]:
    rows = []
    for name, scores in training.results.items():
        kind, _, subset = name.partition("/")
        chance = "-" if scores["chance"] is None else f"{scores['chance']:.3f}"
        interval = f"{scores['ci_low']:.3f} to {scores['ci_high']:.3f}"
        what = "letter" if kind == ANSWERS else "box"
        rows.append(f"| {code(subset)} | {what} | {scores['n']} | {scores['accuracy']:.3f} | {interval} | {chance} |")
    notes = [f"- {note}" for note in training.notes]
    if not rows:
        return ["Not tested: no predictions of `medcg eval` lie beside the weights.", *notes]
    head = ["| subset | answer | n | accuracy | 95 % interval | chance |", "|---|---|---|---|---|---|"]
    what = (
        "Test questions. A letter is the one with the largest likelihood; a box is right if it and the true one share more "
        "than half of their union."
    )
    return [what, "", *head, *rows, *([""] if notes else []), *notes]


def limit_lines(config, training: Training) -> list[str]:
    lines = ["- No medical device: no diagnosis or treatment may rest on its answers."]
    if training.config:
        lines += [
            "- Trained to answer choice questions with a letter; what it says beyond that was not tested.",
            "- What is not among the results above was not measured: other devices, hospitals, patients and questions.",
        ]
    if config.family == "mllama" and config.intermediate_from != "output":
        lines.append(
            "- Inner layers of the tower contribute their inputs, as in Meta's model; transformers 4.57 to 5.23 takes their "
            "outputs, so that its answers differ (train with `model.intermediate_from=output` for these)."
        )
    if config.family == "llava":
        lines.append(
            "- Images are padded to squares, as in the training; a processor that crops them shows it other images."
        )
    return lines


def licence_lines(base: str, training: Training) -> list[str]:
    start = code(base) if base else "the checkpoint that was started from, if any"
    lines = [f"This card grants none. The weights stay under the licence of {start}."]
    if training.config and training.config["data"].get("source") != "phantom":
        lines.append(
            "The images that they were trained on stay under their hosts' terms (`medcg data ledger` lists the hosts), "
            "some of which allow research only."
        )
    return lines


def use_lines(family: registry.Family, base: str, to: str) -> list[str]:
    origin = f"Written by `medcg convert --to={to}` of medcg-jax {version('medcg-jax')}."
    if family.name in ORIGINAL and to == "hf":
        return [
            origin,
            "",
            f"transformers has no such model; the original code reads this folder: {ORIGINAL[family.name]} on GitHub.",
        ]
    if family.name in ORIGINAL:
        return [origin, "", f"The adapters belong to the Llama in the model of {ORIGINAL[family.name]} (GitHub)."]
    return [origin, "", HOW[to].replace("BASE", base.partition("@")[0] or "the start checkpoint").rstrip()]
