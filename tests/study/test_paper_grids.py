"""The grids of the published tables and figures: what every row is trained and tested on, pinned."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from medcg_jax.config import DECIDING_ARMS, REMOVAL_ARMS, ConfigError, replace
from medcg_jax.config_file import load
from medcg_jax.study.design import mat, schedule, suite
from medcg_jax.study.design.leaks import check_cell
from medcg_jax.study.run.dry import nominal_source

CONFIGS = Path(__file__).parents[2] / "configs"
# Of the phantom study.
SEEDS = load(f"{CONFIGS / 'phantom'}.py:study").study.seeds
# Config -> cells, trainings, and the digest of all rows: of what the paper has (`is_papers`), then of the whole grid.
GOLDEN = {
    "table1": ((27, 26, "8afccf7d1fed"), (27, 26, "8afccf7d1fed")),
    "table2": ((27, 26, "e30c4dfb2d76"), (27, 26, "e30c4dfb2d76")),
    "table3": ((126, 49, "d5686a962e3f"), (368, 167, "138b3a9f9b10")),
    "table4": ((27, 13, "92def58ae12a"), (99, 57, "2443fe0e996f")),
    "table5": ((16, 8, "671251a5d3cd"), (68, 52, "cd38ee8a9a6a")),
    "table6": ((16, 8, "61ce2d9700f3"), (68, 52, "412abaf9bbf0")),
    "table7": ((24, 13, "6a2791a5b506"), (66, 48, "06ecfd1a38e8")),
    "table8": ((24, 13, "2d7e0382595d"), (66, 48, "941748e61ce6")),
    "figure4": ((32, 28, "6e26f7b25727"), (80, 76, "b1ab4c641645")),
    "efficiency": ((56, 52, "f5b4233b7f65"), (84, 80, "7fb5492dd2c4")),
    "paper": ((295, 162, "49988e41a5ca"), (685, 405, "b96324b79f50")),
}
# A row of each kind in full; subsets have all their 3,000 records where nothing else is said.
ROWS = """\
pairs.fixed_modality.04.t3r1.baseline.s0 | fixed_modality/04/t3r1 | baseline |  | 04
pairs.fixed_modality.04.t3r1.baseline_plus.s0 | fixed_modality/04/t3r1 | baseline_plus | 09 11 | 04
pairs.fixed_modality.04.t3r1.trained.s0 | fixed_modality/04/t3r1 | trained | 03 06 | 04
pairs.modality_area.19.t3r42.trained.s0 | modality_area/19/t3r42 | trained | 21 17 | 19
triples.one_each.29.t4r9.trained.s0 | one_each/29/t4r9 | trained | 28 24 08 | 29
detection_pairs.modality_area.33.t5r8.trained.s0 | modality_area/33/t5r8 | trained | 42 02 | 33
multi_task.out_of_distribution.37.single_task.s0 | out_of_distribution/37 | single_task | 37 | \
01 04 05 06 10 12 17 20 24 27 29 34
ablation.03.all_related.s0 | 03 | all_related | 02 04 05 06 09 26 28 30 32 | 03
ablation.03.wo_task.s0 | 03 | wo_task | 02 04 06 30 | 03
efficiency.with_related.03.efficiency_30.s0 | with_related/03 | efficiency_30 | 02 04 05 06 09 26 28 30 32 03:30 | 03
efficiency.target_only.28.efficiency_3000.s0 | target_only/28 | efficiency_3000 | 28 | 28
"""


def plan(name: str, arg: str = "", arms: tuple[str, ...] = ()) -> schedule.Plan:
    """The grid of a config on the paper's 53 subsets of 9,000 training records each, 3,000 for a set of several."""
    run = replace(load(f"{CONFIGS / name}.py{arg and ':'}{arg}"), study__arms=arms)
    return schedule.make_plan(run, nominal_source(9000))


def is_papers(cell: suite.Cell) -> bool:
    """Whether the paper has such a cell, or its controls were there from the start."""
    added = (*DECIDING_ARMS, *(["baseline_plus"] if cell.table == "detection_pairs" else []))
    is_new_removal = cell.arm.startswith("random_removal_") or cell.arm.endswith("_updates")
    return cell.arm not in added and not is_new_removal and cell.row.part != "with_unrelated"


def line(cell: suite.Cell) -> str:
    parts = zip(cell.related, cell.num_records, strict=True)
    training = " ".join(name if count == 3000 else f"{name}:{count}" for name, count in parts)
    return f"{cell.id} | {cell.row} | {cell.arm} | {training} | {' '.join(cell.target)}"


