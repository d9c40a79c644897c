"""A grid in TensorBoard and Weights & Biases: what is written is what its files say, and once for each training."""

import json
import sys
import types
from pathlib import Path

import pytest
from report_grids import make_grid, read_csv, run_of
from tensorboardX.proto.event_pb2 import Event

from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.study.design.schedule import make_plan
from medcg_jax.study.report.boards import write_boards
from medcg_jax.study.report.load_grid import Grid
from medcg_jax.study.run import grid as grid_run
from medcg_jax.study.run.grid import check_start
from medcg_jax.study.stats import stats
from medcg_jax.study.stats.grid_files import training_of

TARGET = "mri-brain-state"


@pytest.fixture
def workdir(tmp_path):
    return make_grid(
        tmp_path / "w", run_of(study__targets=(TARGET,), log__wandb="project", data__test_records_per_subset=6)
    )


class FakeWandb(types.ModuleType):
    """Records what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.summary, self.logged, self.ended = [], {}, {}, 0

    def init(self, **arguments):
        self.begun.append(arguments)
        return self

    def log(self, values):
        self.logged |= values

    def Table(self, columns, data):
        return columns, data

    def finish(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of the event files in a folder."""
    by_tag: dict[str, list] = {}
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            # A record of the file: its length, a check sum, the event, a check sum.
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    by_tag.setdefault(value.tag, []).append((event.step, value.simple_value))
    return by_tag


def test_losses_and_accuracies_are_those_of_the_files(workdir, wandb):
    write_boards(Grid(workdir))
    grid = Grid(workdir)
    trained = [cell for cell in grid.done("pairs") if cell["arm"] == "trained"]
    losses = scalars(workdir / "tensorboard" / "pairs" / "trained")
    assert len(losses) == len({training_of(cell) for cell in trained})
    lines = grid.metrics(trained[0])
    tag = next(tag for tag in losses if trained[0]["row"].split("/")[0] in tag)
    assert [step for step, _ in losses[tag]] == [line["step"] for line in lines]
    assert [value for _, value in losses[tag]] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    values = scalars(workdir / "tensorboard" / "grid")
    rows = [row for row in read_csv(workdir / "results.csv") if (row["table"], row["arm"]) == ("pairs", "trained")]
    mean = sum(float(row["accuracy"]) for row in rows) / len(rows)
    assert values["accuracy/pairs/trained"][0][1] == pytest.approx(mean, abs=1e-5)
    # Baseline+ serves several rows with one training, which is drawn once.
    cells = [cell for cell in grid.done("pairs") if cell["arm"] == "baseline_plus"]
    plus = scalars(workdir / "tensorboard" / "pairs" / "baseline_plus")
    assert len(plus) == len({training_of(cell) for cell in cells}) <= len(cells)


def test_the_second_time_nothing_is_there_twice(workdir, wandb):
    write_boards(Grid(workdir))
    before = scalars(workdir / "tensorboard" / "grid")
    write_boards(Grid(workdir))
    assert scalars(workdir / "tensorboard" / "grid") == before and not list(workdir.glob(".tensorboard*"))
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"] == json.loads((workdir / "wandb.json").read_text())["id"]


def test_weights_and_biases_has_the_tables(workdir, wandb):
    write_boards(Grid(workdir))
    (begun,) = wandb.begun
    assert begun["project"] == "project" and begun["name"] == "made" and begun["config"]["train.epochs"] == 4
    columns, data = wandb.logged["results"]
    rows = read_csv(workdir / "results.csv")
    assert [line[columns.index("target")] for line in data] == [row["target"] for row in rows]
    assert [line[columns.index("correct")] for line in data] == [int(row["correct"]) for row in rows]
    assert wandb.summary["cells/done"] == len(Grid(workdir).done()) and wandb.ended == 1
    effect = next(name for name in wandb.summary if name.startswith("effect/Trained − Baseline+ (pairs)"))
    assert effect.endswith(("/mean", "/ci_low", "/ci_high", "/p_overall"))


def test_nothing_is_written_that_was_not_asked_for(tmp_path):
    run = run_of(study__targets=(TARGET,), log__tensorboard=False, data__test_records_per_subset=6)
    workdir = make_grid(tmp_path / "w", run)
    write_boards(Grid(workdir))
    assert not (workdir / "tensorboard").exists() and not (workdir / "wandb.json").exists()


def test_a_grid_is_summarised_once_at_its_end(workdir, wandb, monkeypatch, capsys):
    """For what is printed, for the page and for the boards."""
    calls = []
    monkeypatch.setattr(stats, "summarise", lambda *args, of=stats.summarise: calls.append(args) or of(*args))
    plan = make_plan(run_of(study__targets=(TARGET,), data__test_records_per_subset=6))
    result = grid_run.summary(workdir, plan, {job.id: {"status": "done"} for job in plan.jobs})
    assert len(calls) == 1 and Path(result["page"]).is_file() and (workdir / "tensorboard").is_dir()
    assert "trained - baseline_plus" in capsys.readouterr().out


def test_a_grid_for_weights_and_biases_needs_the_package_before_it_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    with pytest.raises(ConfigError, match=r"pip install '\.\[wandb\]'"):
        check_start(replace(RunConfig(), log__wandb="project"))
