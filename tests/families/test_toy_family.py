"""A sixth family is a folder and a line in the registry: it trains, is kept, and is tested by the product's own verbs.

The folder is the one that docs/families.md shows.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy_family"
RUN = (
    f"--config={ROOT / 'configs' / 'phantom.py'}", "--config.model.name=toy_tiny", "--config.data.subsets=mri-brain-state",
    "--config.data.train_records_per_subset=16", "--config.data.test_records_per_subset=8",
    "--config.data.system_prompt=", "--config.base.steps=0", "--config.train.steps=2", "--config.train.batch_size=8",
    "--config.eval.batch_size=8", "--config.eval.controls=", "--config.mesh.data=1",
)  # fmt: skip
# The line of the registry, written here and not in the file.
PROGRAM = """
import sys
from medcg_jax.families import registry
registry.FAMILIES["toy"] = "toy"
from medcg_jax.cli import main
*run, workdir = sys.argv[1:]
sys.exit(main(["train", *run, f"--workdir={workdir}"]) or main(["eval", *run, f"--workdir={workdir}"]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The family's folder, as of a package that is installed beside this one."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "toy").mkdir()
    for file in TOY.glob("*.py"):
        (folder / "toy" / file.name).write_text(file.read_text())
    return folder


def test_a_toy_family_is_trained_and_tested(folder, tmp_path):
    import os

    env = os.environ | {"PYTHONPATH": str(folder), "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("=8", "=1", 1)}
    command = [sys.executable, "-c", PROGRAM, *RUN, str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    about = json.loads((tmp_path / "run" / "params" / "model.json").read_text())
    assert about["family"] == "toy"
    assert "mri-brain-state" in done.stdout


@pytest.mark.parametrize("file", sorted(TOY.glob("*.py")), ids=lambda file: file.name)
def test_the_page_shows_this_code(file):
    page = (ROOT / "docs" / "families.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert file.read_text().strip() in {block.strip() for block in blocks}
