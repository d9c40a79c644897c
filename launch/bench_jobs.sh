#!/usr/bin/env bash
# One small phantom grid by one process and by two, twice each in turn: bash launch/bench_jobs.sh [FOLDER]
# Prints seconds and their ratio (above 1: two processes are faster), and leaves them in FOLDER/jobs.json.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-runs/bench_jobs}"
python="${PYTHON:-.venv/bin/python}"
# A base of a few steps, and twelve trainings as long as those of the pairs.
flags=(--config=configs/phantom.py:tiny --config.study.base_dir="$folder/bases" --config.train.steps=150
    --config.data.train_records_per_subset=300 --config.data.test_records_per_subset=300
    --config.study.tables="('pairs',)" --config.study.targets="('ct-liver-stage', 'xray-breast-state', 'oct-skin-grade')")
run() {
    rm -rf "$folder/$1"
    local began
    began="$(date +%s.%N)"
    "$python" -m medcg_jax.cli reproduce "${flags[@]}" --workdir="$folder/$1" --jobs="$2" >"$folder/$1.log" 2>&1 || {
        tail -n 5 "$folder/$1.log" >&2
        exit 1
    }
    echo "$2 $began $(date +%s.%N)" >>"$folder/times"
}

mkdir -p "$folder"
run first 2 # makes the base, and compiles for the cache
run alone 1
: >"$folder/times"
for _ in 1 2; do
    run one 1
    run two 2
done
"$python" - "$folder" <<'PYTHON'
import json, sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

folder, seconds = Path(sys.argv[1]), defaultdict(list)
for line in (folder / "times").read_text().splitlines():
    jobs, began, ended = line.split()
    seconds[jobs].append(float(ended) - float(began))
ratio = mean(seconds["1"]) / mean(seconds["2"])
for jobs, found in seconds.items():
    print(f"--jobs={jobs}: " + ", ".join(f"{s:.1f} s" for s in found))
print(f"two processes are {ratio:.2f} times as fast as one")
(folder / "jobs.json").write_text(json.dumps({"seconds": seconds, "ratio": ratio}) + "\n")
PYTHON
