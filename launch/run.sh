#!/usr/bin/env bash
# One verb on this machine's ranks under the deepspeed launcher:  bash launch/run.sh 2 train experiment=tiny_4k name=first
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ranks=$1 verb=$2
shift 2
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
exec deepspeed --quiet --num_gpus "$ranks" --master_port "$port" --no_local_rank --module "lr2train.$verb" "$@"
