"""How fast and how exact the data path is:  python tools/bench_data.py plan|loader|tokenize|crash [--quick]

Figures last, one a line as ``name: value``; exits with 1 where a bound is missed. Each command is a module of tools/benches.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

COMMANDS = ("plan", "loader", "tokenize", "crash")


def main() -> int:
    from benches.figures import conclude

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--quick", action="store_true", help="a smaller input, for a look; the bounds are meant for the whole one")
    arguments = parser.parse_args()
    return conclude(importlib.import_module(f"benches.data_{arguments.command}").measure(arguments.quick))


if __name__ == "__main__":
    sys.exit(main())
