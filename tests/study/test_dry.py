"""`reproduce --dry`: every cell with its size and cost, with the data there and without it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medcg_jax.chips import CHIPS
from medcg_jax.cli import main
from medcg_jax.config import ConfigError, RunConfig, replace
from medcg_jax.config_file import load
from medcg_jax.data.records import DataError
from medcg_jax.families import flops
from medcg_jax.families.llava.model import llava15_7b
from medcg_jax.study.design import schedule
from medcg_jax.study.run.dry import Cost, architecture_of, costs, dry, grid_totals, nominal_source, parse_prices

ROOT = Path(__file__).parents[2]
TABLE3 = f"{ROOT / 'configs' / 'table3'}.py"
SMALL = replace(
    RunConfig(), study__tables=("pairs",), study__targets=("mri-brain-state",), data__train_records_per_subset=300,
    base__steps=10,
)  # fmt: skip


def test_dry_lists_every_cell(capsys):
    listed = dry(SMALL)
    out = capsys.readouterr().out
    assert len(listed["cells"]) >= 9 and listed["bases"] == 1 and not listed["nominal"]
    for cell in listed["cells"]:
        assert out.count(f"\n{cell['id']}: ") + out.startswith(f"{cell['id']}: ") == 1
    trained = next(c for c in listed["cells"] if c["arm"] == "trained")
    assert trained["steps"] == 94  # 5 epochs of 600 records
    assert f"{trained['related'][0]} (300)" in out and "600 records, 94 steps, 3,008 samples" in out
    assert "does not exist" not in out
    hours = next(line for line in out.splitlines() if line.startswith("chip-hours at least"))
    assert all(f" on {chip}" in hours for chip in CHIPS) and "USD" not in out


def test_hours_and_money_follow_the_work(capsys):
    listed = dry(SMALL, parse_prices("h100:2.5, v5e:1.2"))
    # 989.5 TFLOP/s of an H100.
    assert listed["chip_hours"]["h100"] == pytest.approx(listed["pflop"] * 1e15 / 989.5e12 / 3600)
    # A TPU7X chip is two devices.
    assert listed["chip_hours"]["tpu7x"] == pytest.approx(listed["pflop"] * 1e15 / 2307e12 / 3600)
    assert listed["usd"] == {"h100": 2.5 * listed["chip_hours"]["h100"], "v5e": 1.2 * listed["chip_hours"]["v5e"]}
    assert "USD at least: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["h10:2", "h100", "h100:0", "h100:-1", "h100:nan", "h100:x", "2.5"])
def test_a_price_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=f"--price={text}: expected CHIP:USD"):
        parse_prices(text)


def test_table_3_without_data_or_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", f"--config={TABLE3}:llava15_7b", "--dry", "--json=found.json"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("found.json").read_text())
    assert out.startswith("data.root='Med-MAT' does not exist: the paper's 53 subsets with 3000 training records")
    assert out.count("does not exist") == 1 and found["nominal"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    paper, deciding = ("baseline", "baseline_plus", "trained"), found["deciding"]
    arms = found["arms"]
    assert [arms[arm]["cells"] for arm in paper] == [42] * 3
    assert sum(arms[arm]["trainings"] for arm in paper) == 49
    # What the others add, and no more: every training counts for one arm.
    assert deciding["trainings"] == found["trainings"] - 49 and deciding["cells"] == len(found["cells"]) - 126
    for key in ("samples", "tokens", "pflop"):
        assert found[key] == pytest.approx(sum(arm[key] for arm in arms.values()))
        assert deciding[key] == pytest.approx(sum(arms[arm][key] for arm in arms if arm not in paper))
    words = f"add {deciding['cells']} cells, {deciding['trainings']} trainings, {deciding['samples']:,} samples"
    assert f"arms that tell composition from transfer (single_1 to no_images) {words}" in out
    # The printed rows with a subset of the target's whole triplet say why they lack arms.
    assert out.count("no single_") == 2 * 42 - arms["single_1"]["cells"] - arms["single_2"]["cells"] > 0
    assert {cell["steps"] for cell in found["cells"]} == {0, 938}
    # The whole is the sum of its trainings, each counted once.
    once = {cell["trained_as"]: cell for cell in found["cells"]}
    for key in ("samples", "tokens", "pflop"):
        assert found[key] == pytest.approx(sum(cell[key] for cell in once.values()))
    served = [cell for cell in found["cells"] if cell["steps"] and cell["trained_as"] != cell["id"]]
    assert len(served) == found["saved"] and all(
        f"{c['id']}: " in out and f"; trained as {c['trained_as']}" in out for c in served
    )


def test_without_the_deciding_arms_a_table_costs_what_the_paper_has(capsys):
    run = load(f"{TABLE3}:llava15_7b")
    plan = schedule.make_plan(replace(run, study__arms=("baseline", "baseline_plus", "trained")), nominal_source(3000))
    trained = [job for job in plan.jobs if job.steps]
    assert (len(plan.cells), len(trained), sum(job.steps for job in trained)) == (126, 49, 49 * 938)
    dry(replace(SMALL, study__arms=("baseline", "trained")))
    assert "tell composition" not in capsys.readouterr().out


def test_the_cost_of_a_pair_by_the_exact_formula():
    run = load(f"{TABLE3}:llava15_7b")
    plan = schedule.make_plan(run, nominal_source(3000))
    job = next(job for job in plan.jobs if job.steps)
    found = costs(run, plan.jobs)[job.id]
    length = 576 + run.data.max_text_tokens
    row = flops.forward(llava15_7b(), length=length, num_logits=run.data.max_target_tokens)
    needed = row.vision + 3 * (row.total - row.vision)
    assert found == Cost(938 * 32, 938 * 32 * length, pytest.approx(938 * 32 * needed))
    assert needed == pytest.approx(31.2e12, rel=0.01)  # about 6 x 6.7e9 parameters x 768 tokens
    assert costs(run, plan.jobs)[plan.jobs[0].id] == Cost() and not plan.jobs[0].steps


@pytest.mark.parametrize(
    "model", ["llava15_tiny", "qwen2_vl_tiny", "llama32_vision_tiny", "minigpt_v2_tiny", "next_chat_tiny"]
)
def test_every_tiny_model_has_a_cost(model, capsys):
    found = dry(replace(SMALL, model__name=model))
    config = architecture_of(replace(SMALL, model__name=model))
    assert found["tokens"] == found["samples"] * (config.num_image_tokens + SMALL.data.max_text_tokens)
    assert 1e-8 < found["pflop"] < 1


def test_rows_with_boxes_have_their_own_length(capsys):
    run = replace(SMALL, model__name="minigpt_v2_tiny", study__tables=("pairs", "detection_pairs"))
    run = replace(run, study__targets=("ct-eye-stage",), data__max_box_text_tokens=98)
    cells = [c for c in dry(run)["cells"] if c["arm"] == "trained"]
    lengths = {c["table"]: c["tokens"] / c["samples"] for c in cells}
    assert lengths["detection_pairs"] - lengths["pairs"] == 98 - run.data.max_text_tokens


def test_a_grids_totals_are_the_listings_with_bases_and_tests(capsys):
    listed, found = dry(SMALL), grid_totals(SMALL)
    assert found["steps"] == listed["steps"] + SMALL.base.steps
    assert found["samples"] == listed["samples"] + SMALL.base.steps * SMALL.base.batch_size
    jobs = schedule.make_plan(SMALL).jobs
    # Each test is asked once more beside other images.
    assert found["test_rows"] == 2 * 300 * sum(len(job.targets) for job in jobs) > 0
    assert 2 * grid_totals(replace(SMALL, eval__controls=()))["test_rows"] == found["test_rows"]


def test_with_the_data_there_its_sizes_count(tmp_path):
    from medcg_jax.data.phantom.source import PhantomSource, write_release

    write_release(PhantomSource(0, 8, 4), tmp_path / "tree")
    run = replace(SMALL, data__source="release", data__root=str(tmp_path / "tree"))
    found = dry(run)
    # A member alone has as many as the pair only where the tree holds so many.
    assert not found["nominal"] and {n for c in found["cells"] for n in c["num_records"]} <= {8, 16}
    assert all("only 8 records for 16" in c["notes"] for c in found["cells"] if c["arm"] == "single_1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is no Med-MAT tree"):
        dry(replace(run, data__root=str(tmp_path / "empty")))


def test_nominal_sizes_are_for_dry_alone():
    with pytest.raises(DataError, match="data.root='Med-MAT': no such folder"):
        schedule.make_plan(load(f"{TABLE3}:llava15_7b"))


def test_the_dry_run_of_a_table_is_quick_and_imports_no_statistics(tmp_path):
    program = (
        f"import sys; from medcg_jax.cli import main; code = main(['reproduce', '--config={TABLE3}', '--dry']); "
        "slow = {'scipy', 'matplotlib', 'transformers', 'orbax'} & set(sys.modules); "
        "print(sorted(slow), file=sys.stderr); sys.exit(code)"
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    after = os.times()
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    # Ten such tables in 20 s; CPU time, since other tests may run beside this one.
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 6, f"{spent:.1f} s of CPU at {time.ctime()}"
