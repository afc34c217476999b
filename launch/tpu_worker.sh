#!/usr/bin/env bash
# Runs on the workers of a TPU pod slice, in the checkout; launch/tpu_pod.sh calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: launch/tpu_worker.sh [--dry-run] setup | start FLAGS... | stop | status | logs

  setup           make .venv, and install the project and JAX for TPU there
  start FLAGS...  run python -m layermatch_jax.main FLAGS... in the background, unless a run is active
  stop            tell the run to save a checkpoint and exit
  status          print: none | running | finished | stopped | failed STATUS
  logs            print the output of the run and follow it
  --dry-run       print the commands and run nothing
  -h, --help      print this text
EOF
}

fail() { echo "launch/tpu_worker.sh: $*" >&2; usage >&2; exit 2; }

dry_run=false
[[ "${1:-}" != --dry-run ]] || { dry_run=true; shift; }
action="${1:-}"
shift || true

do_it() {
  if "$dry_run"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

readonly log=run.log pid=run.pid ended=run.status
# After a reboot another process may have this process id, but only ours works in this folder.
running() { [[ -e "$pid" && "/proc/$(cat "$pid")/cwd" -ef . ]]; }

# Runs main, and writes its exit status to run.status. `start` calls this in a background shell; the
# process id of that shell is in run.pid, and main is its only child.
work() {
  local status=0
  .venv/bin/python -m layermatch_jax.main "$@" || status=$?
  echo "$status" >"$ended"
}

case "$action" in
  setup)
    do_it python3 -m venv .venv
    do_it .venv/bin/pip install --quiet -e '.[tfds,gcs]' 'jax[tpu]'
    ;;
  start)
    (($# > 0)) || fail "start needs FLAGS for layermatch_jax.main"
    if "$dry_run"; then
      do_it .venv/bin/python -m layermatch_jax.main "$@"
    elif running; then
      echo "runs already"
    else
      rm -f "$ended"
      [[ ! -e "$log" ]] || mv "$log" "$log.before" # `status` reads the log of the last start only
      work "$@" >>"$log" 2>&1 </dev/null &
      echo "$!" >"$pid"
      disown
    fi
    ;;
  stop)
    if running; then
      do_it pkill -TERM --parent "$(cat "$pid")"
    else
      echo "nothing runs"
    fi
    ;;
  status)
    if running; then
      echo running
    elif [[ ! -e "$ended" ]]; then
      echo none
    elif [[ "$(cat "$ended")" != 0 ]]; then
      echo "failed $(cat "$ended")"
    elif grep -q '^Stopped: ' <(tail -n 20 "$log"); then
      echo stopped
    else
      echo finished
    fi
    ;;
  logs) do_it tail -n 100 -F "$log" ;;
  -h | --help) usage ;;
  *) fail "unknown action '$action'" ;;
esac
