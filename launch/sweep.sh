#!/usr/bin/env bash
# The same training under several RoPE methods, one after the other, on two local ranks:
#   bash launch/sweep.sh "yarn ntk pi" experiment=tiny_4k
set -euo pipefail
source "$(dirname "$0")/setup.sh"
methods=$1
shift
for method in $methods; do
  bash "$checkout/launch/run.sh" 2 train "$@" "rope=$method" rope.factors=null "name=sweep_$method"
  lr2train evaluate "$@" "run=sweep_$method"
done
