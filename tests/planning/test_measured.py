"""The memory that a rehearsal sees is the memory that a real step takes, phase by phase. ``python -m
tools.bench.memory`` measures more settings.
"""

from functools import partial

import pytest
from planning.measured import Case, compared
from ranks import run_ranks

CASES = [
    Case(segment_tokens=512, layers=1, sp=2, recompute="layer"),
    Case(segment_tokens=512, layers=1, zero_stage=1, dtype="bfloat16"),
]


@pytest.mark.slow
def test_a_rehearsal_agrees_with_torchs_own_accounting_in_every_phase(tmp_path):
    for case, one in zip(CASES, compared(CASES, partial(run_ranks, tmp_path=tmp_path, timeout_s=300)), strict=True):
        assert len(one.measured) == 7, case.title  # forward and backward of three micro-batches, and the update
        for phase, found in one.measured.items():
            assert one.rehearsed[phase] == pytest.approx(found, rel=0.1), (case.title, phase)
        assert one.planned == pytest.approx(one.peaks[0], rel=0.05), case.title
