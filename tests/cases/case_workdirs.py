"""Rows about the workdir of a grid: what `medcg report` and `medcg reproduce` make of damaged or hostile files."""

import csv
import json
import re
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from harness import CHECKOUT, SHARED, call, medcg, refused, told

HOSTILE = SHARED / "cases" / "hostile"


def grid(folder: Path) -> Path:
    """The workdir of a finished grid of phantoms."""
    with tarfile.open(HOSTILE / "results_csv_edited" / "workdir.tgz") as packed:
        packed.extractall(folder, filter="data")
    for name in ("metrics",):
        (folder / "g0" / name).mkdir(exist_ok=True)
    return folder / "g0"


def grid_of_release(folder: Path, manifest: Path | dict) -> Path:
    """The workdir of a grid on the pack of real images, whose manifest is another one."""
    root = shutil.copytree(SHARED / "data" / "medmat-mini", folder / "root")
    (root / "manifest.json").unlink()
    if isinstance(manifest, dict):
        (root / "manifest.json").write_text(json.dumps(manifest))
    else:
        shutil.copy(manifest, root / "manifest.json")

    def write() -> int:
        import report_grids

        from medcg_jax.config import DataConfig

        data = DataConfig(source="release", root=str(root), train_records_per_subset=40, test_records_per_subset=12)
        report_grids.make_grid(
            folder / "w", report_grids.run_of(data=data, study__tables=("multi_task",), study__targets=("22", "65"))
        )
        return 0

    result = call(write)
    if result.status:
        raise AssertionError(result.text.strip().splitlines()[-1])
    return folder / "w"


def cells_csv_cut(folder: Path) -> str:
    work = grid(folder)
    content = (work / "cells.csv").read_bytes()
    (work / "cells.csv").write_bytes(content[:500])
    return told(medcg("report", work), "cells.csv", status=(0, 2))


def sources_of_text(work: Path) -> list[Path]:
    return [
        path for path in (work / "report").rglob("*") if path.suffix in (".html", ".svg", ".tex", ".csv", ".md", ".txt")
    ]


def control_chars(folder: Path) -> str:
    try:
        work = grid_of_release(folder, HOSTILE / "control_chars" / "manifest.json")
    except AssertionError as error:
        assert "manifest.json" in str(error), error
        return f"refused by the reader: {error}"
    told(medcg("report", work, "--format=md,tex,csv", timeout_s=120))
    for path in sources_of_text(work):
        content = path.read_bytes()
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", content), path.name
        if path.suffix == ".svg":
            ElementTree.fromstring(content)
    return f"{len(sources_of_text(work))} files without control characters"


def manifest_dollar(folder: Path) -> str:
    work = grid_of_release(folder, HOSTILE / "manifest_dollar" / "manifest.json")
    told(medcg("report", work, timeout_s=120))
    page = (work / "report" / "index.html").read_text("utf-8")
    assert "$x_{" in page
    return "the page has the text as it is"


def md_csv_injection(folder: Path) -> str:
    manifest = json.loads((HOSTILE / "manifest_dollar" / "manifest.json").read_text())
    evil = "<script>alert(1)</script> ![x](http://x.y) [a](javascript:1)"
    for entry in manifest["subsets"]:
        entry["modality"], entry["area"] = "=cmd|' /C calc'!A0", evil
    work = grid_of_release(folder, manifest)
    told(medcg("report", work, "--format=md,tex,csv", timeout_s=120))
    for path in sources_of_text(work):
        text = path.read_text("utf-8")
        if path.suffix in (".md", ".html", ".svg"):
            assert "<script>alert" not in text, path.name
        if path.suffix == ".md":
            assert not re.search(r"(?<!\\)\]\(javascript", text) and not re.search(r"(?<!\\)!\[x\]\(", text), path.name
        if path.suffix == ".csv":
            for row in csv.reader(text.splitlines()):
                assert not any(cell[:1] in ("=", "@", "+") for cell in row), (path.name, row)
    return "escaped in md, html, svg and csv"


HOSTILE_FIELDS = (
    {"options": 5}, {"options": None}, {"logprobs": ["x"]}, {"logprobs": [1e308, 1e308]}, {"id": 5}, {"id": ["a"]},
    {"subset": ["a"]}, {"answer": 7}, {"predicted": {}},
)  # fmt: skip


def predictions_values(folder: Path) -> str:
    work = grid(folder)
    path = sorted((work / "predictions").iterdir())[0]
    whole = path.read_text()
    first, *rest = whole.splitlines()
    for fields in HOSTILE_FIELDS:
        path.write_text("\n".join([json.dumps(json.loads(first) | fields), *rest, ""]))
        try:
            told_or_refused(medcg("report", work, timeout_s=120), path.name)
        except AssertionError as error:
            raise AssertionError(f"{fields}: {error}") from error
    # What a model that was not asked for them leaves.
    path.write_text("\n".join([json.dumps(json.loads(first) | {"logprobs": None}), *rest, ""]))
    told(medcg("report", work, timeout_s=120))
    path.write_bytes(whole.encode().replace(b'"id"', b'"i\xffd"', 1))
    refused(medcg("report", work), path.name)
    path.unlink()
    import os

    os.mkfifo(path)
    return refused(medcg("report", work), path.name)


def told_or_refused(result, *words: str) -> str:
    return refused(result, *words) if result.status == 2 else told(result, *words)


def results_csv_edited(folder: Path) -> str:
    work = grid(folder)
    path = work / "results.csv"
    whole = path.read_text()
    for edited in (",12,12,1.000000", ",12,80,6.666667", ",12,-1,0.666667", ",12,x,0.666667"):
        path.write_text(whole.replace(",12,8,0.666667", edited, 1))
        assert path.read_text() != whole
        line = told_or_refused(medcg("report", work, timeout_s=120), "results.csv")
    return line


def workdir_config_json(folder: Path) -> str:
    work = grid(folder)
    path = work / "config.json"
    whole = path.read_text()
    flags = ("--config=configs/phantom.py:tiny", f"--workdir={work}")
    for text in (whole[:300], "", "[]", '{"config":{}}', "{}", '{"config": 5, "versions": {}, "data": {}}'):
        path.write_text(text)
        line = refused(medcg("report", work), "config.json")
        refused(medcg("reproduce", *flags, cwd=CHECKOUT), "config.json", max_seconds=30)
        assert path.read_text() == text, "config.json was overwritten"
    return line


ROWS = {
    run.__name__: run
    for run in (
        cells_csv_cut, control_chars, manifest_dollar, md_csv_injection, predictions_values, results_csv_edited,
        workdir_config_json,
    )
}  # fmt: skip
