"""Sequence-parallel attention: bytes sent, balance over ranks, rounding error, step time, what recomputation costs and
saves, other libraries.

    python -m tools.bench.attention bytes|balance|error|overhead|recompute|others [--quick]

The last lines read ``name: value``. Exits with 1 where a bound is missed. Each command is a module of this folder.
"""

from __future__ import annotations

import sys

from tools.bench.figures import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "attention", ("bytes", "balance", "error", "overhead", "recompute", "others")))
