"""The benchmark of duplicates makes files, counts the copies among them, and its figures are in a file as JSON."""

import json

import pytest

from benchmarks import duplicates


@pytest.mark.timeout(120)
def test_the_copies_that_it_plants_are_found(tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ["--images=240", "--longest-side=200", "--hashes=3000", f"--dir={tmp_path}", f"--json={file}"]
    assert duplicates.main(flags) == 0
    found = json.loads(file.read_text())
    assert [row["images"] for row in found["rows"]] == [60, 120, 240]
    assert [row["hashed"] for row in found["rows"]] == [60, 120, 240]
    # One in ten is a copy of the one before it.
    assert all(row["pairs"] >= 0.08 * row["images"] for row in found["rows"])
    assert found["fits"]["hash"]["million_cpu_s"] > 0 and "a million" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_a_million_is_extrapolated_by_what_was_measured():
    seconds = [{"wall_s": 2 * n / 1e3, "cpu_s": 3 * n**2 / 1e9} for n in (10_000, 20_000, 40_000)]
    found = duplicates.fit((10_000, 20_000, 40_000), seconds, 2)
    assert found["exponent"] == pytest.approx(2) and found["exponent_wall"] == pytest.approx(1)
    assert found["million_wall_s"] == pytest.approx(2000) and found["million_cpu_s"] == pytest.approx(3e12 / 1e9 / 2)
