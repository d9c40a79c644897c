"""What a reader sees first: the result in large type, and one row of the study in pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

from medcg_jax.data.records import LETTERS, Subset
from medcg_jax.study.design import mat
from medcg_jax.study.report.escape import ELEMENT_CHARACTERS, short_label
from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.report.samples import NOT_SHOWN, embedded, shown_cell
from medcg_jax.study.report.table import points
from medcg_jax.study.report.text import (
    ONE_SEED,
    TOGETHER,
    Answer,
    counted,
    interval,
    never_trained_on,
    overall_words,
    reason,
    sentence,
)
from medcg_jax.study.stats.verdict import COMPOSITION
from medcg_jax.study.stats.verdict import NOT_SHOWN as NO_GAIN

# Training subsets that are pictured.
MOST_PICTURED = 3


@dataclass(frozen=True)
class Headline:
    """A grid's result.

    Attributes:
      verdict: in large type. of: what it holds for, "" where there is nothing to add. world: what the images are.
      why: what the verdict rests on. measured: what the numbers are.
      before, after: (accuracy as a fraction, what was trained on); None where it is not there.
      change: the difference with its interval in words. chance: as a fraction. sizes: on how much it rests.
      label: whose result, "" where the page has one alone. page: the address of the grid's own page.
    """

    verdict: str
    world: str
    of: str = ""
    why: str = ""
    measured: str = "Accuracy"
    before: tuple[float, str] | None = None
    after: tuple[float, str] | None = None
    change: str = ""
    chance: float | None = None
    sizes: str = ""
    label: str = ""
    page: str = ""

    @property
    def values(self) -> str:
        """What the scale shows, in words."""
        marks = [f"{words} {100 * share:.1f} %" for share, words in filter(None, (self.before, self.after))]
        marks += [f"chance {100 * self.chance:.1f} %"] if self.chance is not None else []
        return f"Accuracy from 0 to 100 %: {', '.join(marks)}"


@dataclass(frozen=True)
class Combination:
    """A subset with one of its images.

    Attributes:
      elements: (name of the element, word, whether it is one of the target's) of modality, area and task.
      image: the address of an embedded picture, "" where the data are not at hand.
    """

    name: str
    elements: tuple[tuple[str, str, bool], ...]
    image: str = ""

    @property
    def alt(self) -> str:
        return f"image of {self.name}: " + ", ".join(f"{element} {word}" for element, word, _ in self.elements)


@dataclass(frozen=True)
class Teaser:
    """One row of the study: what a model was trained on, and what it was asked about.

    Attributes:
      more: training subsets that are not pictured. question, options: of a test record; "" and () without the data.
    """

    trained: tuple[Combination, ...]
    target: Combination
    caption: str
    more: int = 0
    question: str = ""
    options: tuple[str, ...] = ()


def headline(answer: Answer, label: str = "", page: str = "") -> Headline:
    """The first verdict of a grid; where no table can tell, its first comparison."""
    world = "on phantoms, not patients" if answer.grid.of_phantoms else "on these images"
    line, effect = answer.verdict, answer.main
    if line:
        kind, gain = line["these_models"] or line["verdict"], line["gain"]
        alone = line["these_models"] is not None
        accuracies = line["accuracy"]
        words = {"baseline_plus": "unrelated data", "trained": TOGETHER[line["table"]]}
        before, after = ((accuracies[arm], words[arm]) if arm in accuracies else None for arm in words)
        return Headline(
            verdict=f"Of these models alone: {kind}" if alone and kind != NO_GAIN else verdict_title(kind),
            world=world,
            of=sentence(ONE_SEED) if alone else "",
            why=sentence(reason(line)),
            measured=measured(answer.grid, line["table"]),
            before=before,
            after=after,
            change=_change(gain),
            chance=answer.chance(line),
            sizes=sentence(f"{answer.sizes(line)}; {overall_words(line)}"),
            label=label,
            page=page,
        )
    if effect:
        shares = {
            entry["arm"]: entry["accuracy"]
            for entry in answer.summary["accuracy"]
            if (entry["table"], entry["part"]) == (effect["table"], effect["part"])
        }
        before, after = ((shares[arm], arm_name(arm)) for arm in (effect["against"], effect["arm"]))
        sizes = f"{effect['n']:,} distinct questions on {counted(effect['targets'], 'target')}, "
        return Headline(
            verdict="Composition is not tested",
            world=world,
            why="No pairs or triples are finished.",
            of=sentence(ONE_SEED) if effect["seeds"] == 1 else "",
            measured=measured(answer.grid, effect["table"]),
            before=before,
            after=after,
            change=_change(effect),
            sizes=sentence(sizes + counted(effect["seeds"], "seed")),
            label=label,
            page=page,
        )
    return Headline("No answer yet", world, why="No comparison of the study is finished.", label=label, page=page)


def verdict_title(kind: str) -> str:
    """A verdict as the answer to the question in the page's title."""
    return f"Yes: {kind}" if kind == COMPOSITION else sentence(kind)[:-1]


def measured(grid: Grid, table: str) -> str:
    return f"Accuracy on targets{' never trained on' if never_trained_on(grid, table) else ''}"


def _change(effect: dict | None) -> str:
    return f"{points(effect['mean'], True)} points (95 % interval {interval(effect)})" if effect else ""


def teaser(grid: Grid) -> Teaser | None:
    """The row of the model whose answers are shown; None where no finished cell was trained on known subsets."""
    cell = shown_cell(grid) if grid.seeds else None
    if not cell or not cell["related"]:
        return None
    name, related = cell["target"].split("+")[0], cell["related"].split("+")
    target = grid.subset(name)
    known = [subset for subset in map(grid.subset, related) if subset]
    if target is None or not known:
        return None
    seed, pictured = int(cell["seed"]), known[:MOST_PICTURED]
    trained = [_combination(grid, subset, target, seed, "train") for subset in pictured]
    question, options = _question(grid, target, seed)
    number = len({(row["table"], row["row"]) for row in grid.results if row["table"] == cell["table"]})
    never = "; no model of these rows has seen an image or a question of its target" * never_trained_on(
        grid, cell["table"]
    )
    caption = (
        f"One of {counted(number, 'row')} of {cell['table'].replace('_', '-')}, the one whose model is in the middle by "
        f"accuracy{never}. Filled: an element of the target."
    )
    asked = _combination(grid, target, target, seed, "test")
    return Teaser(tuple(trained), asked, caption, len(related) - len(pictured), question, options)


def _combination(grid: Grid, subset: Subset, target: Subset, seed: int, split: str) -> Combination:
    common = mat.shared(subset, target)
    elements = tuple(
        (element, short_label(getattr(subset, element), ELEMENT_CHARACTERS), element in common)
        for element in mat.ELEMENTS
    )
    try:
        records = grid.source(seed).records(subset.name, split)
        number = next(i for i, record in enumerate(records.records) if record.image)
        return Combination(subset.name, elements, embedded(records.image(number)))
    except (*NOT_SHOWN, StopIteration):  # boxes, or the data are not at hand: the names remain
        return Combination(subset.name, elements)


def _question(grid: Grid, target: Subset, seed: int) -> tuple[str, tuple[str, ...]]:
    try:
        record = next(r for r in grid.source(seed).records(target.name, "test").records if r.image and r.options)
    except (*NOT_SHOWN, StopIteration):
        return "", ()
    return record.turns[-1].question.partition("\n")[0], _lettered(record.options)


def _lettered(options: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{letter}: {text}" for letter, text in zip(LETTERS, options, strict=False))
