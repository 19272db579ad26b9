#!/usr/bin/env bash
# Run on every host of a pod: on_each_host.sh NAME BUCKET MOUNT MAX_RESTARTS CONFIG [--key value ...]
# Mounts the bucket, starts the run, and restarts it after a preemption or a crash, but not after exit code 2 (bad
# input).
set -uo pipefail
export PYTHONUNBUFFERED=1 # the log is read while the run goes on

name=$1 bucket=$2 mount=$3 restarts=$4 config=$5
shift 5

if ! mountpoint -q "$mount"; then
  sudo mkdir -p "$mount" && sudo chown "$(id -u):$(id -g)" "$mount"
  gcsfuse --implicit-dirs "$bucket" "$mount" || { echo "Could not mount the bucket $bucket at $mount." >&2; exit 1; }
fi
mkdir -p "$mount/$name/logs"
log="$mount/$name/logs/$(hostname).log"

tpaw=tpaw
[ -x "$HOME/venv/bin/tpaw" ] && tpaw="$HOME/venv/bin/tpaw"
for ((attempt = 0; attempt <= restarts; attempt++)); do
  echo "$(date -u +%FT%TZ) attempt $attempt of $restarts" >>"$log"
  "$tpaw" play --pod --config "$config" "$@" >>"$log" 2>&1
  code=$?
  echo "$(date -u +%FT%TZ) exit code $code" >>"$log"
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
    exit "$code"
  fi
  sleep 80 # longer than --host-timeout: the other hosts must have ended before this one joins them again
done
exit 1
