#!/usr/bin/env bash
# The quick phantom grid from nothing: bash launch/demo.sh [WORKDIR]
# Makes .venv, installs the project, runs the grid and says where its page is. Run again, it goes on where it stopped.
set -euo pipefail
case "${1:-}" in
    -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
    -*) echo "demo.sh: $1 is not known; bash launch/demo.sh [WORKDIR] is accepted" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "demo.sh: $# arguments; bash launch/demo.sh [WORKDIR] is accepted" >&2; exit 2; }
checkout="$(cd "$(dirname "$0")/.." && pwd)"
workdir="${1:-$checkout/runs/demo}"
case "$workdir" in /*) ;; *) workdir="$PWD/$workdir" ;; esac
cd "$checkout"
. launch/venv.sh

if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; else python="$(choose_python)"; fi
install_project .venv "$python" ""
say "running the phantom grid in $workdir"
.venv/bin/python -m medcg_jax.cli reproduce --config=configs/phantom.py --workdir="$workdir"
say "the page: $workdir/report/index.html"
