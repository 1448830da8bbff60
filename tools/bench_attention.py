"""What sequence-parallel attention sends, balances, rounds and costs:  python tools/bench_attention.py bytes|balance|error|overhead [--quick]

Figures last, one a line as ``name: value``; exits with 1 where a bound is missed. Each command is a module of tools/benches.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

COMMANDS = ("bytes", "balance", "error", "overhead")


def main() -> int:
    from benches.figures import conclude

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--quick", action="store_true", help="a smaller input, for a look; the bounds are meant for the whole one")
    arguments = parser.parse_args()
    return conclude(importlib.import_module(f"benches.attention_{arguments.command}").measure(arguments.quick))


if __name__ == "__main__":
    sys.exit(main())
