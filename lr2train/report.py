"""report: one HTML page about a run, or a comparison of runs: results, factors, search, training, corpus, commands.

    lr2train report runs/first [runs/factors runs/corpus] [--out page.html]      one run, with its search and corpus
    lr2train report runs/first runs/second [--out page.html]                     a comparison

The page is one file: no network, no scripts, pictures inside. The search, corpus and base run of ``runs/first`` are
found by the paths that it recorded; a given search or corpus replaces them. ``report_files/`` beside the page holds
each picture as PNG and its numbers as CSV, and each table as CSV. A comparison also prints its needle tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lr2train import io, progress
from lr2train.cli.door import door
from lr2train.evaluation.tables import needle_tables, trained_difference
from lr2train.reporting import results
from lr2train.reporting.canvas import Chart, csv_of
from lr2train.reporting.inputs import gather_all
from lr2train.reporting.page import render
from lr2train.reporting.pictures import all_charts


@dataclass(frozen=True)
class Composed:
    """A page as HTML, with its drawings by name and its tables by section; ``text`` is what a comparison prints."""

    page: str
    text: str
    charts: dict[str, Chart]
    sheets: dict[str, list[Any]]
    compares: bool


def compose(folders: Sequence[Path]) -> Composed:
    """Read the runs and make the page, without writing anything.

    Args:
        folders: the runs, and related runs that replace those they recorded.

    Raises:
        UserError: a folder is missing or one of its files is damaged.
    """
    runs = gather_all(folders)
    evaluation = results.evaluation_of(runs)
    sheets = results.all_sheets(runs, evaluation)
    charts = all_charts(runs, evaluation["rows"] if evaluation else [])
    models = evaluation["rows"] if evaluation else []
    text = "\n\n".join([*(table.text() for table in needle_tables(models)), trained_difference(models)]).strip()
    return Composed(render(runs, evaluation, charts, sheets), text, charts, sheets, len(runs) > 1)


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about ``folders``, its pictures and tables, and report.json into the first folder.

    Args:
        folders: as for ``compose``.
        out: the page; None writes ``report.html``, or ``comparison.html`` of several runs, into the first run.

    Returns:
        The path of the page.
    """
    made = compose(folders)
    page = out or folders[0] / ("comparison.html" if made.compares else "report.html")
    io.write_text(page, made.page)
    beside = pictures_of(page)
    for name, chart in made.charts.items():
        chart.write(beside / name)
    for sheet in results.flat(made.sheets):
        io.write_text(beside / f"{sheet.name}.csv", csv_of(sheet.head, sheet.rows))
    values = {"page": str(page), "folders": [str(folder) for folder in folders], "bytes": page.stat().st_size}
    io.write_json(folders[0] / "report.json", {**values, "pictures": sorted(made.charts)})
    if made.compares and made.text:
        print(made.text)
    return page


def pictures_of(page: Path) -> Path:
    """The folder beside a page for its pictures and tables."""
    return page.with_name(f"{page.stem}_files")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exit codes as in ``lr2train.cli.door``."""
    parser = argparse.ArgumentParser(prog="lr2train report", description="One HTML page about runs, in one file.")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="runs/NAME",
        help="the run, or the runs to compare; also a search or corpus that a run did not record",
    )
    parser.add_argument("--out", type=Path, help="path of the page (default: report.html in the first folder)")
    given = parser.parse_args(arguments)
    with door("report"):
        path = report([folder.expanduser() for folder in given.folders], given.out and given.out.expanduser())
        size = f"{path.stat().st_size / 1024:.0f} KiB"
        progress.say("report", f"{path} ({size}); pictures and tables in {pictures_of(path)}/")


if __name__ == "__main__":
    main()
