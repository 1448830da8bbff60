#!/usr/bin/env bash
# One verb on all GPUs of the machines in a hostfile ("node1 slots=8" in each line):
#   HOSTFILE=hosts bash launch/multinode.sh train experiment=llama3_8b_128k name=first
# The checkout and .venv lie at the same path on every machine. Give plain key=value: lists and braces do not survive
# the remote shell.
set -euo pipefail
source "$(dirname "$0")/../.venv/bin/activate"
verb=$1
shift
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The launcher passes on NCCL_*, and the variables in ~/.deepspeed_env and ./.deepspeed_env; no others.
[ -f .deepspeed_env ] || echo "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" > .deepspeed_env
deepspeed --hostfile "${HOSTFILE:-hosts}" --no_local_rank --module lr2train "$verb" "$@" &
trap 'kill -TERM $! 2>/dev/null' TERM INT  # deepspeed ends the ranks on all machines
code=0
wait $! || code=$?
wait $! 2>/dev/null || code=$?  # a signal ends the first wait; the second waits for the end
# deepspeed exits with 0 when its launcher was killed, so the result file decides whether the job is done.
runs=runs name=
for argument in "$@"; do
  case $argument in runs_folder=*) runs=${argument#*=} ;; name=*) name=${argument#*=} ;; esac
done
case $verb in
  train | search)
    [ "$code" != 0 ] || [ -f "$runs/$name/$verb.json" ] || { echo "[multinode] $runs/$name/$verb.json was not written" >&2; exit 1; } ;;
esac
exit "$code"
