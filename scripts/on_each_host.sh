#!/usr/bin/env bash
# Run on every host of a pod: on_each_host.sh NAME BUCKET MOUNT MAX_RESTARTS CONFIG [--key value ...]
# Mounts the bucket, plays the run, and plays on after a preemption or a crash. Exit code 2 is bad input: no restart.
set -uo pipefail

name=$1 bucket=$2 mount=$3 most=$4 config=$5
shift 5

if ! mountpoint -q "$mount"; then
  sudo mkdir -p "$mount" && sudo chown "$(id -u):$(id -g)" "$mount"
  gcsfuse --implicit-dirs "$bucket" "$mount" || { echo "The bucket $bucket cannot be mounted at $mount." >&2; exit 1; }
fi
mkdir -p "$mount/$name/logs"
log="$mount/$name/logs/$(hostname).log"

tpaw=tpaw
[ -x "$HOME/venv/bin/tpaw" ] && tpaw="$HOME/venv/bin/tpaw"
for ((attempt = 0; attempt <= most; attempt++)); do
  echo "$(date -u +%FT%TZ) attempt $attempt of $most" >>"$log"
  "$tpaw" play --pod --config "$config" "$@" >>"$log" 2>&1
  code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
    exit "$code"
  fi
  echo "$(date -u +%FT%TZ) ended with code $code" >>"$log"
  sleep 20
done
exit 1
