"""The pictures of README.md, drawn from a finished run with its corpus and search:

    python -m tools.pictures runs/tiny_4k [--out docs/pictures]

Writes ``pipeline`` and ``needles`` as SVG, each in light and dark. The same run gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lr2train.cli.door import door
from lr2train.reporting import overview
from lr2train.reporting.inputs import gather


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description="The pictures of README.md.")
    words = "a trained and evaluated run, such as runs/tiny_4k; then its corpus and search where they were moved"
    parser.add_argument("runs", nargs="+", type=Path, help=words)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder (default: %(default)s)")
    given = parser.parse_args()
    with door("pictures"):
        for path in overview.write(overview.overview(gather(given.runs[0], given.runs[1:])), given.out):
            print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
