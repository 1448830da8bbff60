"""Peak memory of real training steps on two CPU ranks, beside what ``rehearse`` and ``plan`` say of them.

    python -m tools.bench.memory

Two optimizer steps of a small model for each setting, with gloo. torch's profiler notes every allocation of the rank's
thread. A rehearsal of the same setting, with the CPU's attention kernel, has to agree within 10 % in every phase, and
the estimate of ``plan`` within 5 % of the rehearsal. Functions are those of tests/planning/measured.py. Exits with 1
where a bound is missed. Takes some minutes. The last lines read ``name: value``.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # tests import their helpers from there

from planning.measured import Case, compared
from ranks import run_ranks

from tools.bench.figures import Figure, conclude

WITHIN, PLAN_WITHIN = 0.10, 0.05
CASES = [
    *(Case(recompute=recompute, sp=sp) for recompute in ("none", "keep_attention", "layer") for sp in (1, 2)),
    *(Case(zero_stage=stage, sp=sp) for stage in (1, 2) for sp in (1, 2)),
    Case(zero_stage=2, recompute="none"),
    Case(zero_stage=0),
    *(Case(zero_stage=stage, dtype="bfloat16", sp=2) for stage in (1, 2, 3)),
    Case(tile_mlp=128),
]
MIB = 2**20


def main() -> int:
    """Measure; the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| setting | measured (MiB) | rehearsed (MiB) | ratio | farthest phase | `plan` (MiB) | to rehearsed |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            (one,) = compared([case], partial(run_ranks, tmp_path=Path(folder), timeout_s=600))
        said, peak = one.peaks
        figures = f"{peak / MIB:.2f} | {said / MIB:.2f} | {said / peak:.3f} | {one.worst:.3f}"
        print(f"| {case.title} | {figures} | {one.planned / MIB:.2f} | {one.planned / said:.3f} |", flush=True)
        found.append(one)
    of_rehearsal = max(abs(one.worst - 1) for one in found)
    of_plan = max(abs(one.planned / one.peaks[0] - 1) for one in found)
    return conclude(
        [
            Figure("rehearsed_off_measured", of_rehearsal, at_most=WITHIN),
            Figure("planned_off_rehearsed", of_plan, at_most=PLAN_WITHIN),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
