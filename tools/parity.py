"""Print how far the engine's loss and gradients are from one plain transformers process in fp64, case by case.

    python -m tools.parity

The cases and the reference are those of tests/training/test_engine.py: real ranks with gloo, ZeRO-3 that gathers and releases every parameter. Figures
last, one a line as ``name: value``; exits with 1 where a bound is missed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.ranks import run_ranks
from tests.training.deepspeed import test_engine as cases

BOUND = 1e-5


def main() -> int:
    """Run every case of one and two ranks."""
    worst = 0.0
    for world in (1, 2):
        these, segments = cases.cases_of(world)
        with tempfile.TemporaryDirectory() as folder:
            results = run_ranks(cases.steps, world, these, segments, tmp_path=Path(folder), timeout_s=300)
        for number, ((_, sp, accumulation), used) in enumerate(zip(these, segments, strict=True)):
            stats, gradients = results[0][number]
            loss, _, _, expected = cases.plain_step(used)
            of_loss = abs(stats.loss - loss) / loss
            of_gradients = max(np.abs(gradients[name] - g.numpy()).max() / g.abs().max().item() for name, g in expected.items())
            worst = max(worst, of_loss, of_gradients)
            print(f"dp{world // sp}_sp{sp}_accumulation{accumulation}_segments{used}: loss {of_loss:.1e}, gradients {of_gradients:.1e}")
    print(f"worst_relative_error: {worst:.2e}\nbound: {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
