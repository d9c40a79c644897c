#!/usr/bin/env bash
# One run over N processes of this machine, each with simulated CPU devices: a rehearsal of a run over N hosts.
#   bash launch/local_multiprocess.sh N [--devices=K] [--dry-run] VERB [arguments of `medcg VERB`]
# VERB is train, eval or reproduce; K devices a process, 1 unless given. Every line is printed behind its process's number.
# When one fails the others end too: by themselves, within a minute, with the name of the one that died; else by force.
# Ctrl-C and SIGTERM reach all of them. Exit status: 0; 75 where the run is to be started again; else the worst one.
# --dry-run prints the commands. PYTHON=/path/to/python names another than that of .venv.
set -euo pipefail
refuse() { echo "local_multiprocess.sh: $*; see bash launch/local_multiprocess.sh --help" >&2; exit 2; }
case "${1:-}" in -h | --help) sed -n '2,7s/^# //p' "$0"; exit 0 ;; esac

here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-$(dirname "$here")/.venv/bin/python}"
command -v "$python" >/dev/null || refuse "no Python at $python; PYTHON=/path/to/python names one"
[[ "${1:-}" =~ ^[1-9][0-9]?$ ]] || refuse "${1:-no number} of processes: 1 to 99 is accepted"
number="$1" devices=1 dry_run=""
shift
while [ $# -gt 0 ]; do
    case "$1" in
        --devices=*) devices="${1#*=}" ;;
        --dry-run) dry_run=yes ;;
        *) break ;;
    esac
    shift
done
[[ "$devices" =~ ^[1-9][0-9]?$ ]] || refuse "--devices=$devices: 1 to 99 is accepted"
case "${1:-}" in train | eval | reproduce) ;; *) refuse "${1:-no verb}: train, eval or reproduce is accepted" ;; esac

port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
flags="$(sed -E 's/--xla_force_host_platform_device_count=[0-9]+//' <<<"${XLA_FLAGS:-}")"
flags="--xla_force_host_platform_device_count=$devices${flags:+ $flags}"
processes=("--num_processes=$number")
[ "$number" = 1 ] || processes+=("--coordinator=127.0.0.1:$port")
if [ "$dry_run" ]; then
    for ((i = 0; i < number; i++)); do
        printf 'JAX_PLATFORMS=cpu XLA_FLAGS=%q ' "$flags"
        printf '%q ' "$python" -m medcg_jax.cli "$@" "${processes[@]}"
        [ "$number" = 1 ] || printf -- '--process_id=%d' "$i"
        printf '\n'
    done
    exit 0
fi

export JAX_PLATFORMS=cpu XLA_FLAGS="$flags" PYTHONUNBUFFERED=1
started=() printers=() running=() worst=0
for ((i = 0; i < number; i++)); do
    exec {out}> >(exec sed -u "s/^/[$i] /")
    printers+=($!)
    own=("${processes[@]}")
    [ "$number" = 1 ] || own+=("--process_id=$i")
    "$python" -m medcg_jax.cli "$@" "${own[@]}" >&"$out" 2>&1 {out}>&- </dev/null &
    started+=($!)
    exec {out}>&-
done
running=("${started[@]}")

tell() { for pid in ${running[@]+"${running[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'tell TERM' TERM INT

# Any failure is worse than "start me again", and that is worse than none.
rank() { case "$1" in 0) echo 0 ;; 75) echo 1 ;; *) echo $((2 + $1)) ;; esac; }
forced=""
while [ ${#running[@]} -gt 0 ]; do
    sleep 0.2 & # `wait -n` alone would not see a signal's trap out
    wait -n "$!" ${running[@]+"${running[@]}"} 2>/dev/null || true
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        [ "$(rank "$status")" -gt "$(rank "$worst")" ] && worst="$status"
    done
    running=(${left[@]+"${left[@]}"})
    if [ "$worst" != 0 ] && [ -z "$forced" ]; then forced=$((SECONDS + 60)); fi
    if [ -n "$forced" ] && [ "$SECONDS" -ge "$forced" ]; then tell KILL; fi
done
wait "${printers[@]}" || true
exit "$worst"
