#!/usr/bin/env bash
# One verb on several ranks of this machine, under DeepSpeed's launcher:
#   bash launch/run.sh 2 train experiment=tiny_4k name=first
# This process becomes the launcher. The launcher passes SIGTERM on to the ranks and ends with their exit code; the
# `deepspeed` command does neither. After SIGTERM the ranks end their step, write a checkpoint and leave; after 30 s the
# launcher kills them.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ranks=$1 verb=$2
shift 2
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
world=$(python -c 'import base64, json, sys; print(base64.urlsafe_b64encode(json.dumps({"localhost": list(range(int(sys.argv[1])))}).encode()).decode())' "$ranks")
exec python -m deepspeed.launcher.launch --world_info="$world" --master_addr=127.0.0.1 --master_port="$port" --quiet --no_local_rank \
  --module lr2train "$verb" "$@"
