"""The figures of the LongRoPE2 paper (Shang et al., ICML 2025, arXiv 2502.20082): Tables 2, 4, 5, 6, 7 and 10.

RULER averages over 13 tasks at 4k, 8k, 16k, 32k, 64k, 128k, and averages of short benchmarks (Table 4) or MMLU (Table 7
and 10, where no average is printed). ``MODELS`` gives the order of the two base models.
"""

from __future__ import annotations

MODELS = ("LLaMA3-8B", "Phi3-mini")
RULER: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "yarn": ((91.86, 87.87, 84.67, 68.80, 62.51, 49.39), (85.74, 78.68, 75.97, 65.22, 52.16, 39.37)),
    "ntk": ((94.38, 92.64, 91.93, 87.33, 79.26, 73.19), (91.34, 87.02, 80.57, 72.81, 61.91, 49.37)),
    "longrope": ((94.60, 92.70, 91.01, 86.60, 81.23, 73.40), (88.40, 83.23, 79.46, 71.20, 64.63, 53.71)),
    "longrope2": ((94.61, 93.68, 92.31, 90.49, 85.62, 82.03), (90.41, 87.22, 83.33, 76.51, 65.37, 58.81)),
    "yarn_rcd": ((94.22, 92.02, 89.20, 82.56, 76.37, 71.46), (86.56, 77.66, 74.48, 67.73, 52.73, 44.39)),
    "ntk_rcd": ((94.39, 92.35, 91.43, 88.82, 83.22, 77.25), (90.51, 85.32, 81.80, 73.89, 63.59, 54.42)),
    "text": ((94.46, 93.36, 91.67, 90.28, 84.55, 78.68), (91.16, 87.93, 83.05, 75.27, 62.72, 50.23)),
    "longrope2_one_table": ((94.67, 93.15, 91.24, 89.38, 83.53, 80.18), (90.55, 85.77, 81.08, 73.31, 63.75, 56.22)),
    "all_dims": ((93.92, 92.61, 91.41, 89.30, 83.11, 78.07), (90.02, 87.21, 82.42, 74.86, 63.95, 57.34)),
}
"""Row -> RULER of each model."""

_SHORT = {  # MMLU, MMLU-Pro, HellaSwag, TruthfulQA, GSM8K (Table 4)
    "base": ((66.62, 35.87, 82.08, 44.04, 54.05), (70.78, 41.17, 77.96, 47.82, 78.54)),
    "yarn": ((62.25, 31.88, 81.25, 42.61, 42.45), (63.22, 30.95, 75.27, 42.19, 57.39)),
    "ntk": ((63.84, 34.14, 82.11, 43.45, 46.92), (66.43, 36.09, 76.92, 43.34, 63.99)),
    "longrope": ((64.69, 33.74, 82.14, 43.65, 48.90), (67.26, 36.28, 75.73, 46.26, 67.17)),
    "longrope2": ((65.01, 34.61, 81.69, 46.17, 50.80), (70.04, 40.30, 77.07, 47.61, 73.62)),
}
_THREE = {  # MMLU, MMLU-Pro, GSM8K (Tables 5, 7 and 10)
    "yarn_rcd": ((64.30, 33.17, 50.34), (62.30, 30.24, 56.48)),
    "ntk_rcd": ((64.70, 34.23, 45.87), (65.31, 35.09, 59.29)),
    "longrope2_one_table": ((64.57, 33.83, 48.37), (66.56, 34.86, 64.67)),
    "all_dims": ((64.34, 33.83, 51.55), (69.96, 39.84, 74.83)),
}


def kept(row: str, model: int, three: bool = False) -> float | None:
    """Percent of the base's short scores that a row keeps; None where the paper has no such figure.

    Args:
        row: a key of the tables.
        model: number in ``MODELS``.
        three: the mean over MMLU, MMLU-Pro and GSM8K, which Tables 5, 7 and 10 have, for every row. Otherwise the mean
            over Table 4's five benchmarks. The two do not compare.
    """
    places = (0, 1, 4) if three else (0, 1, 2, 3, 4)
    base = [_SHORT["base"][model][place] for place in places]
    if row in _THREE:
        return 100 * sum(_THREE[row][model]) / sum(base) if three else None
    return 100 * sum(_SHORT[row][model][place] for place in places) / sum(base) if row in _SHORT else None


def between(row: str, model: int) -> float | None:
    """Mean RULER over the lengths between the original window and 128k; None where the paper has none."""
    first = (2, 0)[model]  # LLaMA3-8B has a window of 8k, Phi3-mini of 2k
    return sum(RULER[row][model][first:5]) / (5 - first) if row in RULER else None


def longest(row: str, model: int) -> float | None:
    """RULER at 128k; None where the paper has none."""
    return RULER[row][model][-1] if row in RULER else None
