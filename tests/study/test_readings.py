"""How printed phrases are read as subset numbers: every reading and every alternative, found again from the phrases."""

import re
from itertools import product

import pytest

from medcg_jax.study.design import combos, mat
from medcg_jax.study.design.suite import DIRECTIONS

TASKS = ("Cancer", "State", "COVID", "Level", "Diseases", "Cell Identification")
SUBSETS = mat.paper_subsets()
MODALITIES, AREAS = ({getattr(s, name) for s in SUBSETS.values()} for name in ("modality", "area"))
FILES = {
    3: "table3_classification_pairs", 5: "table5_nextchat_detection", 6: "table6_minigptv2_detection",
    7: "table7_qwen2_vl", 8: "table8_llama32_vision",
}  # fmt: skip
# Detection phrases that name a structure, not an element.
DETECTION = {"Lung Det": "47", "Spinal Error Det": "49"}


def words(phrase: str) -> list[str]:
    text = phrase.replace("Retine", "Retina").replace("identification", "Identification")
    return [word.strip() for word in re.split(r"[,()]", text) if word.strip()]


def fitting(phrase: str, implied: dict[str, str]) -> set[str]:
    """Numbers of the subsets that a phrase may mean. implied: element -> value that the row's direction fixes."""
    named, found = words(phrase), set()
    task = next(
        (word.removesuffix(" Det") for word in named if word.removesuffix(" Det") in TASKS), implied.get("task")
    )
    if named[-1] in DETECTION:
        return {DETECTION[named[-1]]}
    for number, subset in SUBSETS.items():
        if mat.has_boxes(subset) != named[-1].endswith("Det"):
            continue
        values = [(subset.modality, MODALITIES, "modality"), (subset.area, AREAS, "area")]
        printed = [
            ({word for word in named if word in known} or {implied.get(key)}) - {None} for _, known, key in values
        ]
        if all(not names or own in names for (own, _, _), names in zip(values, printed, strict=True)) and (
            task is None or task in mat.task_elements(subset.task)
        ):
            found.add(number)
    return found


def readings(row: dict[str, str], published: mat.PaperRow) -> set[tuple[str, ...]]:
    """Every pair of subsets that a row's phrases may mean: those that complete its direction's pattern, where there is
    one; else those that supply all three elements of the target."""
    target = SUBSETS[published.target]
    phrases = (row["related_a"], row["related_b"])
    implied = {}
    if published.direction in ("fixed modality", "fixed area"):
        element = published.direction.removeprefix("fixed ")
        implied = {element: getattr(target, element)}
    if published.direction == "fixed task":
        named = [word for phrase in (*phrases, row["target"]) for word in words(phrase) if word in TASKS]
        implied = {"task": named[-1]} if named else {}
    candidates = [(fitting(p, implied) or fitting(p, {})) - {published.target} for p in phrases]
    pairs = set(product(*candidates))
    pattern = combos.PATTERNS[DIRECTIONS[published.direction]]

    def given(pair, order=1):
        return [mat.shared(SUBSETS[n], target) for n in pair][::order]

    complete = {p for p in pairs for o in (1, -1) if all(w <= g for w, g in zip(pattern, given(p, o), strict=True))}
    return complete or {p for p in pairs if frozenset().union(*given(p)) == set(mat.ELEMENTS)}


def printed_as(published: mat.PaperRow) -> dict[str, str]:
    """The printed row that a reading is of; tables 7 and 8 repeat rows of table 3."""
    return {int(row["row"]): row for row in mat.paper_csv(FILES[published.table])}[published.row]


@pytest.mark.parametrize("table", [3, 5, 6, 8])
def test_every_pair_that_fits_the_phrases_is_the_reading_or_an_alternative(table):
    for row in mat.paper_rows(table):
        found = readings(printed_as(row), row)
        assert {row.related, *row.alternatives} == found, row
        assert len(found) == 1 + len(row.alternatives)


def test_a_wrong_reading_is_seen():
    row = mat.paper_rows(3)[18]
    assert (row.row, row.related) == (19, ("05", "28"))
    # 30, as it was once read: no State by the task table, so it does not complete the fixed task.
    assert ("05", "30") not in readings(printed_as(row), row)
    level = mat.paper_rows(3)[36]
    assert {("18", "17"), ("18", "16"), ("18", "34")} <= readings(printed_as(level), level)


def test_tables_7_and_8_read_as_the_same_phrases_of_table_3():
    by_phrase = {
        (f"{row['related_a']}, {row['related_b']}".lower(), row["target"]): mat.paper_rows(3)[int(row["row"]) - 1]
        for row in mat.paper_csv(FILES[3])
    }
    seven = {int(row["row"]): row for row in mat.paper_csv(FILES[7])}
    for table in (7, 8):
        for row in mat.paper_rows(table):
            first = by_phrase[seven[row.row]["related"].lower(), seven[row.row]["target"]]
            read = (row.related, row.target, row.direction, row.confidence, row.alternatives)
            assert read == (first.related, first.target, first.direction, first.confidence, first.alternatives)
            assert row.evidence == f"as table 3 row {first.row}"


def test_a_target_has_the_printed_baseline_of_its_subset():
    printed = {
        row["subset"]: row["accuracy"]
        for name in ("table1_in_distribution", "table2_out_of_distribution")
        for row in mat.paper_csv(name)
        if row["model"] == "Baseline"
    }
    odd = []
    for table, name in ((3, FILES[3]), (4, "table4_three_datasets")):
        for row, line in zip(mat.paper_rows(table), mat.paper_csv(name), strict=True):
            if printed[row.target] != line["baseline"]:
                odd.append((table, row.row))
                assert row.confidence == "medium"
    assert odd == [(3, 20), (4, 1), (4, 2)]


def test_confidence_follows_from_what_else_fits():
    odd = {(3, 20), (4, 1), (4, 2)}
    for table in range(3, 9):
        assert mat.repeats(table) == {3: {16}, 7: {4}, 8: {4}}.get(table, set())
        for row in mat.paper_rows(table):
            several = row.alternatives or (table, row.row) in odd
            low = row.row in mat.repeats(table)
            assert row.confidence == ("low" if low else "medium" if several else "high"), row
