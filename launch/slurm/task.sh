#!/usr/bin/env bash
#SBATCH --job-name=medcg
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:INT@120
# One task of the array that submit.sh submits: task.sh PYTHON [arguments of `medcg reproduce`]
# Works on the grid until all of it is done. Options above hold unless submit.sh is given others.
set -euo pipefail
python="$1"
shift
echo "== $(date -u +%FT%TZ) $SLURM_ARRAY_JOB_ID, task $SLURM_ARRAY_TASK_ID, on $(uname -n)"
# In place of this shell, so that the signal before the time limit reaches Python, which stops as it does for Ctrl-C:
# what it holds is given up, not left to be found dead.
exec "$python" -m medcg_jax.cli reproduce "$@"
