#!/usr/bin/env bash
# The paper's tables in miniature on a laptop CPU: base models, searches, a training for each row, evaluation, one page
# and REPRODUCTION.md beside it. The full form, once finished, writes docs/REPRODUCTION.md too.
#   bash launch/reproduce.sh          four bases, two ratios, three seeds: two to three hours on two idle cores
#   bash launch/reproduce.sh quick    one base and its undertrained form, one ratio, two seeds: 25 minutes on two idle cores
#   bash launch/reproduce.sh demo     a base made like the demo's, one seed
# After an interrupt, the same command goes on where it was. Further arguments go to `python -m tools.reproduce`.
set -euo pipefail
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1  # the same on every machine, and nothing is downloaded
export OMP_NUM_THREADS=1  # two steps run side by side, one thread each
source "$(dirname "$0")/setup.sh"
cd "$checkout"
case " $* " in
    *" quick "* | *" demo "*) exec python -m tools.reproduce "$@" ;;
    *) exec python -m tools.reproduce "$@" --document docs/REPRODUCTION.md ;;
esac
