"""The same tiny run by other numbers of processes and devices: the same batches exactly, losses and scores beside them.

    python tests/train/compare_hosts.py [FOLDER] [--layouts=1x8,2x4,4x2] [--steps=12]

For every layout of PROCESSES x DEVICES trains and tests once, and prints the largest difference of a loss from the
first layout's, whether every step had the same records, and whether predictions and parameters are the same bytes. The
first layout is run twice: there everything must be the same bytes. Exit status 1 where batches differ, where the repeat
differs, or where a loss is further off than `TOLERANCE`.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "processes")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import in_processes

SUBSETS = ("ct-brain-state", "mri-brain-grade")
# Relative. Sums over devices are taken in other orders; each step starts from what the one before left.
TOLERANCE = 2e-5
RUN = (
    f"--config={ROOT}/configs/phantom.py:tiny", f"--config.data.subsets={','.join(SUBSETS)}", "--config.train.epochs=1",
    "--config.train.batch_size=8", "--config.eval.batch_size=8", "--config.train.log_every_steps=1",
)  # fmt: skip


def one(folder: Path, processes: int, devices: int, steps: int) -> dict:
    """{"losses", "ids": the records of every step's batch, "params", "predictions": digests} of a run made here."""
    folder.mkdir(parents=True)
    for verb in ("train", "eval"):
        ended = in_processes.run(
            "train/compare_hosts.py", verb, str(folder), str(steps), processes=processes, devices=devices, timeout_s=400
        )
        for process in ended:
            if process.status:
                raise SystemExit(f"{verb} of {processes} x {devices}: {process.status}\n{process.err[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics" / "train.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines],
        "ids": drawn(folder, steps),
        "params": params_digest(folder / "params"),
        "predictions": hashlib.sha256(
            b"".join(path.read_bytes() for path in sorted((folder / "predictions").iterdir()))
        ).hexdigest(),
    }


def part(coordinator: str, count: str, index: str, verb: str, folder: str, steps: str) -> int:
    """One process of a run; writes down the records of the rows that it draws."""
    from medcg_jax import cli
    from medcg_jax.data import pipeline
    from medcg_jax.train import run

    class Recording(pipeline.Batches):
        def __init__(self, encoded, *, rows=None, **options):
            super().__init__(encoded, rows=rows, **options)
            self._places = list(range(options["batch_size"])) if rows is None else rows.tolist()

        def __next__(self):
            batch, ids = super().__next__()
            with open(Path(folder) / f"ids.{index}.jsonl", "a") as file:
                file.write(json.dumps([self.position - 1, dict(zip(self._places, ids, strict=True))]) + "\n")
            return batch, ids

    run.Batches = Recording
    flags = [f"--num_processes={count}"]
    if count != "1":
        flags += [f"--coordinator={coordinator}", f"--process_id={index}"]
    return cli.main([verb, *RUN, f"--config.train.steps={steps}", f"--workdir={folder}", *flags])


def drawn(folder: Path, steps: int) -> list[list[str]]:
    """The records of each step's global batch, put together from what every process has drawn.

    Raises:
      AssertionError: two processes had other records for one row, or a row had none.
    """
    found: list[dict[str, str]] = [{} for _ in range(steps)]
    for path in sorted(folder.glob("ids.*.jsonl")):
        for step, rows in map(json.loads, path.read_text().splitlines()):
            assert all(found[step].get(row, name) == name for row, name in rows.items()), (path, step)
            found[step] |= rows
    assert all(sorted(rows, key=int) == [str(row) for row in range(8)] for rows in found), found
    return [[rows[str(row)] for row in range(8)] for rows in found]


def params_digest(folder: Path) -> str:
    """Of the bytes of every parameter."""
    import jax
    import numpy as np

    from medcg_jax.config_file import load
    from medcg_jax.train.checkpoint import load_params
    from medcg_jax.train.setup import open_setup

    setup = open_setup(load(f"{ROOT}/configs/phantom.py:tiny"), devices=jax.devices()[:1], has_weights=True)
    _, params, _ = load_params(folder, setup.model, setup.mesh)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def words(same: bool) -> str:
    return "the same" if same else "other"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--layouts", default="1x8,2x4,4x2")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)
    folder = Path(args.folder or tempfile.mkdtemp())
    layouts = args.layouts.split(",")
    runs = {name: one(folder / name, *map(int, name.split("x")), args.steps) for name in layouts}
    first = runs[layouts[0]]
    again = one(folder / "again", *map(int, layouts[0].split("x")), args.steps)
    failed = again != first
    print(f"{layouts[0]} twice: {words(not failed)} losses, batches, parameters and predictions")
    for name, found in runs.items():
        off = max(abs(a / b - 1) for a, b in zip(found["losses"], first["losses"], strict=True))
        same = {key: words(found[key] == first[key]) for key in ("ids", "params", "predictions")}
        failed |= same["ids"] == "other" or off > TOLERANCE
        print(
            f"{name}: {same['ids']} batches; losses at most {off:.1e} off (relative, {TOLERANCE:.0e} accepted), the "
            f"last is {found['losses'][-1]:.6f}; {same['params']} bytes of parameters, "
            f"{same['predictions']} of predictions"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(part(*sys.argv[1:]) if len(sys.argv) == 7 else main(sys.argv[1:]))
