"""launch/slurm.sbatch with commands of SLURM that only write down how they were called."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "slurm.sbatch"
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
bash -c 'echo "asked: $MASTER_ADDR $LR2TRAIN_INTERRUPTED"' >> calls
[ "$INTERRUPTED" = 1 ] && touch "$LR2TRAIN_INTERRUPTED"
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> calls
[ "$1" = show ] && printf 'node7\\nnode8\\n'
exit 0
"""


@pytest.mark.parametrize(
    ("interrupted", "code"),
    [
        (True, 130),
        (True, 137),  # a rank that still ended was killed
        (True, 143),
        (False, 0),
        (False, 1),
        (False, 130),  # an interrupt whose checkpoint could not be written leaves no marker
    ],
)
def test_slurm_queues_a_job_again_where_rank_0_has_left_its_marker(tmp_path, interrupted, code):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    marker = tmp_path / "slurm-42.interrupted"
    marker.touch()  # of an earlier start
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]", "INTERRUPTED": str(int(interrupted)), "CODE": str(code),
    }  # fmt: skip
    ended = subprocess.run(["bash", str(SCRIPT), "train", "name=first", "a=[1, 2]"], env=environ, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended.returncode == code, ended.stderr
    assert calls[0] == "scontrol show hostnames node[7-8]"
    assert calls[1].startswith("srun --kill-on-bad-exit=1 bash -c ")
    assert f"asked: node7 {marker}" in calls
    assert any(call.endswith(" train name=first a=[1, 2]") for call in calls)
    assert ("scontrol requeue 42" in calls) == interrupted
    assert not marker.exists()
