"""Start-up, part by part, of a process that finds its programs in the cache."""

import json
from pathlib import Path

import pytest

from benchmarks import startup

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
PARTS = [
    "python", "imports", "configuration", "devices", "tokenizer and model", "records to rows", "first batch",
    "state: lowered", "state: compiled", "step: lowered", "step: compiled",
]  # fmt: skip


@pytest.mark.timeout(300)
def test_a_second_start_compiles_nothing(tmp_path, capsys):
    file = tmp_path / "starts.json"
    flags = [f"--config={CONFIG}:tiny", "--config.model.scan_unroll=1", "--records=2", f"--json={file}"]
    assert startup.main([*flags, "--devices=2"]) == 0
    cold, warm = json.loads(file.read_text()).values()
    assert cold["compiled"] >= 2 and cold["from_cache"] == 0
    assert warm["compiled"] == 0 and warm["from_cache"] == cold["compiled"] and warm["cache_bytes"] > 0
    for one in (cold, warm):
        assert [name for name, _, _ in one["parts"]] == PARTS
        assert all(wall >= 0 and cpu >= 0 for _, wall, cpu in one["parts"])
    assert dict(zip(PARTS, warm["parts"]))["imports"][1] > 0
    printed = capsys.readouterr().out
    assert "to the first step" in printed and "0 programs compiled" in printed


def test_a_cache_that_serves_nothing_is_told(monkeypatch, capsys):
    """The planted fault: the second process compiles again."""
    one = {"parts": [("python", 0.1, 0.1)], "compiled": 2, "from_cache": 0}
    monkeypatch.setattr(startup, "measure", lambda *args: dict(one))
    assert startup.main([f"--config={CONFIG}"]) == 1
    assert "2 programs compiled, 0 from the cache" in capsys.readouterr().out


def test_a_start_that_fails_says_why_and_other_flags_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(startup, "MODULE", "medcg_jax.no_such_module")
    with pytest.raises(RuntimeError, match="No module named medcg_jax.no_such_module"):
        startup.main([f"--config={CONFIG}"])
    with pytest.raises(SystemExit):
        startup.main([f"--config={CONFIG}", "--records=1", "--other=1"])
    assert "--other=1" in capsys.readouterr().err
