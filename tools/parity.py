"""Loss and gradients of the ZeRO-3 engine beside one plain transformers process in fp64, case by case.

    python -m tools.parity

The cases and the reference are those of tests/training/deepspeed/test_engine.py: one and two real ranks with gloo,
ZeRO-3 with every parameter gathered and released. Each line holds the largest relative error of a case. The last lines
read ``name: value``. Exits with 1 where the bound is missed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # tests import their helpers from there

from ranks import run_ranks
from training.deepspeed import test_engine as cases

BOUND = 1e-5


def main() -> int:
    """Run every case of one and two ranks; the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    worst = 0.0
    for world in (1, 2):
        these, segments = cases.cases_of(world)
        with tempfile.TemporaryDirectory() as folder:
            results = run_ranks(cases.steps, world, these, segments, tmp_path=Path(folder), timeout_s=300)
        for number, ((_, sp, accumulation), used) in enumerate(zip(these, segments, strict=True)):
            stats, gradients = results[0][number]
            loss, _, _, expected = cases.plain_step(used)
            of_loss = abs(stats.loss - loss) / loss
            of_gradients = max(
                np.abs(gradients[name] - g.numpy()).max() / g.abs().max().item() for name, g in expected.items()
            )
            worst = max(worst, of_loss, of_gradients)
            case = f"dp{world // sp}_sp{sp}_accumulation{accumulation}_segments{used}"
            print(f"{case}: loss {of_loss:.1e}, gradients {of_gradients:.1e}")
    print(f"worst_relative_error: {worst:.2e}\nbound: {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
