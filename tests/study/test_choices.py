"""The stated choices: each is a field, and what the full-size configs have."""

import dataclasses
import json
from pathlib import Path

import pytest

from medcg_jax.config import MODELS, ConfigError, RunConfig, flat, replace
from medcg_jax.config_checks import check
from medcg_jax.config_file import load
from medcg_jax.study.design import mat, overlap
from medcg_jax.study.stats import results
from medcg_jax.study.stats.results import choices

CONFIGS = Path(__file__).parents[2] / "configs"


def listed(config: str) -> dict:
    run = load(f"{CONFIGS / config}.py")
    return {field: (value, default, why) for field, value, default, why in choices(dataclasses.asdict(run))}


def test_every_choice_is_a_field_with_a_reason():
    fields = flat(dataclasses.asdict(RunConfig()))
    listed = json.loads(Path(results.__file__).with_name("choices.json").read_text(encoding="utf-8"))
    for choice in listed:
        assert choice["field"] in fields or choice["field"].startswith(f"{results.DESIGN}.")
        assert len(choice["why"]) > 15 and choice["family"] in ("", *MODELS.values())
    names = [(choice["field"], choice["family"]) for choice in listed]
    assert len(set(names)) == len(names)
    # A family's own choice replaces the general one, so it stands behind it.
    for field, family in names:
        general = (field, "")
        assert not family or general not in names or names.index(general) < names.index((field, family))


def test_what_is_no_setting_is_declared_too():
    found = {
        field: (value, same, why) for field, (value, same, why) in listed("table3").items() if field[:7] == "design."
    }
    assert set(found) == {
        f"design.{name}" for name in ("task_table", "row_readings", "whole_triplets", "repeated_rows", "deciding_arms")
    }
    assert all(same for _, same, _ in found.values())
    for name in ("task_table", "row_readings"):
        assert (Path(results.__file__).parents[1] / found[f"design.{name}"][0]).is_file()
    # What the reasons say of rows is so.
    assert {(3, 16), (7, 4), (8, 4)} == overlap.printed_repeats()
    numbers = mat.paper_subsets()
    assert len(mat.shared(numbers["28"], numbers["30"])) == 3


def test_rows_of_one_target_share_baseline_plus_as_often_as_is_said():
    printed: dict[str, list[str]] = {}
    for row, line in zip(mat.paper_rows(3), mat.paper_csv("table3_classification_pairs"), strict=True):
        printed.setdefault(row.target, []).append(line["baseline_plus"])
    several = [set(values) for values in printed.values() if len(values) > 1]
    one = sum(len(values) == 1 for values in several)
    assert (len(several), one) == (13, 7)
    why = listed("table3")["study.baseline_plus_subsets"][2]
    assert f"of the {len(several)} targets" in why and f"{one} print one value" in why
    assert f"and {len(several) - one} print several" in why


@pytest.mark.parametrize(
    "config", ["llava15_7b", "minigpt_v2_7b", "next_chat_7b", "qwen2_vl_7b", "llama32_vision_11b", "table3"]
)
def test_full_size_configs_have_what_is_stated(config):
    found = listed(config)
    assert [field for field, (_, default, _) in found.items() if not default] == []
    assert found["train.learning_rate"][0] == (1e-5 if config == "minigpt_v2_7b" else 5e-6)
    assert ("model.max_pixels" in found) == (config == "qwen2_vl_7b")


def test_what_differs_is_seen_whether_read_from_a_file_or_not():
    run = replace(load(f"{CONFIGS / 'llava15_7b'}.py"), study__baseline_plus_records="100", study__seeds=(1, 2))
    as_json = dataclasses.asdict(run)
    as_json["study"]["seeds"], as_json["study"]["arms"] = [1, 2], []
    for config in (dataclasses.asdict(run), as_json):
        changed = {field for field, _, default, _ in choices(config) if not default}
        assert changed == {"study.baseline_plus_records", "study.seeds"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data__imagewikiqa_share": 0.1},
            "data.general_records='': expected the path of a JSON list of four-option records",
        ),
        ({"data__imagewikiqa_share": 1.0}, "data.imagewikiqa_share=1.0: expected 0 to below 1"),
        ({"data__imagewikiqa_share": -0.1}, "data.imagewikiqa_share=-0.1: expected 0 to below 1"),
        ({"data__imagewikiqa_share": float("nan")}, "data.imagewikiqa_share=nan: expected 0 to below 1"),
        (
            {"data__imagewikiqa_share": 0.1, "data__general_records": "a", "data__subset_weights": {"04": 1.0}},
            "expected 0.0 with data.subset_weights",
        ),
        ({"study__baseline_plus_records": "some"}, "study.baseline_plus_records='some': expected related or a number"),
        ({"study__baseline_plus_records": "0"}, "study.baseline_plus_records='0'"),
        ({"study__baseline_plus_subsets": "-1"}, "study.baseline_plus_subsets='-1': expected related, all or a number"),
        ({"study__published_table": 4}, "study.published_table=4: expected one of 0, 3, 7, 8, 5, 6"),
        ({"study__efficiency_records": (10, 3)}, "study.efficiency_records=.10, 3.: expected rising numbers"),
        ({"study__efficiency_records": ()}, "rising numbers"),
    ],
)
def test_values_that_no_grid_can_have(change, message):
    with pytest.raises(ConfigError, match=message):
        check(replace(RunConfig(), **change))
    check(replace(RunConfig(), study__baseline_plus_records="100", study__baseline_plus_subsets="all"))
