#!/usr/bin/env bash
# A run on a Cloud TPU pod slice, from its creation to its deletion, by its name.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
usage: launch/tpu_pod.sh ACTION NAME --zone=ZONE [OPTIONS] [-- FLAGS...]

  create   create the slice (needs --type and --version)
  setup    copy this checkout's last commit to all its workers and install the project there
  run      start python -m layermatch_jax.main FLAGS... on all workers, in the background
  logs     follow the output of the first worker
  status   the state of the slice, and of the run on it
  stop     ask the run to save a checkpoint and leave
  delete   delete the slice
  keep     all of it: create, setup and run; look every minute, begin again where the slice was
           preempted, and delete it when the run is finished. A run that fails ends it, and the
           slice stays; to stop, end this first

  --zone=ZONE        such as us-central2-b
  --project=PROJECT  where it is not the one that gcloud is set to
  --type=TYPE        such as v4-32: what create makes
  --version=VERSION  of its software, such as tpu-ubuntu2204-base
  --spot             create it from spare capacity: cheaper, and preempted at any time
  --dry-run          print the commands, run nothing
  -h, --help         this text

FLAGS must have --workdir=gs://BUCKET/FOLDER: the workers share no other file system.

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
  fail "NAME '$name': small letters, digits and '-', beginning with a letter"
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
    *) fail "unknown option '$1'; flags of the run stand behind --" ;;
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

state() { # READY, PREEMPTED, ...; ABSENT where there is no such slice; UNKNOWN where gcloud fails
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
    echo "# where it is preempted: delete, and from the top; at the end:"
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
        # The connection may break when the slice does: then it is looked at again.
        outcome="$(on_workers 0 status || echo unknown)"
        case "$outcome" in
          *running* | *unknown*) sleep 60 ;;
          *finished*) tpu delete "$name" --quiet; return ;;
          *failed*)
            echo "the run $outcome; the slice is kept: see its logs, and delete it" >&2
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
