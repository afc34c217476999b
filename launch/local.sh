#!/usr/bin/env bash
# Starts a run on this machine: one process on all accelerators, or several processes on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: launch/local.sh [--processes=N] [--port=PORT] [--dry-run] FLAGS...

Starts python -m layermatch_jax.main FLAGS... One process (the default) uses all GPUs or TPU chips of
the machine. Use N processes to try out a run of several hosts on a CPU; they connect to each other at
localhost:PORT. Ctrl-C and SIGTERM are passed to all processes: they save a checkpoint and exit. Run
the same command again to resume. Paths are relative to the checkout.

  --processes=N  number of processes (default 1)
  --port=PORT    port of the first process, if there are several (default 8476)
  --dry-run      print the commands and run nothing
  -h, --help     print this text

example: launch/local.sh --processes=2 --config=digits --workdir=runs/two
EOF
}

fail() { echo "launch/local.sh: $*" >&2; usage >&2; exit 2; }

processes=1 port=8476 dry_run=false
flags=()
for argument in "$@"; do
  case "$argument" in
    --processes=*) processes="${argument#*=}" ;;
    --port=*) port="${argument#*=}" ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --*) flags+=("$argument") ;;
    *) fail "unexpected argument '$argument': flags are written --name=value" ;;
  esac
done
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes=$processes must be a whole number above 0"
[[ "$port" =~ ^[1-9][0-9]*$ ]] || fail "--port=$port must be the number of a port"

main=("${PYTHON:-python}" -m layermatch_jax.main "${flags[@]}")
pids=()
told=false
trap 'told=true; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((id = 0; id < processes; id++)); do
  command=("${main[@]}")
  if ((processes > 1)); then
    command+=("--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$id")
  fi
  if "$dry_run"; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

status=0
for pid in "${pids[@]}"; do
  told=true
  while "$told"; do # a signal ends `wait`, but not the process
    told=false ended=0
    wait "$pid" || ended=$?
  done
  ((ended == 0 || status != 0)) || status="$ended" # the status of the first process that failed
done
exit "$status"
