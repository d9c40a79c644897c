"""Two recommended meshes compiled for TPUs that are not there, held to the textbook's bytes; and one that wastes them.

It needs libtpu, which launch/test.sh puts into `.libtpu`, beside the environment; elsewhere this is skipped.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT / ".libtpu"
ROWS = ("v5e:4x4", "v5e:8x8")
# The command as it is, or without permutes beside products: in an fsdp group of the whole slice libtpu then sums whole
# gradients.
PROGRAM = """
import sys
from benchmarks import meshes
if sys.argv[1] == "planted":
    compiled_step = meshes.compiled_step
    meshes.compiled_step = lambda planned, countable: compiled_step(planned, countable=True)
sys.exit(meshes.main(sys.argv[2:]))
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (find_spec("libtpu") or (BESIDE / "libtpu").is_dir()), reason="needs libtpu, to compile for a TPU"
    ),
    pytest.mark.timeout(900),  # half a minute alone on two cores; many times that beside other work
]


def run(how: str, file: Path, *topologies: str) -> tuple[int, list[dict]]:
    """(exit status, rows of the JSON): a process of its own, since libtpu is loaded once and keeps its lock."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), str(BESIDE))))
    # Without the suite's own settings: matrix products of the highest precision are none that TPU kernels can do.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", PROGRAM, how, *topologies, f"--json={file}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=800)
    assert file.exists(), done.stderr[-2000:]
    return done.returncode, json.loads(file.read_text())["rows"]


def test_recommended_meshes_move_the_textbooks_bytes(tmp_path):
    status, rows = run("as it is", tmp_path / "rows.json", *ROWS)
    assert [row["topology"] for row in rows] == list(ROWS)
    assert status == 0 and all(row["holds"] for row in rows)
    for row in rows:
        assert row["attention"] == "splash" and not row["crossing"]
        # Donation: what goes out lies where it came in, but for the batch and the frozen tower.
        assert row["alias_bytes"] > 0.9 * row["argument_bytes"]


def test_a_step_that_sums_whole_gradients_fails(tmp_path):
    status, (row,) = run("planted", tmp_path / "rows.json", "v5e:4x4")
    assert status == 1 and row["fits"] and not row["holds"] and row["ratio"] > 1.3
    assert row["collective_bytes"]["all-reduce"] > 13e9 and "reduce-scatter" not in row["collective_bytes"]
