"""A grid in words: the answer that its numbers give, and the limits of that answer.

Every statement follows from an effect and its interval; an interval that includes 0 is said to show nothing.
"""

import textwrap
from collections.abc import Sequence

from medcg_jax.data.leaks import EXACT
from medcg_jax.data.phantom.world import TUNE_TARGETS
from medcg_jax.study.design.mat import ELEMENTS
from medcg_jax.study.report.escape import plain
from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.report.table import points
from medcg_jax.study.stats.controls import SHUFFLED
from medcg_jax.study.stats.paired import Unit, compare, estimate

PARTS = {
    "fixed_modality": "fixed modality",
    "fixed_area": "fixed area",
    "fixed_task": "fixed task",
    "modality_area": "modality-area pair",
    "one_each": "one element each",
    "in_distribution": "in distribution",
    "out_of_distribution": "out of distribution",
    "with_related": "with all related subsets",
    "with_unrelated": "with as many unrelated records",
    "target_only": "target alone",
}

# (table, arm, against, part) of the headline comparison: the first that the grid has.
HEADLINES = (
    ("pairs", "trained", "baseline_plus"), ("pairs", "trained", "baseline"), ("triples", "trained", "baseline_plus"),
    ("triples", "trained", "baseline"), ("detection_pairs", "trained", "baseline"),
    ("ablation", "all_related", "all_unrelated"), ("ablation", "all_related", "baseline"),
    ("multi_task", "multi_task", "baseline", "out_of_distribution"),
)  # fmt: skip
# (table, arm, against) -> the comparison in a few words.
SHORT_NAMES = {
    ("pairs", "trained", "baseline_plus"): "pairs over unrelated data",
    ("pairs", "trained", "baseline"): "pairs over no training",
    ("triples", "trained", "baseline_plus"): "triples over unrelated data",
    ("triples", "trained", "baseline"): "triples over no training",
    ("detection_pairs", "trained", "baseline"): "pairs with boxes over no training",
    ("ablation", "all_related", "all_unrelated"): "related over unrelated subsets",
    ("ablation", "all_related", "baseline"): "related subsets over no training",
    ("ablation", "all_related", "wo_modality"): "a loss without the modality",
    ("ablation", "all_related", "wo_area"): "a loss without the area",
    ("ablation", "all_related", "wo_task"): "a loss without the task",
    ("ablation", "all_related", "same_task"): "more than the same task alone",
    ("multi_task", "multi_task", "baseline"): "multi-task over no training out of distribution",
    ("multi_task", "multi_task", "single_task"): "multi-task over single-task",
}
# Kinds of leaks that are counted together -> the training of such cells in words.
LEAKS: dict[tuple[str, ...], str] = {
    (*EXACT, "near"): "on images that are in their test set, or nearly so",
    ("same question",): "on questions of their test set, among the general records",
    ("same group",): "on patients or lesions that are in their test set",
    ("likely same group",): "on patients or lesions that are, as their names say, in their test set too",
}
# The table of verdicts without printed rows that share more or less with their target than they say.
DOUBTFUL = "The answer without doubtful rows"
SUMMARY_CHARACTERS = 100


def verdict(effect: dict) -> str:
    """Either "up" or "down" where the 95 % interval excludes 0, else "open"."""
    if effect["ci_low"] > 0:
        return "up"
    return "down" if effect["ci_high"] < 0 else "open"


def interval(effect: dict) -> str:
    return f"{points(effect['ci_low'])} to {points(effect['ci_high'])}"


def counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(items: Sequence[str]) -> str:
    """Such as "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def table_names(names: Sequence[str]) -> str:
    return listed([name.replace("_", "-") for name in names])


def effect_name(effect: dict) -> str:
    """Such as "Trained − Baseline+ (pairs)" and "Multi-task − Baseline (multi-task, out of distribution)"."""
    where = effect["table"].replace("_", "-")
    if effect["part"] and effect["part"] != "one_each":
        where += f", {PARTS.get(effect['part'], effect['part'])}"
    return f"{arm_name(effect['arm'])} − {arm_name(effect['against'])} ({where})"


def short_name(effect: dict) -> str:
    return SHORT_NAMES.get((effect["table"], effect["arm"], effect["against"])) or effect_name(effect)


class Answer:
    """The answer of a grid in words, from `stats.summarise`.

    Attributes:
      main: the headline effect; None where the grid has none.
      lead: "yes", "partly", "no", "not shown" or "none": what the headline effect shows.
    """

    def __init__(self, grid: Grid, summary: dict):
        self.grid, self.summary = grid, summary
        self.main = next((effect for key in HEADLINES if (effect := self.find(*key))), None)

    def find(self, table: str, arm: str, against: str, part: str = "") -> dict | None:
        key = (table, part, arm, against)
        effects = self.summary["effects"]
        return next((e for e in effects if (e["table"], e["part"], e["arm"], e["against"]) == key), None)

    @property
    def checks(self) -> list[dict]:
        """The other comparisons that "yes" depends on, as far as the grid has them."""
        effects = (
            self.find("pairs", "trained", "baseline"),
            self.find("triples", "trained", "baseline_plus") or self.find("triples", "trained", "baseline"),
            self.find("ablation", "all_related", "all_unrelated"),
            *(self.find("ablation", "all_related", f"wo_{element}") for element in ELEMENTS),
            self.find("ablation", "all_related", "same_task"),
            self.find("multi_task", "multi_task", "single_task", "in_distribution"),
            self.find("multi_task", "multi_task", "baseline", "out_of_distribution"),
        )
        return [e for e in effects if e and e is not self.main]

    @property
    def lead(self) -> str:
        if self.main is None:
            return "none"
        state = verdict(self.main)
        if state != "up":
            return {"down": "no", "open": "not shown"}[state]
        return "yes" if all(verdict(e) == "up" for e in self.checks) else "partly"

    @property
    def opening(self) -> str:
        """The first words, in bold."""
        world = "on phantoms, not patients" if self.grid.of_phantoms else "on these images"
        words = {
            "yes": f"Yes, {world}.",
            "partly": f"In part, {world}.",
            "no": f"No: the reverse, {world}.",
            "not shown": f"No effect is shown, {world}.",
            "none": "No answer yet: no comparison of the study is finished.",
        }
        return words[self.lead]

    def sentences(self) -> list[str]:
        """The sentences with numbers, which follow the opening and `totals`."""
        hold_all = "which between them hold all three elements of the target"
        related, same_records = "all related subsets together", "one model per subset, with the same records of each"
        caution = (
            "The images are phantoms, not patients: nothing here speaks of medical images."
            if self.grid.of_phantoms
            else f"This is how {self.grid.config['model']['name']} answers these test records; no clinical claim follows."
        )
        return [
            *self.combination("pairs", f"two subsets {hold_all}"),
            *self.combination("triples", "three subsets with one element of the target each"),
            *self.combination("detection_pairs", f"a subset with boxes and one of choice questions {hold_all}"),
            *self.comparison(related, "all unrelated ones", "ablation", "all_related", "all_unrelated"),
            *self.elements(),
            *self.comparison(related, "training on subsets that share the task alone", "ablation", "all_related", "same_task"),
            *self.comparison("one model of all subsets", same_records, "multi_task", "multi_task", "single_task",
                       "in_distribution"),
            *self.comparison("the same model, on combinations held out from it,", "no training", "multi_task", "multi_task",
                       "baseline", "out_of_distribution"),
            *self.efficiency(),
            caution,
        ]  # fmt: skip

    def comparison(self, what: str, over: str, *key: str) -> list[str]:
        """The statement of an effect as a sentence; [] where the grid lacks it. key: the arguments of `find`."""
        effect = self.find(*key)
        return [sentence(self.statement(effect, what, over))] if effect else []

    def statement(self, effect: dict, what: str, over: str) -> str:
        """One effect as a sentence without full stop; its interval decides the verb."""
        state = verdict(effect)
        rows = counted(effect["rows"], "row")
        if state == "down":
            counts = f"{effect['losses']} of {rows} down, {effect['significant_losses']} significantly"
        else:
            counts = f"{effect['wins']} of {rows} up, {effect['significant']} significantly"
        if state == "open":
            return (
                f"{what} {'are' if what.startswith('all ') else 'is'} not shown to change accuracy against {over} "
                f"({points(effect['mean'], True)} points; the interval {interval(effect)} includes 0; {counts})"
            )
        verb, size = "raised" if state == "up" else "lowered", points(abs(effect["mean"]))
        words = "95 % interval " if effect is self.main else ""
        return f"{what} {verb} accuracy by {size} points against {over} ({words}{interval(effect)}; {counts})"

    def combination(self, table: str, what: str) -> list[str]:
        plus, base = self.find(table, "trained", "baseline_plus"), self.find(table, "trained", "baseline")
        first = plus or base
        if first is None:
            return []
        over = "training on unrelated ones (Baseline+)" if plus else "no training (Baseline)"
        where = ""
        if first is self.main:
            unseen = " never trained on" if never_trained_on(self.grid, table) else ""
            where = (
                f"Over {counted(first['targets'], 'target')}{unseen}, {counted(first['seeds'], 'seed')} and "
                f"{self.answers(first):,} test answers per arm, "
            )
        text = where + self.statement(first, f"training on {what}", over)
        if plus and base:
            tail = {
                "up": f"against no training the gain is {points(base['mean'])} ({interval(base)})",
                "down": f"against no training it is a loss of {points(-base['mean'])} ({interval(base)})",
                "open": f"against no training no change is shown ({points(base['mean'], True)}, {interval(base)})",
            }
            text += f"; {tail[verdict(base)]}"
        return [sentence(text)]

    def answers(self, effect: dict) -> int:
        """How many test answers each arm of an effect has."""
        return sum(
            row["n"]
            for row in self.summary["rows"]
            if (row["table"], row["arm"], row["against"]) == (effect["table"], effect["arm"], effect["against"])
            and effect["part"] in ("", row["part"])
        )

    def elements(self) -> list[str]:
        """The cost of leaving out the subsets that share an element."""
        costs, beyond = (
            [
                f"{element} {self.loss(effect)}"
                for element in ELEMENTS
                if (effect := self.find("ablation", arm, f"wo_{element}"))
            ]
            for arm in ("all_related", "random_removal")
        )
        random = self.find("ablation", "all_related", "random_removal")
        at_random = f"; leaving out as many at random costs {self.loss(random)}" if random else ""
        text = f"Leaving out the related subsets that share an element costs, in points: {listed(costs)}{at_random}."
        return [text] * bool(costs) + [f"Beyond the random removal: {listed(beyond)}."] * bool(beyond)

    def loss(self, effect: dict) -> str:
        state = {"up": "", "open": ", not shown", "down": ", a gain"}[verdict(effect)]
        return f"{points(effect['mean'])} ({interval(effect)}{state})"

    def efficiency(self) -> list[str]:
        gains = [g for g in efficiency_gains(self.grid) if g["records"] > 0]
        if not gains:
            return []
        texts = [
            f"{g['records']:,} target records {points(g['mean'], True)} ({interval(g)}"
            f"{', not shown' if verdict(g) == 'open' else ''})"
            for g in (gains[0], gains[-1])[: len(gains)]
        ]
        return [f"What all related subsets add to training on the target itself, in points: {listed(texts)}."]

    def totals(self) -> list[tuple[str, str]]:
        """("Shown", names), ("Not shown", names), ("The other way", names) of the headline and its checks."""
        effects = [effect for effect in (self.main, *self.checks) if effect]
        names = {
            words: "; ".join(short_name(effect) for effect in effects if verdict(effect) == state)
            for words, state in (("Shown", "up"), ("Not shown", "open"), ("The other way", "down"))
        }
        return [(words, text) for words, text in names.items() if text]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def never_trained_on(grid: Grid, table: str) -> bool:
    """Whether no cell of a table was trained on one of its test subsets."""
    cells = [cell for cell in grid.done(table) if cell["related"]]
    return not any(set(cell["related"].split("+")) & set(cell["target"].split("+")) for cell in cells)


def efficiency_gains(grid: Grid) -> list[dict]:
    """For each number of target records: accuracy with all related subsets minus that of the target alone."""
    cells = {
        (r["part"], r["target"], r["seed"], int(r["arm"].rsplit("_", 1)[1])): r["cell"]
        for r in grid.results
        if r["table"] == "efficiency"
    }
    units: dict[int, list[Unit]] = {}
    for (curve, target, seed, records), cell in cells.items():
        other = cells.get(("target_only", target, seed, records))
        if curve == "with_related" and other:
            result = compare(*(grid.answers.correct_by_id(name, target) for name in (cell, other)))
            only_a, only_b = result.only_a, result.only_b
            units.setdefault(records, []).append(Unit(target, seed, result.n, only_a - only_b, only_a + only_b))
    gains = []
    for records, group in sorted(units.items()):
        found = estimate(group)
        low, high = found.interval()
        gains.append({"records": records, "mean": found.mean, "ci_low": low, "ci_high": high})
    return gains


def summary_text(grid: Grid, answer: Answer, limits: Sequence[str]) -> str:
    """Plain text: what was run, what it shows, with numbers and intervals, and what it does not show."""
    head = (
        f"{grid.config['name']}: {counted(len(grid.done()), 'cell')} of {len(grid.cells):,}, "
        f"{table_names(grid.tables) or 'no table'}; {grid.config['model']['name']}, "
        f"{'phantoms' if grid.of_phantoms else 'images from files'}, "
        f"{counted(len(grid.seeds), 'seed')} ({', '.join(map(str, grid.seeds)) or 'none'})."
    )
    totals = [f"{words}: {names}." for words, names in answer.totals()]
    paragraphs = [head, " ".join([answer.opening, *totals, *answer.sentences()]), *(f"- {limit}" for limit in limits)]
    return "".join(
        textwrap.fill(plain(text), SUMMARY_CHARACTERS, subsequent_indent="  " if text[0] == "-" else "") + "\n\n"
        for text in paragraphs
    ).removesuffix("\n")


def missing(grid: Grid) -> list[str]:
    """What is missing from the page."""
    failed, waiting, num_cells = len(grid.failed()), len(grid.waiting()), f"{len(grid.cells):,}"
    absent = [name for name in grid.config["study"]["tables"] if name not in grid.tables]
    texts = {
        f"{counted(failed, 'cell')} of {num_cells} failed; they are listed below.": failed,
        f"{counted(waiting, 'cell')} of {num_cells} had not been run when this page was written; rows and comparisons "
        "are of the finished ones alone.": waiting,
        **dict.fromkeys(grid.notes, True),
        f"Asked for, and without a finished cell: {table_names(absent)}.": absent,
    }
    return [text for text, holds in texts.items() if holds]


def letter_habits(grid: Grid) -> list[str]:
    """Notes on arms that answer almost always one letter, or whose generated answers are often no letter."""
    texts = []
    for table in grid.tables:
        counts = {arm: value for (name, arm), value in grid.letters.items() if name == table and value.n}
        one_letter = [
            arm_name(arm)
            for arm, value in counts.items()
            if max(value.predicted.values()) > 0.9 * value.n > max(value.answers.values())
        ]
        no_letter = [arm_name(arm) for arm, value in counts.items() if value.unparsed > 0.2 * value.generated]
        words = table.replace("_", "-")
        if one_letter:
            texts.append(
                f"One letter makes up more than 90 % of all answers of {listed(one_letter)} ({words}), and not of the right "
                "ones: such an accuracy says little of the images."
            )
        if no_letter:
            texts.append(
                f"More than a fifth of the generated answers of {listed(no_letter)} ({words}) are no offered letter."
            )
    return texts


def below_chance(grid: Grid) -> list[str]:
    """Notes on untrained and unrelated arms below chance, which flatter the arms compared with them."""
    texts = []
    for table in grid.tables:
        for arm in ("baseline", "baseline_plus", "all_unrelated"):
            scores = [(target, arms[arm]) for (_, target), arms in grid.scores(table).items() if arm in arms]
            low = sum(score.high < (grid.chance(target) or 0) for target, score in scores)
            if low:
                texts.append(
                    f"{low} of {len(scores)} accuracies of {arm_name(arm)} ({table.replace('_', '-')}) lie below "
                    "chance with their whole interval: part of what is gained over them is coming back to chance."
                )
    return texts


def limits(grid: Grid, summary: dict) -> list[str]:
    """What the grid does not show, each with its reason."""
    targets, model = sorted({row["target"] for row in summary["rows"]}), grid.config["model"]["name"]
    arms, num_seeds = {row["arm"] for row in grid.results}, len(grid.seeds)
    reported = [line for line in grid.contamination if line["action"] == "reported"]
    leaky = {words: len({line["cell"] for line in reported if line["kind"] in kinds}) for kinds, words in LEAKS.items()}
    not_shuffled = sorted({name for arm in summary["controls_of_answers"] for name in arm["not_shuffled"]})
    tuned = [name for name in targets if name in TUNE_TARGETS]
    phantoms, lapsed = grid.of_phantoms, max((level["rows_left_out"] for level in summary["without_lapses"]), default=0)
    with_words = [arm_name(arm) for arm in ("words_only", "same_task") if arm in arms]
    words = (
        f"“{with_words[0]}” has them" if with_words else "no arm of this grid has them and nothing else of the target"
    )
    # Text -> whether it holds.
    texts: dict[str, object] = {
        f"{counted(number, 'cell')} of {len(grid.cells):,} were trained {words}, which flatters them: see the table of "
        "contamination.": number
        for words, number in leaky.items()
    }
    texts |= {
        f"The tests of {listed(not_shuffled)} were not asked beside other images, since their records have none or all "
        "the same: whether questions alone give their answers away is not known.":
            not_shuffled and SHUFFLED in grid.config["eval"].get("controls", ()),
        "Phantoms are drawn by formulas. Their modalities, areas and tasks are named after medical ones and share "
        "nothing else with them; an effect here is no evidence of one in patients.": phantoms,
        "The base was taught to name the modality and the area of phantoms of every pair of the two, so those words, "
        "and how the images look, are known to it before any fine-tune. No task word, label or test image was.":
            phantoms and grid.config.get("base", {}).get("steps"),
        f"The recipe was chosen on some of these targets ({listed(tuned)}): on them it may look too good.":
            phantoms and tuned,
        f"A model of this size ({model}), pre-trained on phantoms alone, is far too weak for a medical claim: what the "
        "grid shows is that the whole path works on these images, and how wide the intervals are.":
            not phantoms and model.endswith("_tiny"),
        "Test records read from files return with every seed, so seeds measure the training's own spread and add no "
        "test records; a source image may occur in more than one dataset of a collection.": not grid.is_phantom,
        "One seed: the spread over draws of the data, the base and the training is not measured.": num_seeds == 1,
        f"With {counted(num_seeds, 'seed')} and {counted(len(targets), 'target')} a bootstrap interval over them is "
        "rough, and likely too narrow.": targets and (num_seeds < 5 or len(targets) < 10),
        "Baseline+ trains on subsets that share no element with the target, so it never meets the words of the "
        f"target's task. Part of any gain over it is learning these words; {words}.": "baseline_plus" in arms,
        f"{counted(lapsed, 'printed row')} of the paper here share more or less with their target than they say, by this "
        f"project's table of tasks: “{DOUBTFUL}” stands beside the answer.": lapsed,
        "Every arm trains for equal epochs, so an arm with fewer subsets also has fewer steps. The random removal "
        "measures that part; it removes as many subsets as the three removals do on average, not as each does.":
            any(arm.startswith("wo_") for arm in arms),
        **dict.fromkeys([*below_chance(grid), *letter_habits(grid)], True),
        "The published description does not say how Baseline+ was drawn, how large the subsets were, or most training "
        "settings; what stands in for them here is this project's choice, and is listed with the configuration.": True,
    }  # fmt: skip
    return [text for text, holds in texts.items() if holds]
