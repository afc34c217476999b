#!/usr/bin/env bash
# Creates a Cloud TPU pod slice, runs training on it, and deletes it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: launch/tpu_pod.sh ACTION NAME --zone=ZONE [OPTIONS] [-- FLAGS...]

  create   create the slice (needs --type and --version)
  setup    copy this checkout's last commit to all its workers and install the project there
  run      start python -m layermatch_jax.main FLAGS... on all workers, in the background
  logs     follow the output of the first worker
  status   print the state of the slice and of the run on it
  stop     tell the run to save a checkpoint and exit
  delete   delete the slice
  keep     create, setup and run, then check every minute: if the slice was preempted, start again;
           if the run is finished, delete the slice; if the run failed, exit and keep the slice.
           To stop the run, end this command first

  --zone=ZONE        zone of the slice, such as us-central2-b
  --project=PROJECT  Google Cloud project (default: that of gcloud's configuration)
  --type=TYPE        type of the slice that create makes, such as v4-32
  --version=VERSION  version of its software, such as tpu-ubuntu2204-base
  --spot             create it from spare capacity: cheaper, but it may be preempted at any time
  --dry-run          print the commands and run nothing
  -h, --help         print this text

FLAGS must contain --workdir=gs://BUCKET/FOLDER, because the workers share no other file system.

example: launch/tpu_pod.sh keep pod1 --zone=us-central2-b --type=v4-32 --version=tpu-ubuntu2204-base \
    --spot -- --config=cifar100 --workdir=gs://bucket/cifar100
EOF
}

fail() { echo "launch/tpu_pod.sh: $*" >&2; usage >&2; exit 2; }

action="${1:-}" name="${2:-}"
case "$action" in
  create | setup | run | logs | status | stop | delete | keep) ;;
  -h | --help) usage; exit 0 ;;
  *) fail "unknown action '$action'" ;;
esac
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "NAME '$name' must have lowercase letters, digits and '-', and begin with a letter"
shift 2

zone='' type='' version='' spot=false dry_run=false
options=() flags=()
while (($# > 0)); do
  case "$1" in
    --zone=*) zone="${1#*=}" ;;
    --project=*) options+=("$1") ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --spot) spot=true ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    --) shift; flags=("$@"); break ;;
    *) fail "unknown option '$1': write the flags of the run after --" ;;
  esac
  shift
done
[[ -n "$zone" ]] || fail "--zone=ZONE is missing"
options+=("--zone=$zone")
case "$action" in
  create | keep)
    [[ -n "$type" ]] || fail "$action needs --type=TYPE"
    [[ -n "$version" ]] || fail "$action needs --version=VERSION"
    ;;
esac
case "$action" in
  run | keep)
    [[ " ${flags[*]}" == *" --workdir=gs://"* ]] || fail "$action needs -- --workdir=gs://..."
    ;;
  *) ((${#flags[@]} == 0)) || fail "$action takes no FLAGS: ${flags[*]}" ;;
esac

do_it() {
  if "$dry_run"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpu() { do_it gcloud compute tpus tpu-vm "$@" "${options[@]}"; }

on_workers() { # WORKER COMMAND...: runs launch/tpu_worker.sh COMMAND... on a worker or on 'all'
  local worker="$1"
  shift
  tpu ssh "$name" --worker="$worker" --command="layermatch/launch/tpu_worker.sh ${*@Q}"
}

create() {
  local kind=()
  ! "$spot" || kind+=(--spot)
  tpu create "$name" --accelerator-type="$type" --version="$version" "${kind[@]}"
}

setup() {
  local archive
  archive="$(mktemp --suffix=.tar.gz)"
  do_it git archive --output="$archive" --prefix=layermatch/ HEAD
  tpu scp "$archive" "$name:layermatch.tar.gz" --worker=all
  tpu ssh "$name" --worker=all --command='tar -xzf layermatch.tar.gz'
  rm -f "$archive"
  on_workers all setup
}

state() { # READY, PREEMPTED, ...; ABSENT if there is no such slice; UNKNOWN if gcloud fails
  local said
  if said="$(gcloud compute tpus tpu-vm describe "$name" --format='value(state)' "${options[@]}" 2>"$errors")"; then
    tail -n 1 <<<"$said"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
}

keep() {
  if "$dry_run"; then
    create
    setup
    on_workers all start "${flags[@]}"
    echo "# every minute, until 'finished':"
    tpu describe "$name" --format='value(state)'
    on_workers 0 status
    echo "# if it is preempted: delete, and start again; at the end:"
    tpu delete "$name" --quiet
    return
  fi
  local now outcome unknown=0
  errors="$(mktemp)"
  trap 'rm -f "$errors"' EXIT
  while true; do
    now="$(state)"
    [[ "$now" == UNKNOWN ]] && unknown=$((unknown + 1)) || unknown=0
    case "$now" in
      READY)
        # The connection may break when the slice is preempted: then check again.
        outcome="$(on_workers 0 status || echo unknown)"
        case "$outcome" in
          *running* | *unknown*) sleep 60 ;;
          *finished*) tpu delete "$name" --quiet; return ;;
          *failed*)
            echo "the run $outcome; the slice is kept: look at its logs, then delete it" >&2
            return 1
            ;;
          *) { setup && on_workers all start "${flags[@]}"; } || sleep 60 ;;
        esac
        ;;
      PREEMPTED | TERMINATED | STOPPED) tpu delete "$name" --quiet || sleep 60 ;;
      ABSENT) create || sleep 60 ;; # there may be no capacity
      UNKNOWN)
        ((unknown < 10)) || { echo "gcloud keeps failing: giving up" >&2; return 1; }
        sleep 60
        ;;
      *) sleep 60 ;; # CREATING, DELETING, ...
    esac
  done
}

case "$action" in
  create | setup | keep) "$action" ;;
  run) on_workers all start "${flags[@]}" ;;
  logs) on_workers 0 logs ;;
  stop) on_workers all stop ;;
  status)
    tpu describe "$name" --format='value(state)'
    on_workers all status
    ;;
  delete) tpu delete "$name" --quiet ;;
esac
