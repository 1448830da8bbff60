"""What sequence-parallel attention sends, balances, rounds and costs:  python tools/bench_attention.py bytes|balance|error|overhead [--quick]

Figures last, one a line as ``name: value``; exits with 1 where a bound is missed. Each command is a module of tools/benches.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

if __name__ == "__main__":
    from benches.figures import main

    sys.exit(main(__doc__, "attention", ("bytes", "balance", "error", "overhead")))
