"""The data room works where jax cannot be imported: from a tree on disk to batches, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from record_sets import write_word_tokenizer
from trees import raw_record, write_subset

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys

BLOCKED = ("jax", "jaxlib", "flax", "optax", "torch")


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
import pkgutil

import medcg_jax.data

for module in pkgutil.walk_packages(medcg_jax.data.__path__, "medcg_jax.data."):
    __import__(module.name)

from medcg_jax.data.check import check_tree
from medcg_jax.data.encoding import encode, encode_eval
from types import SimpleNamespace
from medcg_jax.families.llava.rows import row_format
from medcg_jax.data.eval_batches import eval_batches
from medcg_jax.data.pipeline import Batches
from medcg_jax.data.sources import open_source
from medcg_jax.data.tokenizer import load_tokenizer
from medcg_jax.config import DataConfig

root, words = sys.argv[1:]
config = DataConfig(source="release", root=root, system_prompt="")
source, tokenizer = open_source(config), load_tokenizer(words)
fmt = row_format(SimpleNamespace(image_size_px=16, num_image_tokens=4))
rows = encode(source.records("04", "train"), tokenizer, config, fmt)
batch, ids = next(Batches(rows, batch_size=4, seed=0))
assert batch["pixels"].shape == (4, 1, 16, 16, 3) and len(ids) == 4, batch["pixels"].shape
tests = encode_eval(source.records("04", "test"), tokenizer, config, fmt)
assert [len(ids) for _, ids in eval_batches(tests, 2)] == [2, 1]
assert check_tree(root).ok
assert not [name for name in sys.modules if name.partition(".")[0] in BLOCKED]
print("done")
"""


def test_from_a_tree_to_batches_with_jax_blocked(tmp_path):
    labels = ("benign", "normal")
    question = {"Question-choice": "what is it ?\nA: benign\nB: normal"}
    for split, count in (("train", 6), ("test", 3)):
        raws = [
            raw_record(i, label=labels[i % 2], options=labels, image=f"{split}/{i}.png", **question)
            for i in range(count)
        ]
        write_subset(tmp_path / "tree", f"Subset--04-{split}", raws)
    words = write_word_tokenizer(tmp_path / "tokenizer.json")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "tree"), str(words)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr
