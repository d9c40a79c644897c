#!/usr/bin/env bash
# One run over several nodes of a SLURM that is there already: srun starts its processes, jax.distributed joins them.
#   bash launch/slurm/train.sh [--dry-run] --nodes=N [SBATCH OPTIONS] -- VERB --config=FILE[:ARG] --workdir=/DIR [...]
# To fill in: --nodes=N, what your cluster asks for (--partition=, --account=, --time=, --gres=gpu:8, --cpus-per-task=,
# --mem=, each as --NAME=VALUE; --ntasks-per-node=K, 1 unless given, for one process per GPU), and after `--` a verb,
# train, eval or reproduce, with its arguments, whose workdir every node must see. --dry-run checks, and submits nothing.
# A run that ends with status 75 has saved and is queued again; with --nodes=MIN-MAX and --config.mesh.elastic=true also
# on fewer nodes than before. PYTHON=/path/to/python names another than .venv's.
set -euo pipefail
refuse() { echo "train.sh: $*; see bash launch/slurm/train.sh --help" >&2; exit 2; }

here="$(cd "$(dirname "$0")" && pwd)"
dry_run="" nodes="" per_node=1 workdir="" options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        -h | --help) sed -n '2,8s/^# //p' "$0"; exit 0 ;;
        --dry-run) dry_run=yes ;;
        --nodes=*) nodes="${1#*=}" ;;
        --ntasks-per-node=*) per_node="${1#*=}" ;;
        --array* | -a*) refuse "$1: an array is for grids, by submit.sh" ;;
        --ntasks=* | -n*) refuse "$1: --nodes=N with --ntasks-per-node=K is accepted" ;;
        -*) options+=("$1") ;;
        *) refuse "$1: options of sbatch are accepted as --NAME=VALUE" ;;
    esac
    shift
done
[[ "$nodes" =~ ^[1-9][0-9]*(-[1-9][0-9]*)?$ ]] || refuse "--nodes=$nodes: a number of nodes is accepted, or MIN-MAX"
if [[ "$nodes" == *-* && " $* " != *" --config.mesh.elastic=true "* ]]; then
    refuse "--nodes=$nodes: with --config.mesh.elastic=true a run takes as many as there are"
fi
[[ "$per_node" =~ ^[1-9][0-9]*$ ]] || refuse "--ntasks-per-node=$per_node: a number of processes is accepted"
[ $# -gt 1 ] || refuse "no verb: -- train --config=FILE.py --workdir=/DIR is accepted"
shift
case "$1" in train | eval | reproduce) ;; *) refuse "$1: train, eval or reproduce is accepted" ;; esac
for argument in "$@"; do
    case "$argument" in --workdir=*) workdir="${argument#*=}" ;; esac
done
case "$workdir" in /*) ;; *) refuse "--workdir=$workdir: a full path that every node sees is accepted" ;; esac
python="${PYTHON:-$(dirname "$(dirname "$here")")/.venv/bin/python}"
command -v "$python" >/dev/null || refuse "no Python at $python; PYTHON=/path/to/python names one"

# A wrong configuration is refused now, and not hours later by every process.
checked="$("$python" -m medcg_jax "$@" --dry </dev/null)" || exit 2
tail -n 5 <<<"$checked"

command=(sbatch "--nodes=$nodes" "--ntasks-per-node=$per_node" "--output=$workdir/logs/slurm-%j.log"
    ${options[@]+"${options[@]}"} "$here/run.sh" "$python" "$@")
if [ "$dry_run" ]; then
    printf 'mkdir -p %q\n' "$workdir/logs"
    printf '%q ' "${command[@]}"
    printf '\n\n'
    exec cat "$here/run.sh"
fi
mkdir -p "$workdir/logs" # sbatch makes no folders, and a job that cannot open its log does not start
exec "${command[@]}"
