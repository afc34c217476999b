#!/usr/bin/env bash
# Starts a run on this machine: one process on all its accelerators, or several that share its CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: launch/local.sh [--processes=N] [--port=PORT] [--dry-run] FLAGS...

Starts python -m layermatch_jax.main FLAGS... One process (the default) uses all GPUs or TPU chips of
the machine. With N processes, which find each other at localhost:PORT (default 8476), a run of
several hosts can be tried out on a CPU. Ctrl-C and SIGTERM reach all of them: they save a checkpoint
and leave, and the same command goes on. Paths are relative to the checkout.

  --processes=N  how many (default 1)
  --port=PORT    of the first process, where there are several (default 8476)
  --dry-run      print the commands, run nothing
  -h, --help     this text

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
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--processes=$processes is no number above 0"
[[ "$port" =~ ^[1-9][0-9]*$ ]] || fail "--port=$port is no port"

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
  while "$told"; do # a signal ends the wait, not the process
    told=false ended=0
    wait "$pid" || ended=$?
  done
  ((ended == 0 || status != 0)) || status="$ended" # the first that failed
done
exit "$status"
