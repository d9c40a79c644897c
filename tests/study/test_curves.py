"""Figures over a number: the budget they name, their chance lines, what n stands beside, doses that targets lack."""

import re
from types import SimpleNamespace

import pytest
from matplotlib import pyplot as plt

from medcg_jax.study.report import curves as module
from medcg_jax.study.report.curves import Curves
from medcg_jax.study.report.load_grid import Score


class Drawn:
    """Axes and words of the figures that a `Curves` draws."""

    def __init__(self, monkeypatch):
        self.figures = {}

        def kept(folder, name, title, caption, height_in, paint, width_in=0.0):
            figure, axes = plt.subplots()
            paint(axes)
            words = [text.get_text() for text in axes.get_xticklabels()]
            words += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
            lines = [(line.get_linestyle(), float(line.get_ydata()[0])) for line in axes.lines]
            self.figures[name] = SimpleNamespace(title=title, caption=caption, words=words, lines=lines)
            return name

        monkeypatch.setattr(module, "draw", kept)


@pytest.fixture
def drawn(monkeypatch):
    yield Drawn(monkeypatch)
    plt.close("all")


def grid_of(**fields):
    known = {"config": {"study": {}}, "results": [], "tables": (), "chance": lambda target: 0.5, "scores": lambda t: {},
             "describe": lambda target: "", "done": lambda table: []}  # fmt: skip
    return SimpleNamespace(**{"is_phantom": True} | known | fields)


def test_data_efficiency_names_its_budget_and_has_three_curves(drawn, tmp_path):
    points = [
        {"curve": curve, "records": records, "accuracy": 0.6, "ci_low": 0.5, "ci_high": 0.7, "n": 40 + records}
        for curve in ("target_only", "with_related", "with_unrelated") for records in (0, 10)
    ]  # fmt: skip
    score = Score(0.6, 0.5, 0.7, 20, (0,))
    scores = {("with_related/x", "x"): {"efficiency_0": score, "efficiency_10": score}}
    for study, words in (({"efficiency_budget": "updates"}, "equal updates"), ({}, "equal epochs"),
                         ({"efficiency_budget": "epochs"}, "equal epochs")):  # fmt: skip
        grid = grid_of(config={"study": study}, scores=lambda table: scores)
        assert Curves(grid, {"curves": points}, tmp_path).efficiency() == ["efficiency"]
        found = drawn.figures["efficiency"]
        assert found.title == f"Data efficiency, {words}" and words in found.caption
        assert ("fewer updates" in found.caption) == (words == "equal epochs")
    assert [w for w in found.words if "(n" in w] == [
        "with all related subsets (n 40 to 50)", "with as many unrelated records (n 40 to 50)", "target alone (n 40 to 50)",
    ]  # fmt: skip
    assert ("--", 50.0) in found.lines
    assert Curves(grid, {"curves": []}, tmp_path).efficiency() == []


def result(target, dose, correct, seed=0):
    row = {"table": "dose", "row": f"dose/{target}", "arm": f"dose_{dose}", "target": target}
    return row | {"seed": seed, "n": 20, "correct": correct}


def test_doses_that_a_target_lacks_are_told(drawn, tmp_path):
    whole = [result(target, dose, 10 + dose, seed) for target in "xyz" for dose in (0, 1, 4) for seed in (0, 1)]
    curves = Curves(grid_of(results=whole), {}, tmp_path)
    assert curves.dose() == ["dose"]
    found = drawn.figures["dose"]
    assert found.words == ["0\n3 targets\nn 120", "1\n3 targets\nn 120", "4\n3 targets\nn 120"]
    assert "targets have every dose" not in found.caption and ("--", 50.0) in found.lines
    # The mean of the first dose, 10 of 20, and those of three targets.
    assert [y for style, y in found.lines if style == "-"] == pytest.approx([50.0] * 4)
    fewer = [row for row in whole if (row["target"], row["arm"]) != ("z", "dose_4")]
    Curves(grid_of(results=fewer), {}, tmp_path).dose()
    found = drawn.figures["dose"]
    assert "Only 2 of 3 targets have every dose" in found.caption and found.words[2] == "4\n2 targets\nn 80"
    assert Curves(grid_of(), {}, tmp_path).dose() == []


def test_calibration_is_of_the_first_table_s_arms(drawn, tmp_path):
    def entry(table, arm):
        bins = [{"n": 10, "confidence": 0.6, "accuracy": 0.5}, {"n": 30, "confidence": 0.9, "accuracy": 0.8}]
        curve = [{"coverage": 0.5, "risk": 0.1}, {"coverage": 1.0, "risk": 0.3}]
        return {"table": table, "arm": arm, "n": 1200, "ece": 0.1, "aurc": 0.2, "bins": bins, "curve": curve}

    entries = [entry("pairs", "trained"), entry("pairs", "baseline"), entry("triples", "trained")]
    grid = grid_of(tables=("efficiency", "pairs", "triples"), results=[{"table": "pairs", "target": "x"}])
    curves = Curves(grid, {"calibration": entries}, tmp_path)
    assert curves.calibration() == ["reliability", "risk_coverage"]
    reliability, risk = drawn.figures["reliability"], drawn.figures["risk_coverage"]
    assert [w for w in reliability.words if "(n" in w] == [
        "Trained (n 1,200; error 10.0)", "Baseline (n 1,200; error 10.0)",
    ]  # fmt: skip
    assert ("--", 0.0) in reliability.lines and (":", 50.0) in reliability.lines and (":", 50.0) in risk.lines
    assert re.search("area 20.0", " ".join(risk.words))
    assert Curves(grid, {"calibration": entries[2:]}, tmp_path).calibration() == []