def digest(cells) -> str:
    return hashlib.sha256("\n".join(line(cell) for cell in cells).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", GOLDEN)
def test_every_grid_is_the_one_that_was_pinned(name):
    found = plan(name)
    papers, whole = GOLDEN[name]
    cells = [cell for cell in found.cells if is_papers(cell)]
    assert (len(cells), len({cell.training for cell in cells if cell.training}), digest(cells)) == papers
    assert (len(found.cells), sum(job.steps > 0 for job in found.jobs), digest(found.cells)) == whole


def test_any_change_of_a_row_is_seen():
    cells = plan("table3").cells
    trained = next(i for i, cell in enumerate(cells) if cell.arm == "trained")
    changes = (
        {"num_records": (3000, 2999)},
        {"related": ("03", "05")},
        {"target": ("05",)},
        {"row": suite.Row("fixed_area", "04")},
    )
    for change in changes:
        changed = (*cells[:trained], dataclasses.replace(cells[trained], **change), *cells[trained + 1 :])
        assert digest(changed) != digest(cells)
    assert digest(cells[1:]) != digest(cells) != digest(cells[::-1])


def test_rows_in_full():
    lines = {line(cell) for name in GOLDEN if name != "paper" for cell in plan(name).cells}
    assert [row for row in ROWS.splitlines() if row not in lines] == []


@pytest.mark.parametrize(("table", "rows"), [(3, 42), (4, 9), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_each_table_has_the_published_rows_and_arms(table, rows):
    cells = [cell for cell in plan(f"table{table}").cells if is_papers(cell)]
    trained = {c.row.published: c for c in cells if c.arm == "trained"}
    assert {key: (c.related, c.target) for key, c in trained.items()} == {
        (table, row.row): (row.related, (row.target,)) for row in mat.paper_rows(table)
    }
    arms = ["baseline", "trained"] if table in (5, 6) else ["baseline", "baseline_plus", "trained"]
    assert len(trained) == rows and [c.arm for c in cells] == arms * rows


@pytest.mark.parametrize("name", GOLDEN)
def test_no_cell_is_taken_for_a_leak(name):
    source, found = nominal_source(9000), plan(name)
    by_name = {subset.name: subset for subset in (*source.subsets, *source.detection_subsets)}
    for cell in found.cells:
        check_cell(cell, by_name)


def test_tables_1_and_2_have_the_published_subsets():
    inside, outside = mat.paper_split()
    assert (len(inside), len(outside)) == (25, 12)
    one, two = plan("table1").cells, plan("table2").cells
    assert [c.target for c in one if c.arm != "single_task"] == [inside] * 2
    assert [(c.related, c.target) for c in one if c.arm == "single_task"] == [((n,), (n,)) for n in inside]
    assert {(c.arm, c.target) for c in two} == {(arm, outside) for arm in ("baseline", "multi_task", "single_task")}
    assert {(c.seed, c.training) for c in one} == {(c.seed, c.training) for c in two}


def test_equal_cells_of_table_3_are_trained_once():
    """One training for each distinct set of related subsets, and one Baseline+ for each target."""
    rows, found = mat.paper_rows(3), plan("table3", arms=("baseline", "baseline_plus", "trained"))
    assert (len({frozenset(row.related) for row in rows}), len({row.target for row in rows})) == (36, 15)
    arms = [{(cell.arm, cell.target) for cell in job.cells} for job in found.jobs if job.steps]
    # Two subsets drawn for the Baseline+ of one target are another's related pair.
    shared = [found for found in arms if len({arm for arm, _ in found}) == 2]
    assert len(shared) == 2 and len(arms) == 36 + 15 - 2
    assert all(job.steps == 938 for job in found.jobs if job.training)  # 5 epochs of 6,000 records in batches of 32


def test_a_table_keeps_its_rows_with_another_backbone():
    table3 = [(c.row, c.related) for c in plan("table3").cells]
    for model in ("qwen2_vl_7b", "minigpt_v2_7b", "llava15_13b"):
        assert [(c.row, c.related) for c in plan("table3", model).cells] == table3
    assert [c.row for c in plan("table5", "minigpt_v2_7b").cells] == [c.row for c in plan("table5").cells]
    tiny = plan("table3", "llava15_tiny,release").cells
    assert [(c.row, c.related) for c in tiny if c.seed == SEEDS[0] and c.arm == "trained"] == [
        (c.row, c.related) for c in plan("table3").cells if c.arm == "trained"
    ]


@pytest.mark.parametrize(
    ("config", "arg", "rows", "arms"),
    [("table1", "llava15_tiny,phantom", 24, 3), ("table3", "qwen2_vl_tiny,phantom", 32, 9),
     ("table5", "next_chat_tiny,phantom", 24, 9), ("figure4", "llava15_tiny", 8, 2 + 2 * len(REMOVAL_ARMS))],
)  # fmt: skip
def test_tables_of_phantoms(config, arg, rows, arms):
    run = load(f"{CONFIGS / config}.py:{arg}")
    cells = schedule.make_plan(run).cells
    assert run.data.source == "phantom" and run.model.name == arg.partition(",")[0] and run.study.seeds == SEEDS
    asked = {(c.row, t) for c in cells for t in c.target}
    assert len(asked) == rows and len({c.arm for c in cells}) == arms


def test_backbones_keep_their_own_recipes():
    run = load(f"{CONFIGS / 'table3'}.py:minigpt_v2_7b")
    own = load(f"{CONFIGS / 'minigpt_v2_7b'}.py")
    assert (run.model, run.train, run.data, run.mesh) == (own.model, own.train, own.data, own.mesh)
    tiny = load(f"{CONFIGS / 'table6'}.py:minigpt_v2_tiny")
    assert tiny.base.steps == 2800 and "lora" not in tiny.model.trainable and tiny.study.tables == ("detection_pairs",)
    assert run.name == "table3_minigpt_v2_7b_release" and tiny.name == "table6_minigpt_v2_tiny_phantom"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "table3.py:llava",
            "table3.py:llava: did you mean llava15_7b. expected one of .*; behind a comma one of release, phantom",
        ),
        ("table3.py:llava15_7bb", "did you mean llava15_7b"),
        ("table3.py:llava15_7b,mini", "table3.py:llava15_7b,mini: expected .*; behind a comma one of release, phantom"),
        ("table3.py:llava15_7b,", "table3.py:llava15_7b,: "),
        ("table3.py:llava15_7b,prepared", "table3.py:llava15_7b,prepared: "),
        ("table5.py:llava15_7b", "expected one of next_chat_7b, minigpt_v2_7b, next_chat_tiny, minigpt_v2_tiny; "),
        ("figure4.py:03", "figure4.py:03: "),
        ("efficiency.py:x", "efficiency.py:x: "),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(str(CONFIGS / config))
    assert "\n" not in str(error.value)
