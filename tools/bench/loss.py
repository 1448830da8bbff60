"""The loss head's time with gradients in its forward pass, over the time with a second product in the backward pass.

    python -m tools.bench.loss [--quick]

Forward and backward of ``LossHead`` on one CPU core, for a small hidden size and a vocabulary of 32000, in float32.
Rounds alternate between the two; a figure is the median over rounds of the ratio of CPU times. By count three products
with the head stand in the place of four: 0.75 is the bound of large sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch import nn

from lr2train.model.loss import LossHead
from tools.bench.figures import Figure, conclude


def main() -> int:
    """Measure and print; the exit status is 1 where one pass is not faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    n_tokens, rounds = (256, 3) if quick else (1024, 9)
    torch.manual_seed(0)
    head, labels = nn.Linear(512, 32000, bias=False), torch.randint(32000, (n_tokens,))
    hidden = torch.randn(n_tokens, 512, requires_grad=True)
    heads = [LossHead(head, 256, one_pass=one_pass) for one_pass in (False, True)]
    ratios = []
    for _ in range(rounds + 1):
        two, one = (_seconds(loss, hidden, labels) for loss in heads)
        ratios.append(one / two)
    return conclude([Figure("loss_one_pass_over_two_cpu", statistics.median(ratios[1:]), at_most=1.0)])


def _seconds(loss: LossHead, hidden: torch.Tensor, labels: torch.Tensor) -> float:
    start = time.process_time()
    torch.autograd.grad(loss(hidden, labels), (hidden, loss.weight), torch.tensor(0.1))
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
