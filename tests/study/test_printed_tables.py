"""Tables 1 to 11 as the paper prints them, cell by cell against the page that they were taken from."""

import html
import re
from collections.abc import Iterator

import pytest

from medcg_jax.data.catalogue import printed_rows
from medcg_jax.study.design import mat

# Number of the caption -> our file, its columns in the order of the printed cells.
FILES = {
    3: ("table3_classification_pairs", ("related_a", "related_b", "target", "baseline", "baseline_plus", "trained")),
    4: ("table4_three_datasets", ("modality_from", "area_from", "task_from", "target", "baseline", "trained")),
    5: ("table5_nextchat_detection", ("related_a", "related_b", "target", "baseline", "trained")),
    6: ("table6_minigptv2_detection", ("related_a", "related_b", "target", "baseline", "trained")),
    7: ("table7_qwen2_vl", ("related", "target", "baseline", "trained")),
    8: ("table8_llama32_vision", ("related_a", "related_b", "target", "baseline", "trained")),
    9: ("table9_subsets", ("subset", "modality", "area", "task", "datasets")),
}  # fmt: skip
NUM_CELLS = 1362
END = "{{< /table-caption >}}"


def tables_of(page: str) -> Iterator[list[list[str]]]:
    """The tables of the page in its order, as rows of cells below each header."""
    for block in page.split("{{< table-caption >}}")[1:]:
        lines = [line.strip().strip("|") for line in block.split(END)[0].strip().splitlines()]
        yield [[cell.strip() for cell in line.split("|")] for line in (lines[0], *lines[2:])]


def plain(cell: str) -> str:
    """A cell without marks of emphasis."""
    return html.unescape(cell).replace("*", "").replace("_", "").strip()


def digest(page: str) -> dict[int, list[tuple[str, ...]]]:
    """Table -> its rows: of tables 1 and 2 (subset, model, accuracy), of 10 (with 11) with name and address apart."""
    found: dict[int, list[tuple[str, ...]]] = {}
    order = iter([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    for number, (header, *rows) in zip(order, tables_of(page), strict=True):
        if number in (1, 2):
            rows = [[n, plain(row[0]), plain(c)] for row in rows for n, c in zip(header[1:], row[1:], strict=True)]
        elif number >= 10:
            links = [re.fullmatch(r'<a href="(.*)">(.*)</a>', row[1]) for row in rows]
            rows = [
                [row[0], html.unescape(link[2]), html.unescape(link[1]), *map(html.unescape, row[2:])]
                for row, link in zip(rows, links, strict=True)
            ]
        else:
            rows = [[plain(cell) for cell in row] for row in rows]
        found.setdefault(min(number, 10), []).extend(map(tuple, rows))
    return found


def kept() -> dict[int, list[tuple[str, ...]]]:
    """The same of the package's files."""
    found = {
        number: [(row["subset"], row["model"], row["accuracy"]) for row in mat.paper_csv(name)]
        for number, name in ((1, "table1_in_distribution"), (2, "table2_out_of_distribution"))
    }
    for number, (name, columns) in FILES.items():
        read = printed_rows if number == 9 else mat.paper_csv
        found[number] = [tuple(row[column] for column in columns) for row in read(name)]
    keys = ("dataset", "name", "url", "description", "citation")
    found[10] = [tuple(row[key] for key in keys) for row in printed_rows("table10_11_datasets")]
    return found


def differences(page: str) -> tuple[int, list[tuple[int, int, str, str]]]:
    """(number of cells compared, (table, row, printed, kept) of each that differs)."""
    printed, ours, count, found = digest(page), kept(), 0, []
    for number, rows in printed.items():
        assert [len(row) for row in rows] == [len(row) for row in ours[number]], number
        for place, (row, own) in enumerate(zip(rows, ours[number], strict=True), 1):
            # The key of table 1 and 2's cells is no cell; of 9 and 10 the number is one.
            pairs = list(zip(row, own, strict=True))
            found += [(number, place, a, b) for a, b in pairs if a != b]
            count += 1 if number in (1, 2) else len(pairs)
    return count, found


@pytest.fixture(scope="module")
def page(shared_dir):
    return (shared_dir / "paper" / "source-review.md").read_text(encoding="utf-8")


def test_every_printed_cell_is_kept(page):
    assert differences(page) == (NUM_CELLS, [])
    assert sum(len(row) for number, rows in digest(page).items() for row in rows if 2 < number < 9) == 458


@pytest.mark.parametrize(
    ("printed", "other", "where"),
    [
        ("| 49 | 49 | 91", "| 49 | 49 | 92", (3, 18, "92", "91")),
        ("| 34 | 41 |", "| 43 | 41 |", (7, 8, "43", "34")),
        ("| 10 | 32 |", "| 10 | 33 |", (8, 8, "33", "32")),
        ("| **39** |", "| **38** |", (2, 13, "38", "39")),
        (
            "| 32 | X-ray | Brain | Tumor Classification | 63 |",
            "| 32 | MRI | Brain | Tumor Classification | 63 |",
            (9, 32, "MRI", "X-ray"),
        ),
    ],
)
def test_a_changed_cell_is_seen(page, printed, other, where):
    assert page.count(printed) == 1
    assert differences(page.replace(printed, other)) == (NUM_CELLS, [where])


def test_rows_that_change_places_are_seen(page):
    first, second = "CT, Brain | X-ray, **Lung** | X-ray, Brain | 49 | 50 | 81", "CT, Brain(Cancer) | X-ray, **Bones**"
    lines = page.splitlines()
    a, b = (next(i for i, line in enumerate(lines) if line.startswith(text)) for text in (first, second))
    lines[a], lines[b] = lines[b], lines[a]
    assert {(number, row) for number, row, _, _ in differences("\n".join(lines))[1]} == {(3, 19), (3, 20)}
