"""How fast and how exact the data path is:  python tools/bench_data.py plan|loader|tokenize|crash [--quick]

Figures last, one a line as ``name: value``; exits with 1 where a bound is missed. Each command is a module of tools/benches.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

if __name__ == "__main__":
    from benches.figures import main

    sys.exit(main(__doc__, "data", ("plan", "loader", "tokenize", "crash")))
