#!/usr/bin/env bash
# One run over all hosts of a Cloud TPU VM slice that is there already: the same `medcg VERB` on each, joined by JAX.
#   bash launch/tpu_vm/run.sh --name=TPU --zone=ZONE [--project=PROJECT] [--folder=DIR] [--dry-run] -- VERB [...]
# To fill in: the TPU's name and zone, DIR, the checkout on every host ($HOME/medcg-jax unless given; with .venv in it),
# and after `--` a verb, train, eval or reproduce, with its arguments, whose workdir every host must see.
# --dry-run prints the command, and runs nothing.
set -euo pipefail
refuse() { echo "run.sh: $*; see bash launch/tpu_vm/run.sh --help" >&2; exit 2; }

dry_run="" name="" zone="" project="" folder="" workdir=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        -h | --help) sed -n '2,6s/^# //p' "$0"; exit 0 ;;
        --dry-run) dry_run=yes ;;
        --name=*) name="${1#*=}" ;;
        --zone=*) zone="${1#*=}" ;;
        --project=*) project="${1#*=}" ;;
        --folder=*) folder="${1#*=}" ;;
        *) refuse "$1: --name=, --zone=, --project=, --folder= and --dry-run are accepted" ;;
    esac
    shift
done
[[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || refuse "--name=$name: a TPU VM's name has small letters, digits and -, and begins with a letter; as in my-tpu"
[[ "$zone" =~ ^[a-z]+-[a-z0-9]+-[a-z]$ ]] || refuse "--zone=$zone: a zone is accepted, as us-east5-b"
case "$folder" in "" | /*) ;; *) refuse "--folder=$folder: a full path on the hosts is accepted" ;; esac
[ $# -gt 1 ] || refuse "no verb: -- train --config=FILE.py --workdir=/DIR is accepted"
shift
case "$1" in train | eval | reproduce) ;; *) refuse "$1: train, eval or reproduce is accepted" ;; esac
for argument in "$@"; do
    case "$argument" in --workdir=*) workdir="${argument#*=}" ;; esac
done
case "$workdir" in /*) ;; *) refuse "--workdir=$workdir: a full path that every host sees is accepted" ;; esac

where='"$HOME/medcg-jax"'
[ -z "$folder" ] || where="$(printf '%q' "$folder")"
remote="cd $where && exec .venv/bin/python -m medcg_jax.cli$(printf ' %q' "$@") --coordinator=auto"
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" ${project:+"--project=$project"} --worker=all
    "--command=$remote")
if [ "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
command -v gcloud >/dev/null || { echo "run.sh: no gcloud on this machine; --dry-run prints the command" >&2; exit 1; }
exec "${command[@]}"
