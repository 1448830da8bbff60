"""How fast and how exact the data path is:  python -m tools.bench.data plan|loader|tokenize [--quick]

Figures last, one a line as ``name: value``; exits with 1 where a bound is missed. Each command is a module of this folder.
"""

from __future__ import annotations

import sys

from tools.bench.figures import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "data", ("plan", "loader", "tokenize")))
