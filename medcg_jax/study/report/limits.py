"""What a grid's page must say against itself: what is missing, odd, or not shown."""

from medcg_jax.data.phantom.world import TUNE_TARGETS
from medcg_jax.study.report.load_grid import Grid, arm_name
from medcg_jax.study.report.text import counted, listed


def missing(grid: Grid) -> list[str]:
    """What a reader must know is not on the page."""
    said = []
    failed, waiting = grid.failed(), grid.waiting()
    if failed:
        said.append(f"{counted(len(failed), 'cell')} of {len(grid.cells):,} failed; they are listed below.")
    if waiting:
        said.append(
            f"{counted(len(waiting), 'cell')} of {len(grid.cells):,} had not been run when this page was written; rows "
            "and comparisons are of the finished ones alone."
        )
    said += grid.notes
    absent = [name for name in grid.config["study"]["tables"] if name not in grid.tables]
    if absent:
        said.append(f"Asked for, and without a finished cell: {listed([name.replace('_', '-') for name in absent])}.")
    return said


def letter_habits(grid: Grid) -> list[str]:
    """Arms that answer one letter almost always, or whose free answers are often none: what both mean."""
    said = []
    for table in grid.tables:
        own = {arm: value for (name, arm), value in grid.letters.items() if name == table and value.n}
        stuck = [
            arm_name(arm)
            for arm, value in own.items()
            if max(value.predicted.values()) > 0.9 * value.n > max(value.answers.values())
        ]
        loose = [arm_name(arm) for arm, value in own.items() if value.unparsed > 0.2 * value.generated]
        words = table.replace("_", "-")
        if stuck:
            said.append(
                f"One letter makes up more than 90 % of all answers of {listed(stuck)} ({words}), and not of the right "
                "ones: such an accuracy says little of the images."
            )
        if loose:
            said.append(
                f"More than a fifth of the generated answers of {listed(loose)} ({words}) are no offered letter."
            )
    return said


def below_chance(grid: Grid) -> list[str]:
    """Untrained and unrelated arms that are worse than guessing, which flatters what is compared with them."""
    said = []
    for table in grid.tables:
        for arm in ("baseline", "baseline_plus", "all_unrelated"):
            scores = [(target, arms[arm]) for (_, target), arms in grid.scores(table).items() if arm in arms]
            low = [score for target, score in scores if score.high < (grid.chance(target) or 0)]
            if low:
                said.append(
                    f"{len(low)} of {len(scores)} accuracies of {arm_name(arm)} ({table.replace('_', '-')}) lie below "
                    "chance with their whole interval: part of what is gained over them is coming back to chance."
                )
    return said


def limits(grid: Grid, summary: dict) -> list[str]:
    """What the grid does not show, each with its reason."""
    targets = sorted({row["target"] for row in summary["rows"]})
    said = []
    model = grid.config["model"]["name"]
    if grid.of_phantoms:
        said.append(
            "Phantoms are drawn by formulas. Their modalities, areas and tasks are named after medical ones and share "
            "nothing else with them; an effect here is no evidence of one in patients."
        )
        if grid.config.get("base", {}).get("steps"):
            said.append(
                "The base was taught to name the modality and the area of phantoms of every pair of the two, so those "
                "words, and how the images look, are known to it before any fine-tune. No task word, label or test "
                "image was."
            )
        tuned = [name for name in targets if name in TUNE_TARGETS]
        if tuned:
            said.append(
                f"The recipe was chosen on some of these targets ({listed(tuned)}): on them it may look too good."
            )
    elif model.endswith("_tiny"):
        said.append(
            f"A model of this size ({model}), pre-trained on phantoms alone, is far too weak for a medical claim: what "
            "the grid shows is that the whole path works on these images, and how wide the intervals are."
        )
    if not grid.is_phantom:
        said.append(
            "Test records read from files return with every seed, so seeds measure the training's own spread and add "
            "no test records; a source image may occur in more than one dataset of a collection."
        )
    seeds = len(grid.seeds)
    if seeds == 1:
        said.append("One seed: the spread over draws of the data, the base and the training is not measured.")
    if targets and (seeds < 5 or len(targets) < 10):
        said.append(
            f"With {counted(seeds, 'seed')} and {counted(len(targets), 'target')} a bootstrap interval over them is "
            "rough, and likely too narrow."
        )
    arms = {(row["table"], row["arm"]) for row in grid.results}
    if any(arm == "baseline_plus" for _, arm in arms):
        said.append(
            "Baseline+ trains on subsets that share no element with the target, so it never meets the words of the "
            "target's task. Part of any gain over it is learning these words; the control “same task only” has them."
        )
    if any(arm.startswith("wo_") for _, arm in arms):
        said.append(
            "Every arm trains for equal epochs, so an arm with fewer subsets also has fewer steps. The random removal "
            "measures that part; it removes as many subsets as the three removals do on average, not as each does."
        )
    said += [*below_chance(grid), *letter_habits(grid)]
    said.append(
        "The published description does not say how Baseline+ was drawn, how large the subsets were, or most training "
        "settings; what stands in for them here is this project's choice, and is listed with the configuration."
    )
    return said
