#!/usr/bin/env bash
#SBATCH --job-name=medcg
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# One task of the array that submit.sh submits: task.sh PYTHON [arguments of `medcg reproduce`]
# Works on the grid until all of it is done. Two minutes before its time is up it saves what it trains, gives it up and is
# queued again. Options above hold unless submit.sh is given others.
set -euo pipefail
python="$1"
shift
echo "== $(date -u +%FT%TZ) $SLURM_ARRAY_JOB_ID, task $SLURM_ARRAY_TASK_ID, on $(uname -n)"
"$python" -m medcg_jax.cli reproduce "$@" &
grid=$! told="" status=0
# Another signal than scancel's SIGTERM, which ends this shell: what is cancelled is not queued again.
trap 'told=yes; kill -TERM "$grid" || true' USR1
wait "$grid" || status=$?
# The signal ends the first wait, and not the grid.
while kill -0 "$grid" 2>/dev/null; do status=0; wait "$grid" || status=$?; done
if [ "$told" ] && [ "$status" = 75 ]; then exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
exit "$status"
