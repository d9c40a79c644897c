"""The controls of a grid's answers as tables: what letters alone give, and the tests asked again in another way."""

from medcg_jax.study.report.load_grid import Grid, Score, arm_name
from medcg_jax.study.report.tables import Column, Table
from medcg_jax.study.report.text import listed
from medcg_jax.study.stats.controls import SHUFFLED


def controls(summary: dict) -> list[Table]:
    """Of `stats.summarise`'s controls: those of the predictions, and of the tests asked again where the grid did so."""
    return [letters(summary), asked_again(summary)]


def letters(summary: dict) -> Table:
    found = summary["controls_of_answers"]
    counts = sorted({part["options"] for one in found for part in one["by_options"]})
    made = Table(
        "controls", "What letters and options alone give",
        "Per arm, in %: the accuracy; what answering its most frequent letter always would give; the accuracy after "
        "the letters' probabilities are divided by their mean (a liking for letters taken out); by number of options, "
        "beside chance; and accuracy by likelihood and by free generation on the same records, how often the two "
        "agree, and the exact McNemar p.",
        [Column("table", "Table"), Column("arm", "Arm"), Column("n", "Answers", "count"),
         Column("accuracy", "Accuracy", "share"), Column("most_frequent_accuracy", "Most frequent letter", "share"),
         Column("prior_corrected_accuracy", "Liking for letters taken out", "share"),
         *(Column(f"options_{k}", f"{k} options (chance {100 / k:.0f})", "share") for k in counts),
         Column("likelihood", "By likelihood", "share"), Column("generated", "Generated", "share"),
         Column("agreement", "Agree", "share"), Column("p", "p", "p")],
    )  # fmt: skip
    for one in found:
        generation = one["generation"] or {}
        made.add(
            {c.key: one.get(c.key) for c in made.columns} | _named(one)
            | {f"options_{part['options']}": part["accuracy"] for part in one["by_options"]}
            | {key: generation.get(key) for key in ("likelihood", "generated", "agreement", "p")}
        )  # fmt: skip
    return made


def asked_again(summary: dict) -> Table:
    found = [one for one in summary["controls_of_answers"] if one["circular"] or one["shuffled_images"]]
    shifts = sorted({shift for one in found for shift in (one["circular"] or {"by_shift": {}})["by_shift"]}, key=int)
    made = Table(
        "controls_again", "The same tests asked again",
        "Per arm, accuracy in %: with the options moved on by one, two and three places, and right in every place "
        "(circular); of questions with more than two options, as asked and with two of them left; and with the image "
        "of another record, which must fall to chance. [95 % Wilson interval over records.] Orange: the interval is "
        "above chance, so something but the image gives answers away; green: it is not. No record keeps its own image, "
        "so a model that reads images well comes out a little below chance.",
        [Column("table", "Table"), Column("arm", "Arm"), Column("plain", "As asked", "share"),
         *(Column(f"shift_{shift}", f"Moved by {shift}", "share") for shift in shifts),
         Column("circular", "In every place", "share"), Column("two_plain", "More than two options", "share"),
         Column("two", "Two of them", "share"), Column("shuffled", "Another image", "score"),
         Column("chance", "Chance", "share"), Column("n", "Answers", "count")],
    )  # fmt: skip
    for one in found:
        circular, two, other = one["circular"] or {}, one["two_options"] or {}, one["shuffled_images"]
        values = {"plain": circular.get("plain"), "circular": circular.get("accuracy"), "n": one["n"]}
        values |= {f"shift_{shift}": value for shift, value in circular.get("by_shift", {}).items()}
        values |= {"two_plain": two.get("plain"), "two": two.get("accuracy")}
        colour = ""
        if other:
            values |= {"shuffled": Score(other["accuracy"], other["ci_low"], other["ci_high"], other["n"], ()),
                       "chance": other["chance"]}  # fmt: skip
            colour = "loss" if other["ci_low"] > other["chance"] else "win"
        made.add(_named(one) | values, shuffled=colour)
    return made


def limits(grid: Grid, summary: dict) -> list[str]:
    """Which tests could not be asked beside other images, in a grid that wanted it."""
    names = sorted({name for one in summary["controls_of_answers"] for name in one["not_shuffled"]})
    if not names or SHUFFLED not in grid.config["eval"].get("controls", ()):
        return []
    return [
        f"The tests of {listed(names)} were not asked beside other images, since their records have none or all the "
        "same: whether questions alone give their answers away is not known."
    ]


def _named(one: dict) -> dict:
    return {"table": one["table"].replace("_", "-"), "arm": arm_name(one["arm"])}
