"""The checks of ``tools.gpu.check`` as tests, on a machine with GPUs; skipped elsewhere.

    python -m pytest tests/gpu

Their code also runs on CPUs with small sizes, in tests/test_gpu_check.py.
"""

import subprocess
import sys

import pytest
import torch

from tools.gpu import check

N_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not N_GPUS, reason="needs a GPU")


def test_every_kernel_equals_float64(tmp_path):
    """Every kernel that can be imported; float32 too, packed documents, windows, simulated ranks, rows at 128k."""
    assert check.main(["--quick", "--only", "parity", "--out", str(tmp_path / "parity.json")]) == 0


@pytest.mark.parametrize("n_ranks", sorted({1, min(2, N_GPUS), N_GPUS}))
def test_real_ranks_on_nccl(n_ranks, tmp_path):
    """Strategies and an optimizer step beside float64, and memory beside the estimate."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}", "-m"]
    run = subprocess.run(
        [*launch, "tools.gpu.check", "--only", "ranks", "--out", str(tmp_path / "ranks.json")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_attention_and_layer_are_timed(tmp_path):
    """Small shapes, so no speed is asserted."""
    assert check.main(["--quick", "--only", "attention", "layer", "--out", str(tmp_path / "speed.json")]) == 0
