"""The data path: segment table at full size, loader throughput, tokenizer throughput.

    python -m tools.bench.data plan|loader|tokenize [--quick]

The last lines read ``name: value``. Exits with 1 where a bound is missed. Each command is a module of this folder.
"""

from __future__ import annotations

import sys

from tools.bench.figures import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "data", ("plan", "loader", "tokenize")))
