"""The notebooks of `examples/`: committed without outputs, and they run from their first cell to their last."""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def faults(notebook: dict) -> list[str]:
    """What a notebook must not be committed with."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        *(f"output of {source(cell)[:30]}" for cell in cells if cell["outputs"] or cell["execution_count"]),
        *(f"a path of one machine in {source(cell)[:30]}" for cell in cells if "/home/" in source(cell)),
    ]


def test_there_are_the_two_that_the_documentation_names():
    assert [path.name for path in NOTEBOOKS] == ["ask_and_inspect.ipynb", "study_on_your_folders.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_compiles(path):
    notebook = json.loads(path.read_text())
    assert not faults(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = source(cell).splitlines()
            plain = [line.replace(line.lstrip(), "pass") if line.lstrip().startswith("!") else line for line in lines]
            compile("\n".join(plain), path.name, "exec")
    with_output = {"cells": [{"cell_type": "code", "source": ["1"], "outputs": [{}], "execution_count": None}]}
    assert faults(with_output)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for module in ("nbclient", "ipykernel"):
        if not find_spec(module):
            pytest.skip(f"no {module} here: pip install -e '.[docs]'")
    import nbformat
    from nbclient import NotebookClient

    # As a user's kernel: one device, compiled with all optimisations, and the temporary folders of the test.
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    began = time.monotonic()
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    print(f"{path.name}: {time.monotonic() - began:.0f} s")
    check(path.stem, "\n".join(texts(notebook)))


def texts(notebook: dict) -> list[str]:
    """What the cells printed and returned, as text."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]


def check(name: str, text: str) -> None:
    """The results that the notebook's own sentences promise; shell commands in cells do not fail by themselves."""
    assert "medcg: " not in text and "Traceback" not in text, text
    if name == "ask_and_inspect":
        right = int(text.partition(" of 40 right")[0].rpartition("\n")[2])
        assert right >= 30, text
        assert "dtype='float32', device='cpu'" in text
    else:
        assert "nothing is wrong" in text
        assert "5 subsets, 300 training and 100 test records" in text
        assert "trained" in text and "index.html" in text
