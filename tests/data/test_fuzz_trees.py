"""Broken trees and prepared folders by the thousand, given to every reader: each is taken or refused in one line.

    python -m tests.data.test_fuzz_trees 5000 0      # number of inputs, seed

Mutates (`fuzz_mutations`) the manifest, choice and detection files of a small tree, and the manifest, lists of records
and shards of its preparation. Anything raised but DataError or ConfigError, a message of several lines or of more than
`MAX_MESSAGE` signs, or more than `MAX_SECONDS` is a failure; its input is kept, and the exit status is 1.
"""

import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

if __name__ == "__main__":  # as a module of the repository, without pytest's paths
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import pytest
from fuzz_mutations import JSON_CLASSES, mutated
from trees import write_tree_with_boxes

from medcg_jax.config import ConfigError, DataConfig
from medcg_jax.data.check import check_tree, print_report
from medcg_jax.data.layouts import Layout
from medcg_jax.data.prepare import prepare
from medcg_jax.data.prepared import PreparedSource, verify
from medcg_jax.data.records import SPLITS, DataError
from medcg_jax.data.release import ReleaseSource
from medcg_jax.study.design.ledger import read_ledger
from medcg_jax.study.design.ledger_text import ledger_lines

MAX_MESSAGE = 800
MAX_SECONDS = 10.0
MANIFEST = """{"subsets": [
 {"subset": "04", "modality": "CT", "area": "Lung", "task": "Lung Cancer Classification", "labels": ["Benign"]},
 {"subset": "47", "modality": "Dermoscopy", "area": "Skin", "task": "Lesion Detection"}
]}"""
# File below the tree or the prepared folder -> who reads it.
TREE_FILES = (
    "manifest.json", "Aggregated_Subsets/Subset--04-train.json", "Aggregated_Subsets/Subset--04-test.json",
    "Aggregated_Subsets/Subset--47-det-train.json",
)  # fmt: skip
PREPARED_FILES = (
    "manifest.json", ".plan.json", ".examined.jsonl", "records/04-train.jsonl", "records/47-train.jsonl",
    "records/04-train-00000-of-00001.arrayrecord", "records/47-train-00000-of-00001.arrayrecord",
)  # fmt: skip
CONFIG = DataConfig(source="release")


def read_tree(root: Path) -> None:
    """Every reader of a tree. Raises what the first of them raises that refuses it."""
    ledger_lines(read_ledger(root))
    report = check_tree(root, workers=1)
    print_report(report)
    str(report.as_dict()).encode()
    assert not any("\n" in str(problem) for problem in report.problems)
    source = ReleaseSource(root, CONFIG)
    source.fingerprint(), source.detection_fingerprint()
    for subset in (*source.subsets, *source.detection_subsets):
        for split in SPLITS:
            records = source.records(subset.name, split)
            for place in range(len(records)):
                records.image(place)
    assert report.ok, f"the readers take what the check refuses: {report.problems[0]}"


def read_prepared(out: Path, tree: Path) -> None:
    """Every reader of a prepared folder, and the run that would go on with it."""
    wrong = verify(out)
    assert not any("\n" in line for line in wrong)
    source = PreparedSource(out, CONFIG)
    for subset in (*source.subsets, *source.detection_subsets):
        for split in SPLITS:
            records = source.records(subset.name, split)
            for place, record in enumerate(records.records):
                assert records.image(place).shape[2] == 3 and str(record.id).startswith(subset.name)
                records.image_digest(place)
    prepare(tree, out, CONFIG, Layout("keep", 0), workers=1)
    if wrong:
        raise DataError(wrong[0])


def broken(name: str, content: bytes, random: Random) -> bytes:
    """The file with a fault: bits and pieces of a shard, JSON as `fuzz_mutations` has it."""
    if not name.endswith(".arrayrecord"):
        return mutated("json", random.choice(JSON_CLASSES), content, random)
    how = random.randrange(3)
    if how == 0:
        return content[: random.randrange(len(content))]
    out = bytearray(content)
    if how == 1:  # most of a small shard is padding
        filled = [place for place in range(0, len(out), 61) if out[place]] or [0]
        out[random.choice(filled)] ^= 1 << random.randrange(8)
        return bytes(out)
    start = random.randrange(len(out))
    out[start : start + 64] = random.randbytes(64)
    return bytes(out)


def fuzz(count: int, seed: int, keep: Path) -> tuple[Counter, list[str]]:
    """((file, taken) -> number of inputs, what failed)."""
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "out"
        write_tree_with_boxes(tree, train=6, test=2, boxes=12)
        (tree / "manifest.json").write_text(MANIFEST, "utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(tree, out, CONFIG, Layout("keep", 0), workers=1)
        # A tree that is never touched, for the run that goes on.
        whole = Path(folder) / "whole"
        shutil.copytree(out, whole)
        places = [(tree, name) for name in TREE_FILES] + [(out, name) for name in PREPARED_FILES]
        for index in range(count):
            random = Random(f"{seed}/{index}")
            root, name = places[index % len(places)]
            content = (root / name).read_bytes()
            changed = broken(name, content, random)
            (root / name).write_bytes(changed)
            began, failure, taken = time.monotonic(), "", True
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    read_tree(tree) if root == tree else read_prepared(out, tree)
            except (DataError, ConfigError) as error:
                taken, said = False, str(error)
                if not said or "\n" in said or len(said) > MAX_MESSAGE:
                    failure = f"message {said[:200]!r} of {len(said)} signs"
            except BaseException as error:
                failure = f"{type(error).__name__}: {str(error)[:200]}"
            if time.monotonic() - began > MAX_SECONDS:
                failure = failure or f"took {time.monotonic() - began:.0f} s"
            (root / name).write_bytes(content)
            if root == out:
                for path in whole.rglob("*"):  # what the run that went on has written
                    if path.is_file() and (there := out / path.relative_to(whole)).read_bytes() != path.read_bytes():
                        there.write_bytes(path.read_bytes())
            counts[name, taken] += 1
            if failure:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{index}-{Path(name).name}").write_bytes(changed)
                failures.append(f"seed {seed}, input {index}, {name}: {failure}")
    return counts, failures


@pytest.mark.parametrize("each", [2, pytest.param(6, marks=pytest.mark.long)])
def test_broken_trees_and_prepared_folders(tmp_path, each):
    count = each * len((*TREE_FILES, *PREPARED_FILES))
    counts, failures = fuzz(count, 20241220, tmp_path / "failed")
    assert not failures and not (tmp_path / "failed").exists()
    assert counts.total() == count
    for name in set(TREE_FILES + PREPARED_FILES) - {".examined.jsonl"}:
        assert counts[name, False] > each // 3, name


if __name__ == "__main__":
    counts, failures = fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(tempfile.gettempdir()) / "medcg-fuzz-trees")
    for name in (*TREE_FILES, *PREPARED_FILES):
        print(f"{name:50} taken {counts[name, True]:6} refused {counts[name, False]:6}")
    print("\n".join([f"failures: {len(failures)}", *failures[:50]]))
    sys.exit(bool(failures))
