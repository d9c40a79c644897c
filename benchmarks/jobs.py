"""One small phantom grid by one process and by two, twice each in turn: `python -m benchmarks.jobs [FOLDER]`.

Prints seconds and their ratio (above 1: two processes are faster), and leaves them in FOLDER/jobs.json.
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.records import write_record

# A base of a few steps and twelve trainings, as long as those of the pairs.
FLAGS = (
    "--config=configs/phantom.py:tiny", "--config.train.steps=150", "--config.data.train_records_per_subset=300",
    "--config.data.test_records_per_subset=300", "--config.study.tables=('pairs',)",
    "--config.study.targets=('ct-liver-grade', 'photo-skin-state', 'oct-skin-grade')",
)  # fmt: skip


def seconds_of(folder: Path, name: str, jobs: int) -> float:
    """Seconds of the grid in FOLDER/name with `jobs` processes.

    Raises:
      CalledProcessError: it failed; its output is in FOLDER/name.log.
    """
    shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, "-m", "medcg_jax.cli", "reproduce", *FLAGS, f"--config.study.base_dir={folder}/bases"]
    began = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        command += [f"--workdir={folder / name}", f"--jobs={jobs}"]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - began


def main(argv: list[str]) -> int:
    folder = Path(argv[0] if argv else "runs/bench_jobs")
    folder.mkdir(parents=True, exist_ok=True)
    for name, jobs in (("first", 2), ("alone", 1)):  # the first makes the base; both fill the cache of programs
        seconds_of(folder, name, jobs)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for jobs, times in seconds.items():
            times.append(seconds_of(folder, f"jobs{jobs}", jobs))
    ratio = statistics.mean(seconds[1]) / statistics.mean(seconds[2])
    for jobs, times in seconds.items():
        print(f"--jobs={jobs}: {', '.join(f'{s:.1f} s' for s in times)}")
    print(f"two processes are {ratio:.2f} times as fast as one")
    write_record(folder / "jobs.json", {"seconds": seconds, "ratio": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
