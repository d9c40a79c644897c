#!/usr/bin/env bash
# The tests from nothing: bash launch/test.sh [--all] [pytest arguments]
# Makes .venv, installs the project with PyTorch for the parity tests, checks the code's form, and runs the suite on 8
# simulated devices; then a smoke test on the newest Python that is found, with its newer JAX (constraints.txt).
# --all: the long drills too, a type check, and the whole suite on both Pythons.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

all=""
if [ "${1:-}" = --all ]; then all=yes; shift; fi
if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; else python="$(choose_python)"; fi
second="$(find_python 3.13 3.12 || true)"
# The long tests look at pages in a browser, build the documentation and run the notebooks.
install_project .venv "$python" "test,parity${all:+,browser,docs}"
# libtpu compiles for TPUs that are not there (tests/plan/test_budget.py). Beside the environment and not in it: JAX asks
# it for a TPU wherever it is installed. The version is that of the extra `tpu` of 3.11's JAX; without it that test is
# skipped.
if [ ! -d .libtpu/libtpu ] && [ "$(version_of .venv/bin/python)" = 3.11 ]; then
    .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-deps --target .libtpu \
        libtpu==0.0.42.1 </dev/null >/dev/null 2>&1 || say "no libtpu for this machine: nothing is compiled for a TPU"
fi

# Two workers keep two cores busy; a group's tests stay on one worker, where they share what they compiled.
run_tests() {
    local venv="$1"
    shift
    say "$("$venv/bin/python" -c 'import platform; from importlib.metadata import version as v
print("Python", platform.python_version(), "| jax", v("jax"), "| flax", v("flax"))')"
    "$venv/bin/python" -m pytest -q -n "${TEST_WORKERS:-2}" --dist=loadscope --durations=10 "$@" </dev/null
}

status=0
.venv/bin/python -m ruff check . || status=$?
.venv/bin/python -m ruff format --check . || status=$?
if [ -n "$all" ]; then
    .venv/bin/python -m mypy || status=$?
    run_tests .venv -m "" "$@" || status=$?
else
    run_tests .venv "$@" || status=$?
fi
if [ -z "$second" ] || [ "$(version_of .venv/bin/python)" != 3.11 ]; then
    say "no second run: it needs Python 3.11 for the first and a 3.13 or 3.12 beside it"
    exit "$status"
fi
venv=".venv$(version_of "$second" | tr -d .)"
install_project "$venv" "$second" test
if [ -n "$all" ]; then
    # That libtpu is the older JAX's; and what starts other processes knows nothing of JAX's version.
    run_tests "$venv" -m "" --ignore=tests/plan/test_budget.py --ignore=tests/launch "$@" || status=$?
elif [ $# -eq 0 ]; then
    run_tests "$venv" -m smoke || status=$?
fi
exit "$status"
