"""`medcg data check` over a tree made of every hostile case judges each as medmat-mini/hostile/expected.json says."""

import json
import shutil

import pytest
from trees import raw_record

from medcg_jax.cli import main
from medcg_jax.config import DataConfig
from medcg_jax.data.layouts import Layout
from medcg_jax.data.prepare import TooManyBad, prepare
from medcg_jax.data.prepared import PreparedSource


@pytest.fixture
def hostile(shared_dir, tmp_path):
    """(root, subset file -> its case, case file -> record name) of a tree of all cases."""
    pack = shared_dir / "data" / "medmat-mini" / "hostile"
    cases = json.loads((pack / "expected.json").read_text("utf-8"))["cases"]
    root = tmp_path / "tree"
    shutil.copytree(pack, root / "hostile")
    (root / "Aggregated_Subsets").mkdir()
    files, images = {}, []
    for number, case in enumerate(cases, start=1):
        detection = "-det" if case["kind"] == "json-detection" else ""
        if case["kind"] == "image":
            images.append((number, case))
        else:
            name = f"Subset--{number:02d}{detection}-train.json"
            shutil.copy(pack / case["file"], root / "Aggregated_Subsets" / name)
            files[name] = case
    raws = [raw_record(number, image=f"hostile/{case['file']}") for number, case in images]
    (root / "Aggregated_Subsets" / "Subset--53-train.json").write_text(json.dumps(raws), "utf-8")
    return root, files, {f"record {number}": case for number, case in images}


def test_each_is_judged_as_expected(hostile, tmp_path, capsys):
    root, files, images = hostile
    assert main(["data", "check", str(root), f"--json={tmp_path / 'report.json'}"]) == 2
    problems = json.loads((tmp_path / "report.json").read_text("utf-8"))["problems"]
    for name, case in files.items():
        own = [p for p in problems if p["file"] == name]
        if case["accept"]:
            # An empty list is valid, and said.
            assert [p["kind"] for p in own] == (["no_records"] if case["as"]["records"] == 0 else []), (case, own)
        else:
            assert own, case
    assert len([p for p in problems if files.get(p["file"], {}).get("kind") == "json-detection"]) == 3
    refused = {p["record"] for p in problems if p["file"] == "Subset--53-train.json"}
    assert refused == {record for record, case in images.items() if not case["accept"]}
    assert "bad records: " in capsys.readouterr().out


def test_what_is_good_of_it_can_be_prepared(hostile, tmp_path):
    root, files, images = hostile
    with pytest.raises(TooManyBad, match="files of the tree cannot be used .*json 1"):
        prepare(root, tmp_path / "out", DataConfig(), Layout("keep", 0), max_bad_frac=1.0)
    for name, case in files.items():
        if case["file"] in ("not_a_list.json", "cut_in_half.json", "not_utf8.json"):
            (root / "Aggregated_Subsets" / name).unlink()
    done = prepare(root, tmp_path / "out", DataConfig(), Layout("keep", 0), max_bad_frac=1.0)
    assert done.manifest["set_aside"]["records"] > 10
    source = PreparedSource(tmp_path / "out", DataConfig())
    kept = [records.image(place).shape for split in ("train", "test")
            for records in [source.records("53", split)] for place in range(len(records))]  # fmt: skip
    assert len(kept) == sum(case["accept"] for case in images.values()) and (1, 1, 3) in kept and (160, 100, 3) in kept
