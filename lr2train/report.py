"""report: one HTML page about a run: results, factors, search, training, corpus, commands to repeat it.

    lr2train report runs/first [runs/factors runs/corpus …] [--out page.html]

The page is one file: no network, no scripts, pictures inside. The search, corpus and base run of ``runs/first`` are
found by the paths that it recorded; further folders replace them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from lr2train import io, progress
from lr2train.cli.door import door
from lr2train.reporting import benchmarks, making, results
from lr2train.reporting.inputs import ReportInputs, gather
from lr2train.reporting.page import Missing, page, text, wanting

SECTIONS = (
    ("comparison", "Comparison", results.comparison),
    ("needles", "Needles", results.needles),
    ("benchmarks", "Benchmarks", benchmarks.benchmarks),
    ("factors", "Factors", making.factors),
    ("search", "Search", making.search),
    ("training", "Training", making.training),
    ("corpus", "Corpus", making.corpus),
    ("sample", "Sample", results.sample),
    ("export", "Export", results.exported),
    ("provenance", "Provenance", results.provenance),
)


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about ``folders[0]``, and report.json into that folder; returns the path of the page.

    Args:
        folders: the run, then related runs that replace those it recorded.
        out: the page; None writes ``report.html`` into the run.

    Raises:
        UserError: a folder is missing or one of its files is damaged.
    """
    inputs = gather(folders)
    path = out or folders[0] / "report.html"
    io.write_text(path, render(inputs))
    io.write_json(
        folders[0] / "report.json",
        {"page": str(path), "folders": [str(folder) for folder in folders], "bytes": path.stat().st_size},
    )
    return path


def render(inputs: ReportInputs) -> str:
    """The page as HTML."""
    made = [(anchor, name, make(inputs)) for anchor, name, make in SECTIONS]
    sections = [(anchor, name, content) for anchor, name, content in made if isinstance(content, str)]
    left_out = [(name, content) for _, name, content in made if isinstance(content, Missing)]
    if left_out:
        sections.append(("missing", "Not here yet", wanting(left_out)))
    footer = f"lr2train report of <code>{text(inputs.folder)}</code>, written {time.strftime('%Y-%m-%d %H:%M')}."
    return page(f"{inputs.folder.resolve().name} · lr2train", results.header(inputs), sections, footer)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exit codes as in ``lr2train.cli.door``."""
    parser = argparse.ArgumentParser(prog="lr2train report", description="One HTML page about a run, in one file.")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="runs/NAME",
        help="the run, then its search, corpus or base run if the run did not record them",
    )
    parser.add_argument("--out", type=Path, help="path of the page (default: report.html in the first folder)")
    given = parser.parse_args(arguments)
    with door("report"):
        path = report([folder.expanduser() for folder in given.folders], given.out and given.out.expanduser())
        progress.say("report", f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
