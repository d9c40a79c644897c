"""A page for each subset that was tested: its scores, what is taken for what, and mistakes with their images."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from medcg_jax.data.phantom.world import TASKS
from medcg_jax.data.records import LETTERS
from medcg_jax.study.report.file_tables import confusion, subset_scores
from medcg_jax.study.report.folders import write_text
from medcg_jax.study.report.layout import Section, page_html
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.report.samples import Cards, mistakes

# Words of labels from the mildest finding to the gravest; a label has the place of the first word that it holds.
SEVERITY = (
    ("normal", "healthy", "no", "none", "negative", "absent", "without"),
    ("benign", "early", "minimal"),
    ("mild", "low", "slight"),
    ("moderate", "intermediate", "medium"),
    ("severe", "high", "advanced"),
    ("proliferative", "late", "malignant", "abnormal", "positive", "present", "with"),
)
ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5}


def write_subset_pages(grid: Grid, folder: Path, files: dict[str, str]) -> list[str]:
    """Writes the page of each subset; returns their lines in the list of subsets. files: subset -> its page."""
    folder.mkdir(exist_ok=True)
    names, items = list(files), []
    for number, name in enumerate(names):
        beside = [("previous", number - 1)] * (number > 0) + [("next", number + 1)] * (number + 1 < len(names))
        around = [(relation, files[names[i]], subset_title(grid, names[i])) for relation, i in beside]
        items.append(_write(grid, folder, name, files[name], around))
    return items


def subset_title(grid: Grid, name: str) -> str:
    """Such as "CT, Lung, Cancer (subset 02)" and "ct, liver, stage"; its name alone where the subset is not known."""
    subset = grid.subset(name)
    if subset is None:
        return name
    what = ", ".join((subset.modality, subset.area, subset.task)) if grid.of_phantoms else grid.describe(name)
    return what if grid.of_phantoms else f"{what} (subset {name})"


def _write(grid: Grid, folder: Path, target: str, file: str, around: Sequence[tuple[str, str, str]]) -> str:
    cards, answers = mistakes(grid, target)
    words = (
        f"{cards.num_wrong} of {cards.num_answers} answers of {cards.model} are wrong. Shown are those with the highest "
        "probability of the wrong letter among the letters offered, at most twelve."
        if cards.model
        else "No arm that is trained for another subset was tested on this one."
    )
    order = in_order(label_names(answers), TASKS.get(target.rpartition("-")[2], ()) if grid.of_phantoms else ())
    labels, scores = confusion(answers, order), subset_scores(grid, target)
    sections = [
        Section(id="scores", title="Scores", tables=[scores], facts=_facts(grid, target, cards, order)),
        Section(
            id="confusion",
            title=labels.title,
            tables=[labels] if answers else [],
            paragraphs=[f"Answers of {cards.model}."] if answers else [],
        ),
        Section(
            id="mistakes",
            title="Mistakes to look at",
            paragraphs=[words],
            cards=[("", "wrong", cards.wrong)],
            notes=[cards.absent] if cards.absent else [],
        ),
    ]
    title, name = subset_title(grid, target), grid.config["name"]
    sub = Markup('<a href="../index.html">Grid “{}”</a>, {}').format(name, grid.model)
    write_text(folder / file, page_html(title, sub, sections, title=f"{title}: {name}", around=around))
    right = cards.num_answers and f": {100 - 100 * cards.num_wrong / cards.num_answers:.1f} %"
    what = grid.describe(target)
    return Markup('<a href="subsets/{}">{}</a>{}{}').format(file, target, what and f" {what}", right or "")


def _facts(grid: Grid, target: str, cards: Cards, order: Sequence[str]) -> list[tuple[str, str]]:
    chance = grid.chance(target)
    right = cards.num_answers - cards.num_wrong
    facts = [
        ("subset", target),
        ("chance", chance is not None and f"{100 * chance:.1f} %"),
        ("labels, in order", ", ".join(order)),
        ("the model shown below", cards.model and f"{right} of {cards.num_answers} right: {cards.model}"),
    ]
    return [(name, text) for name, text in facts if text]


def label_names(answers: Iterable[dict]) -> set[str]:
    """The labels that records have, or are taken for."""
    names = set()
    for record in answers:
        text = dict(zip(LETTERS, record["options"], strict=False))
        names |= {str(text.get(record["answer"])), str(text.get(record["predicted"]))}
    return names


def in_order(labels: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """Labels from the mildest to the gravest, by their words or numbers ("Grade II"); others by the alphabet, at the end.

    known: their order, where it is known.
    """
    return sorted(labels, key=lambda label: (known.index(label) if label in known else len(known), *_severity(label)))


def _severity(label: str) -> tuple[float, str]:
    words = re.findall(r"[a-z]+|\d+", label.lower())
    for word in words:
        if word.isdigit() or word in ROMAN:
            return float(word) if word.isdigit() else float(ROMAN[word]), label
    places = [place for place, group in enumerate(SEVERITY) if any(word in group for word in words)]
    return (float(places[0]) if places else float("inf")), label
