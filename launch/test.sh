#!/usr/bin/env bash
# The tests, under ten minutes on two cores. Arguments go to pytest:  bash launch/test.sh tests/rope -k yarn
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ruff check .
pyright
exec python -m pytest -q "$@"
