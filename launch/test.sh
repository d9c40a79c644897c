#!/usr/bin/env bash
# The tests from nothing: bash launch/test.sh [pytest arguments]
# Makes .venv, installs the project with PyTorch for the parity tests, and runs the suite on 8 simulated devices.
# Where that is Python 3.11 and a 3.12 is found too, .venv312 then runs what needs no PyTorch on the newer JAX.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ]; then python=.venv/bin/python; else python="$(choose_python)"; fi
second="$(find_python 3.12 || true)"
install_project .venv "$python" test,parity
# libtpu compiles for TPUs that are not there (tests/scale/test_budget.py). Beside the environment and not in it: JAX asks
# it for a TPU wherever it is installed. The version is that of the extra `tpu`; without it that test is skipped.
if [ ! -d .libtpu/libtpu ]; then
    .venv/bin/python -m pip install -qq --no-input --disable-pip-version-check --no-deps --target .libtpu \
        libtpu==0.0.42.1 </dev/null >/dev/null 2>&1 || say "no libtpu for this machine: nothing is compiled for a TPU"
fi

# Two workers keep two cores busy; a file's tests stay on one worker, where they share what they compiled.
run_tests() {
    local venv="$1"
    shift
    say "$("$venv/bin/python" -c 'import platform; from importlib.metadata import version as v
print("Python", platform.python_version(), "| jax", v("jax"), "| flax", v("flax"))')"
    "$venv/bin/python" -m pytest -q -n "${TEST_WORKERS:-2}" --dist=loadfile --durations=10 "$@" </dev/null
}

status=0
run_tests .venv "$@" || status=$?
if [ -n "$second" ] && [ "$(version_of .venv/bin/python)" = 3.11 ]; then
    install_project .venv312 "$second" test
    # Once is enough for what knows nothing of JAX and takes long, and for what is made of parts that are tested below
    # (test_grid.py, tests/eval, tests/train have the grid and the models that test_backbones.py puts together). And that
    # libtpu is the older JAX's.
    run_tests .venv312 --ignore=tests/scale/test_budget.py \
        --ignore=tests/launch --ignore-glob='tests/study/test_report*.py' \
        --ignore=tests/study/test_kills.py --ignore=tests/study/test_backbones.py \
        --ignore-glob='tests/data/test_prepare*.py' \
        --ignore-glob='tests/data/test_hostile*.py' --ignore-glob='tests/data/test_fuzz*.py' \
        --ignore-glob='tests/study/test_broken*.py' --ignore=tests/test_broken_files.py \
        --ignore=tests/data/test_image_limits.py --ignore-glob='tests/data/test_*_faults.py' "$@" || status=$?
else
    say "no second run: it needs Python 3.11 for the first and a 3.12 beside it"
fi
exit "$status"
