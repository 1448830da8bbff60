#!/usr/bin/env bash
# The tests. Arguments go to pytest:  bash launch/test.sh tests/rope -k yarn  (or -m slow: the longer proofs alone)
set -euo pipefail
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # many small processes: threads of several would wait for each other
source "$(dirname "$0")/setup.sh"
install requirements-eval
install requirements-dashboard
install requirements-gguf
cd "$checkout"
ruff check .
pyright
# A file stays in one process: its models and runs are made once.
exec python -m pytest -q -n logical --maxprocesses 8 --dist loadfile "$@"
