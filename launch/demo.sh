#!/usr/bin/env bash
# The whole method on a laptop CPU, about ten minutes: a corpus, a tiny base model with a window of 512 tokens, a search
# for RoPE factors, mixed context window training to 4096 tokens on two ranks that share each segment, evaluation,
# export, generation across the window switch, one HTML page. After an interrupt, the same command goes on where it was.
# Arguments are overrides for every step, such as seed=1.
set -euo pipefail
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1  # the same on every machine, with a GPU or without, and nothing is downloaded
source "$(dirname "$0")/setup.sh"
cd "$checkout"
start=$SECONDS
step() { echo "== $1 (${SECONDS}s)" >&2; shift; "$@"; }

step "1/7 corpus: documents -> tokens -> tagged segments"  lr2train prepare experiment=tiny_4k name=corpus "$@"
step "2/7 base model from scratch, window 512: the longest step, 1050 steps on documents of 64, 128, 256, then 512 tokens" \
                                                           bash launch/run.sh 2 train experiment=tiny_base name=base "$@"
step "3/7 search for RoPE factors, 512 -> 4096"            bash launch/run.sh 2 search experiment=tiny_4k name=factors "$@"
step "4/7 mixed context window training at 4096, ZeRO-3, 2 ranks share a segment" \
                                                           bash launch/run.sh 2 train experiment=tiny_4k name=tiny_4k "$@"
step "5/7 evaluation: needles and perplexity by length"    lr2train evaluate experiment=tiny_4k run=tiny_4k "$@" >/dev/null
step "6/7 export, and generation across the window switch" lr2train export experiment=tiny_4k run=tiny_4k "$@"
lr2train generate experiment=tiny_4k run=tiny_4k generate.prompt_file=runs/tiny_4k/evaluation/prompt.txt generate.max_new_tokens=24 "$@"
step "7/7 report"                                          lr2train report runs/tiny_4k
cat runs/tiny_4k/evaluation/table.txt
echo "report: runs/tiny_4k/report.html   ($((SECONDS - start)) s)"
