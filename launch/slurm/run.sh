#!/usr/bin/env bash
#SBATCH --job-name=medcg
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# The job that train.sh submits: run.sh PYTHON VERB [arguments of `medcg VERB`]
# Two minutes before its time is up every process has SIGTERM: the run saves and ends with status 75, and is queued again.
set -euo pipefail
python="$1"
shift
echo "== $(date -u +%FT%TZ) $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
status=0
# --wait: the processes end one another within a minute where one dies; what is left after two is ended by srun.
srun --label --wait=120 "$python" -m medcg_jax.cli "$@" || status=$?
if [ "$status" = 75 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
