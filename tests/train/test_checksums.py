"""Digests of files: any change of any file is seen and named, by any number of processes that share the work."""

import os
import tempfile
from pathlib import Path

import damage_checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st

from medcg_jax.train import checksums

FILES = {"a": b"first", "d/b": b"second file", "d/e/c": b"", "meta.json": b"{}"}


def written(top: Path, count: int) -> None:
    for name, data in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    for index in range(count):
        assert not checksums.shares_are_there(top, count)
        checksums.write_share(top, index, count)
    assert checksums.shares_are_there(top, count)


def faults(top: Path, readers: int) -> list[str]:
    return [fault for index in range(readers) if (fault := checksums.first_fault(top, index, readers))]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 5), st.integers(1, 5))
def test_any_bit_of_any_file(data, writers, readers):
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        written(top, writers)
        assert not faults(top, readers)
        path = data.draw(st.sampled_from([p for p in sorted(top.rglob("*")) if p.is_file() and p.stat().st_size]))
        found = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(found) - 1))
        found[bit // 8] ^= 1 << bit % 8
        path.write_bytes(found)
        [*named] = faults(top, readers)
        assert named and all(path.name in fault for fault in named)


def test_files_that_come_and_go(tmp_path):
    written(tmp_path, 3)
    (tmp_path / "d" / "new").write_bytes(b"")
    assert faults(tmp_path, 2) == ["d/new is no file of it"] * 2
    (tmp_path / "d" / "new").unlink()
    (tmp_path / "checksums.3-of-4.json").write_bytes(b"")
    assert all("checksums.0-of-4.json is missing" in fault for fault in faults(tmp_path, 2))
    (tmp_path / "checksums.3-of-4.json").unlink()
    (tmp_path / ".checksums.0-of-3.json.1234").write_bytes(b"")
    assert all("no file of it" in fault for fault in faults(tmp_path, 1))
    (tmp_path / ".checksums.0-of-3.json.1234").unlink()
    (tmp_path / "checksums.1-of-3.json").rename(tmp_path / "x")
    assert all("checksums.1-of-3.json is missing" in fault for fault in faults(tmp_path, 1))
    (tmp_path / "x").rename(tmp_path / "checksums.1-of-3.json")
    assert not faults(tmp_path, 4)
    os.replace(tmp_path / "a", tmp_path / "gone")
    assert faults(tmp_path, 1) == ["a is missing"]


def test_no_digests_at_all(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert checksums.first_fault(tmp_path) == "checksums.0-of-1.json is missing"


def test_every_kind_of_file_damaged_in_every_way(tmp_path):
    done = damage_checkpoints.run_all(tmp_path, 100, seed=1)
    assert {damage for _, damage in done} == {damage.__name__ for damage in damage_checkpoints.DAMAGES}
    assert {"meta.json", "state/d/*", "state/manifest.ocdbt", "parameters: params/d/*"} <= {name for name, _ in done}
