#!/usr/bin/env bash
# The whole method on a laptop CPU, about six minutes on two cores: a corpus, a search for RoPE factors of the tiny
# pretrained model in launch/base, whose window is 512 tokens, mixed context window training to 4096 tokens on two ranks
# that share each segment, the same training with YaRN, evaluation, export, generation across the window switch, an HTML
# page that compares both.
# After an interrupt, the same command goes on where it was. Arguments are overrides for every step, such as seed=1.
set -euo pipefail
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1  # the same on every machine, with a GPU or without, and nothing is downloaded
source "$(dirname "$0")/setup.sh"
cd "$checkout"
start=$SECONDS
step() { echo "== $1 ($((SECONDS - start)) s)" >&2; shift; "$@"; }
ranks() { bash launch/run.sh 2 "$@"; }

step "1/7 corpus: documents -> tokens -> tagged segments"  lr2train prepare experiment=tiny_4k name=corpus "$@"
step "2/7 search for RoPE factors, 512 -> 4096"            ranks search experiment=tiny_4k name=factors "$@"
step "3/7 LongRoPE2: mixed context window training at 4096, ZeRO-3, 2 ranks share a segment" \
                                                           ranks train experiment=tiny_4k name=tiny_4k "$@"
step "4/7 YaRN, trained alike: same segments, steps and learning rate" \
                                                           ranks train experiment=tiny_4k name=tiny_4k_yarn rope=yarn rope.factors=null "$@"
step "5/7 evaluation: needles and perplexity by length; the longest step, about three minutes" \
                                                           ranks evaluate experiment=tiny_4k run=tiny_4k "$@" >/dev/null
ranks evaluate experiment=tiny_4k run=tiny_4k_yarn eval.methods=[] eval.untrained=false "$@" >/dev/null
step "6/7 export, and generation across the window switch" lr2train export experiment=tiny_4k run=tiny_4k "$@"
lr2train generate experiment=tiny_4k run=tiny_4k generate.prompt_file=runs/tiny_4k/evaluation/prompt.txt generate.max_new_tokens=24 "$@"
step "7/7 report: both runs beside each other"             lr2train report runs/tiny_4k runs/tiny_4k_yarn
echo "report: runs/tiny_4k/comparison.html   ($((SECONDS - start)) s without installing packages)"
