#!/usr/bin/env bash
# A grid as a job array on a SLURM that is there already: every task runs the same `medcg reproduce` on one workdir.
#   bash launch/slurm/submit.sh [--dry-run] --tasks=N[%K] [SBATCH OPTIONS] -- --config=FILE[:ARG] --workdir=/DIR [...]
# To fill in: --tasks=N (N tasks, at most K of them at a time), what your cluster asks for (--partition=, --account=,
# --time=, --gres=gpu:1, --cpus-per-task=, --mem=, each as --NAME=VALUE), and after `--` the arguments of
# `medcg reproduce`, whose workdir every node must see. --dry-run prints what would be submitted, and submits nothing.
# Takes the Python of .venv beside the checkout's pyproject.toml; PYTHON=/path/to/python names another.
set -euo pipefail
refuse() { echo "submit.sh: $*; see bash launch/slurm/submit.sh --help" >&2; exit 2; }

here="$(cd "$(dirname "$0")" && pwd)"
dry_run="" tasks="" workdir="" options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        -h | --help) sed -n '2,7s/^# //p' "$0"; exit 0 ;;
        --dry-run) dry_run=yes ;;
        --tasks=*) tasks="${1#*=}" ;;
        --array* | -a*) refuse "$1: the array is what --tasks=N[%K] makes" ;;
        -*) options+=("$1") ;;
        *) refuse "$1: options of sbatch are accepted as --NAME=VALUE" ;;
    esac
    shift
done
[[ "$tasks" =~ ^([1-9][0-9]*)(%[1-9][0-9]*)?$ ]] || refuse "--tasks=$tasks: a number of tasks is accepted, as 8 or 16%4"
array="0-$((BASH_REMATCH[1] - 1))${BASH_REMATCH[2]:-}"
[ $# -gt 1 ] || refuse "no arguments of \`medcg reproduce\`: -- --config=FILE.py --workdir=/DIR is accepted"
shift
for argument in "$@"; do
    case "$argument" in --workdir=*) workdir="${argument#*=}" ;; esac
done
case "$workdir" in /*) ;; *) refuse "--workdir=$workdir: a full path that every node sees is accepted" ;; esac

python="${PYTHON:-$(dirname "$(dirname "$here")")/.venv/bin/python}"
command -v "$python" >/dev/null || refuse "no Python at $python; PYTHON=/path/to/python names one"
# A wrong configuration is refused now, and not hours later by every task.
cells="$("$python" -m medcg_jax.cli reproduce "$@" --dry </dev/null)" || exit 2
tail -n 5 <<<"$cells" # the totals

command=(sbatch "--array=$array" "--output=$workdir/logs/slurm-%A_%a.log" ${options[@]+"${options[@]}"}
    "$here/task.sh" "$python" "$@")
if [ "$dry_run" ]; then
    printf 'mkdir -p %q\n' "$workdir/logs"
    printf '%q ' "${command[@]}"
    printf '\n\n'
    exec cat "$here/task.sh"
fi
mkdir -p "$workdir/logs" # sbatch makes no folders, and a task that cannot open its log does not start
exec "${command[@]}"
