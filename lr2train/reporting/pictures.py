"""Pictures of a search as PNG files in its run folder: factors, fitness, critical indices, attention factor, documents.

Choice: the drawings are the report page's own. A picture whose data is missing is left out: a running search has no
factors yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lr2train.config import UserError
from lr2train.reporting import charts, search_charts
from lr2train.reporting.canvas import Chart, side_by_side
from lr2train.reporting.inputs import ReportInputs, gather

SIZE = (6.6, 4.0)  # inches


def write_search_pictures(folder: Path) -> list[Path]:
    """Draw a search into ``folder/pictures``; a failure leaves the former picture.

    Args:
        folder: run folder of a search, finished or running.

    Returns:
        The files written: factors.png (rescale factors, periods), fitness.png, rcd.png (not where every dimension was
        searched, which leaves no critical index), temperature.png, documents.png.

    Raises:
        UserError: the folder is missing, holds no generation, or holds a damaged file.
    """
    inputs = gather([folder])
    if not inputs.generations or inputs.search_folder != folder:
        raise UserError(
            f"{folder} holds no generations.jsonl of a search; name the run folder of a search, such as runs/factors"
        )
    return [side_by_side(drawn, folder / "pictures" / f"{name}.png", title) for name, title, drawn in _pictures(inputs)]


def _pictures(inputs: ReportInputs) -> Iterator[tuple[str, str, list[Chart]]]:
    """(file name, title, charts) of each picture."""
    lines, index, of = inputs.generations, inputs.critical_index, inputs.objective
    if inputs.factors and inputs.search:
        drawn = [charts.factor_curves(inputs.factors, index), charts.periods(inputs.factors, index)]
        yield "factors", "Rescale factors and rescaled periods", [_sized(drawn[0]), _sized(drawn[1], 0.9)]
    yield "fitness", f"{of.capitalize()} perplexity by generation", [_sized(search_charts.search_progress(lines, of))]
    if inputs.has_border:
        spectrum = inputs.factors.spectrum if inputs.factors else None
        drawn = [
            search_charts.critical_index_histogram(lines, inputs.search, inputs.top_k, spectrum),
            search_charts.critical_indices(lines, spectrum),
        ]
        yield "rcd", "Critical index", [_sized(drawn[0]), _sized(drawn[1], 0.8)]
    title = f"{of.capitalize()} perplexity by attention factor"
    yield "temperature", title, [_sized(search_charts.attention_factors(lines, inputs.search, of))]
    if inputs.journal:
        yield "documents", "Loss by document", [_sized(search_charts.documents(inputs.journal))]


def _sized(chart: Chart, share: float = 1.0) -> Chart:
    return replace(chart, size=(share * SIZE[0], SIZE[1]))
