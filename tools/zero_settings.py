"""Every ZeRO stage x dtype x offload on two real ranks (gloo), and the reduction's dtype and hpZ on four.

    python -m tools.zero_settings

Each setting trains 5 steps, goes on from the checkpoint of step 3 in a second engine, and writes its model. A setting
runs if the resumed losses are the same, bit for bit, and if losses and written model are those of ZeRO-3 in float32
within the dtype's rounding. Or the config refuses the setting; the refusal is printed. The rows are those of the table
in docs/RUNNING.md. The functions are those of tests/training/deepspeed/test_zero_settings.py. Exits with 1 where a
setting neither runs nor is refused. Takes about two minutes.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # tests import their helpers from there

from ranks import RankError, run_ranks
from training.deepspeed import test_zero_settings as cases

STAGES, DTYPES = (0, 1, 2, 3), ("float32", "bfloat16", "float16")


def main() -> int:
    """Run the table; the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    baseline = _run([cases.BASELINE], 2)
    assert isinstance(baseline, list), baseline
    settings = itertools.starmap(cases.Setting, itertools.product(STAGES, DTYPES, cases.OFFLOADS))
    failed = sum(_row(setting, baseline[0]) for setting in settings)
    failed += sum(
        _row(cases.Setting(stage, dtype, reduce_dtype="bfloat16"), baseline[0]) for stage in STAGES for dtype in DTYPES
    )
    for dtype in DTYPES:
        failed += _secondary(cases.Setting(3, dtype))
    print(f"failed: {failed}")
    return int(failed > 0)


def _run(settings: list[cases.Setting], world: int) -> list[cases.Outcome] | str:
    """The outcomes of settings, or why a rank failed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run_ranks(cases.outcomes, world, settings, Path(folder), tmp_path=Path(folder), timeout_s=120)[0]
        except (RankError, TimeoutError) as error:
            return str(error).strip().splitlines()[-1]


def _row(setting: cases.Setting, baseline: cases.Outcome) -> bool:
    """Print a row of the table; whether the setting failed."""
    if (error := cases.refusal_of(setting)) is not None:
        print(f"{_name(setting)}: refused: {error}", flush=True)
        return False
    found = _run([setting], 2)
    if isinstance(found, str):
        print(f"{_name(setting)}: FAILED: {found}", flush=True)
        return True
    coarse = "bfloat16" if setting.reduce_dtype == "bfloat16" else setting.dtype
    wrong = cases.faults(found[0], baseline, coarse)
    error = cases.error_of(found[0], baseline)
    print(f"{_name(setting)}: {'; '.join(wrong) or 'runs'}, largest relative error of a loss {error:.1e}", flush=True)
    return bool(wrong)


def _secondary(plain: cases.Setting) -> bool:
    """Compare hpZ with plain ZeRO-3 on four ranks, and print the bytes of both; whether a bit differs."""
    found = _run([plain, plain._replace(hpz=2)], 4)
    if isinstance(found, str):
        print(f"hpZ {plain.dtype}: FAILED: {found}", flush=True)
        return True
    same = found[0][:5] == found[1][:5]
    counts = [dict(sorted(one.gathered.items())) for one in found]
    print(f"hpZ {plain.dtype}: same bits: {same}; bytes gathered by ranks of the group: {counts[0]} -> {counts[1]}")
    return not same


def _name(setting: cases.Setting) -> str:
    reduced = "" if setting.reduce_dtype == "float32" else f", reduce_dtype {setting.reduce_dtype}"
    return f"stage {setting.stage}, {setting.dtype}, offload {setting.offload}{reduced}"


if __name__ == "__main__":
    sys.exit(main())
