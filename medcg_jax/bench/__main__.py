"""`medcg bench` where packages are missing: needs jax, flax and optax, no network and no file of weights.

    python -m medcg_jax.bench --json=FILE [--config=configs/bench_gpu.py] [--model=NAME] [--time=570] [--stages=A,B]

The configuration is a module with `RUN`, `STAGES` and `TIME_S`. FILE gets a stage's figures within a second; the error
of a failed stage too, and the others go on. Exit status 0: every stage that can run here did.
"""

import argparse
import pickle
import runpy
import sys
from pathlib import Path

from medcg_jax.bench import run as bench
from medcg_jax.config import ConfigError, replace
from medcg_jax.platform import keep_freed_memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medcg_jax.bench", allow_abbrev=False,
                                     description=__doc__.partition("\n")[0])  # fmt: skip
    parser.add_argument("--json", required=True, metavar="FILE", type=Path)
    parser.add_argument("--config", default=str(bench.ROOT / "configs" / "bench_gpu.py"), metavar="FILE.py")
    parser.add_argument("--model", default="", choices=("llava15_tiny", "llava15_7b", "llava15_13b"))
    text = "seconds for all; with more than the default every stage has more too"
    parser.add_argument("--time", type=float, default=0.0, metavar="S", help=text)
    parser.add_argument("--batches", default="", help="batch sizes of the stages' first cases, in place of their cases")
    parser.add_argument("--stages", default="", help="some of them, in the order to run them in")
    parser.add_argument("--so_far", default="", metavar="FILE", help="an earlier FILE, whose other stages are kept")
    for hidden in ("--stage", "--ask"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage:
        keep_freed_memory()  # as every verb does: the reference has this process's allocator too
        return bench.run_here(args.stage, pickle.loads(Path(args.ask).read_bytes()), args.json)
    try:
        batches = tuple(map(int, filter(None, args.batches.split(","))))
    except ValueError:
        parser.error(f"--batches={args.batches}: expected numbers with commas between")
    config = runpy.run_path(args.config)
    run, time_s = config["RUN"], args.time or config["TIME_S"]
    if args.model:
        run = replace(run, model__name=args.model)
    stages = args.stages.split(",") if args.stages else config["STAGES"]
    earlier = bench.read_json(Path(args.so_far)) if args.so_far else None
    try:
        result = bench.bench(
            run, stages=stages, out=args.json, time_s=time_s, scale=max(1.0, time_s / config["TIME_S"]),
            batches=batches, earlier=earlier,
        )  # fmt: skip
    except ConfigError as error:
        parser.error(f"--{error}")
    print(f"== {args.json}: the figures and this summary, with date and versions; `git add` it where it is evidence")
    ran = dict.fromkeys("answers" if stage in bench.ANSWERS else stage for stage in stages)
    return 0 if all(result["stages"][name]["status"] in ("done", "skipped") for name in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
