"""The answer of a grid in words, made from its numbers.

Every statement is made from an effect and its interval: an interval that includes 0 is said to show nothing.
"""

from collections.abc import Sequence

from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.stats import stats

ELEMENTS = ("modality", "area", "task")
PARTS = {
    "fixed_modality": "fixed modality",
    "fixed_area": "fixed area",
    "fixed_task": "fixed task",
    "modality_area": "modality-area pair",
    "one_each": "one element each",
    "in_distribution": "in distribution",
    "out_of_distribution": "out of distribution",
    "with_related": "with all related subsets",
    "target_only": "target alone",
}


def verdict(effect: dict) -> str:
    """Either "up" or "down", where the 95 % interval is clear of 0, else "open": not shown."""
    if effect["ci_low"] > 0:
        return "up"
    return "down" if effect["ci_high"] < 0 else "open"


def points(value: float, sign: bool = False) -> str:
    """A fraction in points with one decimal: .361 -> "36.1", with sign "+36.1"."""
    text = f"{abs(100 * value):.1f}"
    minus = value < 0 and text != "0.0"
    return ("−" if minus else "+" if sign else "") + text


def interval(effect: dict) -> str:
    return f"{points(effect['ci_low'])} to {points(effect['ci_high'])}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(items: Sequence[str]) -> str:
    """Such as "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def effect_name(effect: dict) -> str:
    """Such as "Trained − Baseline+ (pairs)" and "Multi-task − Baseline (multi-task, out of distribution)"."""
    where = effect["table"].replace("_", "-")
    if effect["part"] and effect["part"] != "one_each":
        where += f", {PARTS.get(effect['part'], effect['part'])}"
    return f"{arm_name(effect['arm'])} − {arm_name(effect['against'])} ({where})"


def short_name(effect: dict) -> str:
    """What a comparison asks, in few words."""
    key = (effect["table"], effect["arm"], effect["against"])
    names = {
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
    return names.get(key) or effect_name(effect)


class Answer:
    """The answer of a grid in words, from `stats.summarise`.

    Attributes:
      lead: "yes", "partly", "no", "not shown" or "none": what the headline comparison shows.
    """

    def __init__(self, grid: Grid, summary: dict):
        self.grid, self.summary = grid, summary
        self.main = (
            self.find("pairs", "trained", "baseline_plus")
            or self.find("pairs", "trained", "baseline")
            or self.find("triples", "trained", "baseline_plus")
            or self.find("triples", "trained", "baseline")
            or self.find("detection_pairs", "trained", "baseline")
            or self.find("ablation", "all_related", "all_unrelated")
            or self.find("ablation", "all_related", "baseline")
            or self.find("multi_task", "multi_task", "baseline", "out_of_distribution")
        )

    def find(self, table: str, arm: str, against: str, part: str = "") -> dict | None:
        key = (table, part, arm, against)
        return next(
            (e for e in self.summary["effects"] if (e["table"], e["part"], e["arm"], e["against"]) == key), None
        )

    @property
    def checks(self) -> list[dict]:
        """The comparisons that a plain "yes" needs beside the headline, as far as the grid has them."""
        wanted = (
            self.find("pairs", "trained", "baseline"),
            self.find("triples", "trained", "baseline_plus") or self.find("triples", "trained", "baseline"),
            self.find("ablation", "all_related", "all_unrelated"),
            *(self.find("ablation", "all_related", f"wo_{element}") for element in ELEMENTS),
            self.find("ablation", "all_related", "same_task"),
            self.find("multi_task", "multi_task", "single_task", "in_distribution"),
            self.find("multi_task", "multi_task", "baseline", "out_of_distribution"),
        )
        return [e for e in wanted if e and e is not self.main]

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
        """The first words, which are set in bold."""
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
        """The numbers, sentence by sentence; they follow the opening and `totals` in one paragraph."""
        parts = [
            *self.combination("pairs", "two subsets which between them hold all three elements of the target"),
            *self.combination("triples", "three subsets with one element of the target each"),
            *self.combination(
                "detection_pairs",
                "a subset with boxes and one of choice questions which between them hold all three elements of the "
                "target",
            ),
            *self.ablation(),
            *self.multi_task(),
            *self.efficiency(),
            self.caution(),
        ]
        return [part for part in parts if part]

    def caution(self) -> str:
        if self.grid.of_phantoms:
            return "The images are phantoms, not patients: nothing here speaks of medical images."
        return f"This is how {self.grid.config['model']['name']} answers these test records; no clinical claim follows."

    def statement(self, effect: dict, what: str, over: str) -> str:
        """One effect as a sentence without its stop; its interval decides the verb."""
        state = verdict(effect)
        rows = counted(effect["rows"], "row")
        if state == "down":
            won = f"{effect['losses']} of {rows} down, {effect['significant_losses']} significantly"
        else:
            won = f"{effect['wins']} of {rows} up, {effect['significant']} significantly"
        if state == "open":
            return (
                f"{what} {'are' if what.startswith('all ') else 'is'} not shown to change accuracy against {over} "
                f"({points(effect['mean'], True)} points; the interval {interval(effect)} includes 0; {won})"
            )
        verb, size = "raised" if state == "up" else "lowered", points(abs(effect["mean"]))
        words = "95 % interval " if effect is self.main else ""
        return f"{what} {verb} accuracy by {size} points against {over} ({words}{interval(effect)}; {won})"

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
        said = where + self.statement(first, f"training on {what}", over)
        if plus and base:
            tail = {
                "up": f"against no training the gain is {points(base['mean'])} ({interval(base)})",
                "down": f"against no training it is a loss of {points(-base['mean'])} ({interval(base)})",
                "open": f"against no training no change is shown ({points(base['mean'], True)}, {interval(base)})",
            }
            said += f"; {tail[verdict(base)]}"
        return [sentence(said)]

    def answers(self, effect: dict) -> int:
        """How many test answers each arm of an effect has."""
        return sum(
            row["n"]
            for row in self.summary["rows"]
            if (row["table"], row["arm"], row["against"]) == (effect["table"], effect["arm"], effect["against"])
            and effect["part"] in ("", row["part"])
        )

    def ablation(self) -> list[str]:
        said = []
        whole = self.find("ablation", "all_related", "all_unrelated")
        if whole:
            said.append(sentence(self.statement(whole, "all related subsets together", "all unrelated ones")))
        controls = self.summary["controls"]
        effects = {e: self.find("ablation", "all_related", f"wo_{e}") for e in ELEMENTS}
        costs = [f"{element} {self.loss(effect)}" for element, effect in effects.items() if effect]
        if costs:
            random = self.find("ablation", "all_related", "random_removal")
            beside = f"; leaving out as many at random costs {self.loss(random)}" if random else ""
            said.append(
                f"Leaving out the related subsets that share an element costs, in points: {listed(costs)}{beside}."
            )
        beyond = [f"{e} {self.loss(controls[f'wo_{e}'])}" for e in ELEMENTS if f"wo_{e}" in controls]
        if beyond:
            said.append(f"Beyond the random removal: {listed(beyond)}.")
        same = controls.get("same_task")
        if same:
            over = "training on subsets that share the task alone"
            said.append(sentence(self.statement(same, "all related subsets together", over)))
        return said

    def loss(self, effect: dict) -> str:
        state = {"up": "", "open": ", not shown", "down": ", a gain"}[verdict(effect)]
        return f"{points(effect['mean'])} ({interval(effect)}{state})"

    def multi_task(self) -> list[str]:
        said = []
        inside = self.find("multi_task", "multi_task", "single_task", "in_distribution")
        if inside:
            what, over = "one model of all subsets", "one model per subset, with the same records of each"
            said.append(sentence(self.statement(inside, what, over)))
        outside = self.find("multi_task", "multi_task", "baseline", "out_of_distribution")
        if outside:
            what, over = "the same model, on combinations held out from it,", "no training"
            said.append(sentence(self.statement(outside, what, over)))
        return said

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
        every = [e for e in (self.main, *self.checks) if e]
        said = []
        for words, state in (("Shown", "up"), ("Not shown", "open"), ("The other way", "down")):
            names = [short_name(e) for e in every if verdict(e) == state]
            if names:
                said.append((words, "; ".join(names)))
        return said


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def never_trained_on(grid: Grid, table: str) -> bool:
    """Whether no cell of a table was trained on what it is tested on."""
    cells = [cell for cell in grid.done(table) if cell["related"]]
    return not any(set(cell["related"].split("+")) & set(cell["target"].split("+")) for cell in cells)


def efficiency_gains(grid: Grid) -> list[dict]:
    """By number of target records: accuracy with all related subsets less that of the target alone, paired by "
    "record."""
    cells = {
        (r["row"].split("/")[0], r["target"], r["seed"], int(r["arm"].rsplit("_", 1)[1])): r["cell"]
        for r in grid.results
        if r["table"] == "efficiency"
    }
    units: dict[int, list[stats.Unit]] = {}
    for (curve, target, seed, records), cell in cells.items():
        other = cells.get(("target_only", target, seed, records))
        if curve == "with_related" and other:
            folder = grid.workdir / "predictions"
            a, b = (stats.correct_by_id(folder / f"{name}.jsonl", target) for name in (cell, other))
            one = stats.compare(a, b)
            units.setdefault(records, []).append(stats.Unit(target, seed, one.n, one.only_a, one.only_b))
    gains = []
    for records, found in sorted(units.items()):
        low, high = stats.bootstrap_interval(found, draws=2000)
        gains.append({"records": records, "mean": stats.mean_difference(found), "ci_low": low, "ci_high": high})
    return gains
