"""A grid in words: the verdict that its numbers give, what else they show, and the limits of both.

Every statement follows from a verdict (`stats.verdict`) or from an effect with its interval and test; what they do not
show is said not to be shown, and never said not to be there but within `EQUIVALENCE`.
"""

import textwrap
from collections.abc import Sequence

from medcg_jax.config import DECIDING_ARMS
from medcg_jax.data.leaks import EXACT
from medcg_jax.data.phantom.world import TUNE_TARGETS
from medcg_jax.study.design.mat import ELEMENTS
from medcg_jax.study.report.escape import plain
from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.report.table import points
from medcg_jax.study.stats.controls import SHUFFLED
from medcg_jax.study.stats.paired import LEVEL, Unit, compare, estimate
from medcg_jax.study.stats.verdict import (
    COMPOSITION,
    EQUIVALENCE,
    NO_CAUSE,
    NOT_SHOWN,
    NOT_TESTED,
    REVERSE,
    TRANSFER,
    is_equivalent,
)

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
ORDINALS = ("first", "second", "third")
# Table -> what its trained arm is trained on.
TOGETHER = {
    "pairs": "pairs of related subsets",
    "triples": "triples of related subsets",
    "detection_pairs": "pairs of a subset with boxes and one of choice questions",
}
# What is said of a difference that should be above 0, by its `state`.
SHOWN = {"up": "", "down": ", shown to be below", "open": ", not shown"}
ONE_SEED = "one seed: nothing is said of the recipe"
WITHIN = f"within {points(EQUIVALENCE)} points"
# Verdict -> what it rests on.
REASONS = {
    COMPOSITION: "training on the subsets together is above each of them alone, and gains more than the sum of what each "
    "adds to unrelated data",
    TRANSFER: f"a subset alone gains over unrelated data too, and training on all is at most {WITHIN[7:]} above it",
    NO_CAUSE: "training on the subsets together is not shown to be above each of them alone and more than the sum of what "
    "each adds to unrelated data",
    NOT_TESTED: "arms that would tell composition from transfer out of one subset are absent",
    NOT_SHOWN: "no gain over unrelated data is shown",
    REVERSE: "training on related subsets is below training on unrelated data",
}


def state(effect: dict) -> str:
    """Either "up" or "down" where the difference is shown, by its 95 % interval and its test, else "open"."""
    return "up" if effect["up"] else "down" if effect["down"] else "open"


def no_loss(effect: dict, loss: float) -> str:
    """What may be said of a difference that is not shown. loss: the end of its interval on the side of a loss."""
    return (
        f"no loss ({WITHIN})" if effect["equivalent"] else f"a loss of up to {points(max(0.0, loss))} is not excluded"
    )


def p_text(p: float, sign: str = "") -> str:
    """Such as "p .034" and "p < .001"."""
    return "p < .001" if p < 0.001 else f"p {sign}{p:.3f}".replace(" 0.", " .")


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


class Answer:
    """The answer of a grid in words, from `stats.summarise`.

    Attributes:
      main: the headline effect; None where the grid has none.
      verdict: the verdict on the first table that has one; None where no table of the grid could tell.
    """

    def __init__(self, grid: Grid, summary: dict):
        self.grid, self.summary = grid, summary
        self.main = next((effect for key in HEADLINES if (effect := self.find(*key))), None)
        self.verdict = next((line for line in summary["verdicts"] if not line["part"]), None)

    def find(self, table: str, arm: str, against: str, part: str = "") -> dict | None:
        key = (table, part, arm, against)
        effects = self.summary["effects"]
        return next((e for e in effects if (e["table"], e["part"], e["arm"], e["against"]) == key), None)

    @property
    def opening(self) -> str:
        """The verdict in one sentence, in bold."""
        world = "on phantoms, not patients" if self.grid.of_phantoms else "on these images"
        if self.verdict:
            return sentence(f"{verdict_words(self.verdict)}, {world}: {reason(self.verdict)}")
        if self.main:
            return f"Composition is not tested, {world}: no pairs or triples are finished."
        return "No answer yet: no comparison of the study is finished."

    def first(self) -> list[str]:
        """The sentences behind the opening: from what to what, on how much, and what decided."""
        return self.of_verdict(self.verdict) if self.verdict else []

    def of_verdict(self, line: dict) -> list[str]:
        """The numbers of one table's verdict."""
        texts = [self.gain(line), *against_singles(line), *self.beside(line), *self.directions(line["table"])]
        if line["rows_left_out"]:
            texts.append(
                f"{counted(line['rows_left_out'], 'row')} cannot tell (a subset with the whole combination, or no unrelated "
                "one) and are left out"
            )
        return [sentence(text) for text in [*texts, *self.short_of_records(line["table"])]]

    def short_of_records(self, table: str) -> list[str]:
        """That controls of a table had fewer records than its rows, by config.json ("short")."""
        controls = [
            c["cell"] for c in self.grid.done(table) if c["arm"] == "baseline_plus" or c["arm"] in DECIDING_ARMS
        ]
        num_short = len({*controls} & {*self.grid.run.get("short", ())})
        own_number = self.grid.config["study"].get("baseline_plus_records", "related")
        texts = [
            f"unrelated data had {own_number} records (study.baseline_plus_records) and updates of their own, so that the "
            "gain and the interaction are of unequal amounts"
        ] * (own_number != "related")
        return texts + [
            f"{num_short:,} of {counted(len(controls), 'control')} had fewer training records than their row, for lack of "
            "more: they are weaker, which flatters training on all"
        ] * (num_short > 0)

    def gain(self, line: dict) -> str:
        if line["gain"] is None or self.find(line["table"], "trained", "baseline_plus") is None:
            return f"no arm of unrelated data is finished, so a gain cannot be told from training as such ({self.sizes(line)})"
        accuracy, share = line["accuracy"], self.chance(line)
        chance = "" if share is None else f"chance {100 * share:.1f} %; "
        seed = f"; {ONE_SEED}" if line["seeds"] == 1 else ""
        before, after = (f"{100 * accuracy[arm]:.1f} %" for arm in ("baseline_plus", "trained"))
        return (
            f"from {before} (unrelated data) to {after} ({TOGETHER[line['table']]}): "
            f"{points(line['gain']['mean'], True)} points (95 % interval {interval(line['gain'])}{seed}); "
            f"{chance}{self.sizes(line)}; {overall_words(line)}"
        )

    def chance(self, line: dict) -> float | None:
        """The mean over the targets of a verdict; None where none is known."""
        chances = [share for name in line["target_names"] if (share := self.grid.chance(name)) is not None]
        return sum(chances) / len(chances) if chances else None

    def sizes(self, line: dict) -> str:
        unseen = " never trained on" if never_trained_on(self.grid, line["table"]) else ""
        return (
            f"{line['n']:,} distinct questions on {counted(line['targets'], 'target')}{unseen}, "
            f"{counted(line['seeds'], 'seed')}, {counted(line['trainings'], 'training')}"
        )

    def beside(self, line: dict) -> list[str]:
        """The arms that decide nothing: what they show, or that they are absent."""
        names = {"words_only": "subsets that share the task alone", "no_images": "the same training without images"}
        contrasts = {words: line["beside"][arm] for arm, words in names.items()}
        texts = [
            f"{points(effect['mean'], True)} over {words} ({interval(effect)}{SHOWN[state(effect)]})"
            for words, effect in contrasts.items()
            if effect
        ]
        absent = [words for words, effect in contrasts.items() if not effect]
        return [f"beside it: {listed(texts)}"] * bool(texts) + [f"not asked: {listed(absent)}"] * bool(absent)

    def directions(self, table: str) -> list[str]:
        """The verdicts by direction, where there are several."""
        lines = [line for line in self.summary["verdicts"] if line["table"] == table and line["part"]]
        kinds = [
            f"{PARTS.get(line['part'], line['part'])}: {line['these_models'] or line['verdict']}" for line in lines
        ]
        alone = " of these models alone" if any(line["these_models"] for line in lines) else ""
        return [f"by direction{alone} (Holm-adjusted): {'; '.join(kinds)}"] * (len(lines) > 1)

    def sentences(self) -> list[str]:
        """What else the grid shows."""
        hold_all = "which between them hold all three elements of the target"
        related, same_records = "all related subsets together", "one model per subset, with the same records of each"
        caution = (
            "The images are phantoms, not patients: nothing here speaks of medical images."
            if self.grid.of_phantoms
            else f"This is how {self.grid.model} answers these test records; no clinical claim follows."
        )
        return [
            *self.combination("pairs", f"two subsets {hold_all}"),
            *self.combination("triples", f"three subsets {hold_all}"),
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
        """One effect as a sentence without full stop; its interval and test decide the verb."""
        shown = state(effect)
        rows = counted(effect["rows"], "row")
        if shown == "down":
            counts = f"{effect['losses']} of {rows} down, {effect['significant_losses']} significantly in these models"
        else:
            counts = f"{effect['wins']} of {rows} up, {effect['significant']} significantly in these models"
        limits = f"{interval(effect)}{'; ' + ONE_SEED if effect['seeds'] == 1 else ''}"
        if shown == "open":
            return (
                f"{what} {'are' if what.startswith('all ') else 'is'} not shown to change accuracy against {over} "
                f"({points(effect['mean'], True)} points, {limits}; {no_loss(effect, -effect['ci_low'])}; {counts})"
            )
        verb, size = "raised" if shown == "up" else "lowered", points(abs(effect["mean"]))
        words = "95 % interval " if effect is self.main else ""
        return f"{what} {verb} accuracy by {size} points against {over} ({words}{limits}; {counts})"

    def combination(self, table: str, what: str) -> list[str]:
        """A table's own sentences: of the verdict, where it is not the first; else against no training."""
        line = next((line for line in self.summary["verdicts"] if (line["table"], line["part"]) == (table, "")), None)
        base = self.find(table, "trained", "baseline")
        texts = []
        if line and line is not self.verdict:
            texts = [sentence(f"{table.replace('_', '-')}: {verdict_words(line).lower()}: {reason(line)}")]
            texts += self.of_verdict(line)
        return texts + (
            [sentence(self.statement(base, f"training on {what}", "no training (Baseline)"))] if base else []
        )

    def elements(self) -> list[str]:
        """The cost of leaving out the subsets that share an element, at equal epochs and at equal updates."""
        texts = []
        alone = self.alone([effect for effect in self.summary["effects"] if effect["table"] == "ablation"])
        for budget, words in (("", "at equal epochs"), ("_updates", "at equal updates")):
            costs, random, beyond = (
                [
                    f"{element} {self.loss(effect)}"
                    for element in ELEMENTS
                    if (effect := self.find("ablation", *(arm.format(element) for arm in arms)))
                ]
                for arms in (
                    ("all_related", f"wo_{{}}{budget}"),
                    ("all_related", f"random_removal_{{}}{budget}"),
                    (f"random_removal_{{}}{budget}", f"wo_{{}}{budget}"),
                )
            )
            if costs:
                texts.append(
                    f"Leaving out the related subsets that share an element costs, in points, {words}{alone}: "
                    f"{listed(costs)}."
                )
            if random:
                texts.append(f"Leaving out as many at random: {listed(random)}.")
            if beyond:
                texts.append(f"Beyond the random removal: {listed(beyond)}.")
        return texts

    def alone(self, effects: Sequence[dict]) -> str:
        return f" ({ONE_SEED})" if any(effect["seeds"] == 1 for effect in effects) else ""

    def loss(self, effect: dict) -> str:
        """A cost; its interval's upper end is the largest one that is not excluded."""
        words = {"up": "", "down": ", a gain", "open": f", not shown; {no_loss(effect, effect['ci_high'])}"}
        return f"{points(effect['mean'])} ({interval(effect)}{words[state(effect)]})"

    def efficiency(self) -> list[str]:
        texts = []
        for against, words in (
            ("target_only", "training on the target itself"),
            ("with_unrelated", "as many unrelated records beside the target's own"),
        ):
            gains = [g for g in efficiency_gains(self.grid, against) if g["records"] > 0]
            gains_in_words = [
                f"{g['records']:,} target records {points(g['mean'], True)} ({interval(g)}"
                f"{', not shown' if state(g) == 'open' else ''})"
                for g in (gains[:1] + gains[-1:])[: len(gains)]
            ]
            if gains_in_words:
                texts.append(
                    f"What all related subsets add to {words}, in points{self.alone(gains)}: {listed(gains_in_words)}."
                )
        return texts


def verdict_words(line: dict) -> str:
    """Such as "Composition"; with one seed what these models alone show is said beside."""
    words = sentence(line["verdict"]).removesuffix(".")
    if line["these_models"] is None:
        return words
    return f"{words} ({ONE_SEED}; these models alone: {line['these_models']})"


def reason(line: dict) -> str:
    """What a verdict rests on, and what stands in the way of a stronger one."""
    kind = line["these_models"] or line["verdict"]
    if line["gain"] is None:
        return "no arm of unrelated data to compare with"
    if kind == NOT_SHOWN and line["p_smallest"] is not None and line["p_smallest"] >= LEVEL:
        return (
            f"{counted(line['targets'], 'target')} cannot show a gain, since no p can be below {line['p_smallest']:.3f}"
        )
    if kind != NOT_TESTED:
        return REASONS[kind]
    absent = [arm_name(arm) + (f" ({n} of {line['cells']} cells)" if n < line["cells"] else "")
              for arm, n in line["missing"].items()]  # fmt: skip
    return f"{REASONS[kind]} ({listed(absent)})"


def overall_words(line: dict) -> str:
    """The overall p and the least that it could be."""
    least = "no least p" if line["p_smallest"] is None else f"the least {p_text(line['p_smallest'])}"
    return f"overall {p_text(line['p'])} ({line['test']}; {least})"


def against_singles(line: dict) -> list[str]:
    """The members alone, and the interaction."""
    singles, texts = [], []
    for name, over in line["over"].items():
        if over is None:
            continue
        words = {
            "above": "",
            "within": f", not above: alone no loss ({WITHIN})" if not over["down"] else ", shown to be below",
            "open": f", not shown to be above it; a gain of up to {points(max(0.0, over['ci_high']))} is not excluded",
        }[over["relation"]]
        mean = f"{points(over['mean'], True)} over the {ORDINALS[int(name[-1]) - 1]} ({interval(over)}{words})"
        singles.append(mean)
    if singles:
        texts.append(f"against each subset alone, with as many records and updates: {listed(singles)}")
    if line["interaction"]:
        interaction = line["interaction"]
        texts.append(
            f"interaction, what the subsets gain together beyond the sum of what each adds to unrelated data: "
            f"{points(interaction['mean'], True)} ({interval(interaction)}{'' if interaction['up'] else ', not shown to be above 0'})"
        )
    return texts


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def never_trained_on(grid: Grid, table: str) -> bool:
    """Whether no cell of a table was trained on one of its test subsets."""
    cells = [cell for cell in grid.done(table) if cell["related"]]
    return not any(set(cell["related"].split("+")) & set(cell["target"].split("+")) for cell in cells)


def efficiency_gains(grid: Grid, against: str = "target_only") -> list[dict]:
    """For each number of target records: accuracy with all related subsets minus that of another curve."""
    cells = {
        (r["part"], r["target"], r["seed"], int(r["arm"].rsplit("_", 1)[1])): r["cell"]
        for r in grid.results
        if r["table"] == "efficiency"
    }
    units: dict[int, list[Unit]] = {}
    for (curve, target, seed, records), cell in cells.items():
        other = cells.get((against, target, seed, records))
        if curve == "with_related" and other:
            result = compare(*(grid.answers.correct_by_id(name, target) for name in (cell, other)))
            only_a, only_b = result.only_a, result.only_b
            units.setdefault(records, []).append(Unit(target, seed, result.n, only_a - only_b, only_a + only_b))
    gains = []
    for records, group in sorted(units.items()):
        contrast = estimate(group, same_records=not grid.is_phantom)
        low, high = contrast.interval()
        gains.append(
            {"records": records, "mean": contrast.mean, "ci_low": low, "ci_high": high, "up": contrast.is_up,
             "down": contrast.is_down, "equivalent": is_equivalent(contrast), "seeds": contrast.seeds}
        )  # fmt: skip
    return gains


def summary_text(grid: Grid, answer: Answer, limits: Sequence[str]) -> str:
    """Plain text: what was run, what it shows, with numbers and intervals, and what it does not show."""
    head = (
        f"{grid.config['name']}: {counted(len(grid.done()), 'cell')} of {len(grid.cells):,}, "
        f"{table_names(grid.tables) or 'no table'}; {grid.model}, "
        f"{'phantoms' if grid.of_phantoms else 'images from files'}, "
        f"{counted(len(grid.seeds), 'seed')} ({', '.join(map(str, grid.seeds)) or 'none'})."
    )
    first = " ".join([answer.opening, *answer.first()])
    paragraphs = [first, head, " ".join(answer.sentences()), *(f"- {limit}" for limit in limits)]
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
    targets, model = sorted({row["target"] for row in summary["rows"]}), grid.model
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
        "The base has seen phantoms of every pair of modality and area, and was asked about their objects in words of its "
        "own. No modality, area, task or label, and no test image, was among them.":
            phantoms and grid.config.get("base", {}).get("steps"),
        "Training phantoms are easier than those of a test: in nine of ten another element does not matter, so that each "
        "word can be learnt by itself. Images of patients are not so kind.":
            grid.is_phantom and grid.config["data"].get("phantom_decoys", 1.0),
        f"The recipe was chosen on some of these targets ({listed(tuned)}): on them it may look too good.":
            phantoms and tuned,
        f"A model of this size ({model}), pre-trained on phantoms alone, is far too weak for a medical claim: what the "
        "grid shows is that the whole path works on these images, and how wide the intervals are.":
            not phantoms and model.endswith("_tiny"),
        "Test records read from files return with every seed, so seeds measure the training's own spread and add no "
        "test records; a source image may occur in more than one dataset of a collection.": not grid.is_phantom,
        "One seed: nothing is said of the recipe. The spread over draws of the data, the base and the training is not "
        "measured; intervals are over targets (of rows: over records), and hold for these models alone.": num_seeds == 1,
        f"With {num_seeds} seeds an interval over them is wide, so that much that is there may not be shown.":
            targets and 1 < num_seeds < 5,
        "A p of a row is of these models on these records; another training of the same recipe would give another.":
            bool(targets),
        "Baseline+ trains on subsets that share no element with the target, so it never meets the words of the "
        f"target's task. Part of any gain over it is learning these words; {words}.": "baseline_plus" in arms,
        f"{counted(lapsed, 'printed row')} of the paper here share more or less with their target than they say, by this "
        f"project's table of tasks: “{DOUBTFUL}” stands beside the answer.": lapsed,
        "In the ablation at equal epochs an arm with fewer subsets also has fewer updates. The random removals measure "
        "that part: each takes away as many subsets as the element's.":
            any(arm.startswith("wo_") and not arm.endswith("_updates") for arm in arms),
        **dict.fromkeys([*below_chance(grid), *letter_habits(grid)], True),
        "The published description does not say how Baseline+ was drawn, how large the subsets were, or most training "
        "settings; what stands in for them here is this project's choice, and is listed with the configuration.": True,
    }  # fmt: skip
    return [text for text, holds in texts.items() if holds]
