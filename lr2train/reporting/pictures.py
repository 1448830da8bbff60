"""Every drawing of a page by its name, and the pictures that search, prepare and rehearse write.

Choice: a name is the file name of the picture and of its numbers (``fitness.png``, ``fitness.csv``), whichever verb
writes them. A drawing whose data is missing is left out: a running search has no factors yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lr2train.config import UserError
from lr2train.evaluation.results import folder_name
from lr2train.io import read_json
from lr2train.reporting import charts, memory, mix, search_charts
from lr2train.reporting.canvas import Chart
from lr2train.reporting.inputs import Json, ReportInputs, gather
from lr2train.reporting.needle_map import needle_map

METRICS = {  # key of metrics.jsonl -> label of the axis
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens / s",
    "mfu": "model FLOPs utilisation",
}
MIX = ("lengths", "mix", "segments")


def all_charts(runs: Sequence[ReportInputs], rows: Sequence[Json]) -> dict[str, Chart]:
    """Every drawing of a page: one run whole, of several runs those that compare.

    Args:
        runs: the first names the window and the critical index.
        rows: of the needle comparison.
    """
    first = runs[0]
    made = {f"needles_{folder_name(row['label'])}": needle_map([row]) for row in rows}
    made |= _factors(runs) | _searches(runs) | _training(runs)
    if len(runs) == 1 and first.base:
        lines = {"the base model": (first.base.metrics, first.base.held_out)}
        made |= {"base_loss": charts.loss_by_window(lines)}
    if len(runs) == 1 and first.corpus_folder:
        plan, config = first.corpus_folder / "plan.json", first.config or first.corpus_config
        attention = config.get("data", {}).get("long_attention", "segment")
        made |= mix.corpus_charts(first.corpus_folder, read_json(plan) if plan.is_file() else None, attention)
    return made | (memory.rehearsal_chart(first.folder) if len(runs) == 1 else {})


def _factors(runs: Sequence[ReportInputs]) -> dict[str, Chart]:
    made = {run.name: run.factors for run in runs if run.factors and run.factors.scale > 1}
    if not made:
        return {}
    first = next(run for run in runs if run.name in made)
    index = first.critical_index if len(made) == 1 else None
    return {
        "factors": charts.factor_curves(made, index),
        "periods": charts.periods(made, index),
        "cosines": charts.cosines(made[first.name], index),
    }


def _searches(runs: Sequence[ReportInputs]) -> dict[str, Chart]:
    found = {run.search_folder.resolve(): run for run in runs if run.search_folder and run.generations}
    if not found:
        return {}
    first = next(iter(found.values()))
    lines, of = first.generations, first.objective  # perplexities of another objective do not compare
    searched = {run.name: run.generations for run in found.values() if run.objective == of}
    made = {"fitness": search_charts.search_progress(searched, of)}
    if len(runs) > 1:
        return made
    if first.has_border:
        spectrum = first.factors.spectrum if first.factors else None
        made["rcd"] = search_charts.critical_indices(lines, first.search, spectrum)
    made["temperature"] = search_charts.attention_factors(lines, first.search, of)
    return made | ({"documents": search_charts.documents(first.journal)} if first.journal else {})


def _training(runs: Sequence[ReportInputs]) -> dict[str, Chart]:
    trained = {run.name: run for run in runs if run.metrics}
    if not trained:
        return {}
    made = {"loss": charts.loss_by_window({name: (run.metrics, run.held_out) for name, run in trained.items()})}
    for key, label in METRICS.items():
        if key == "lr" and len(trained) > 1:  # a setting, which the page lists where runs differ
            continue
        lines = {name: run.metrics for name, run in trained.items()}
        if any(line.get(key) is not None for every in lines.values() for line in every):
            made[key] = charts.metric(lines, key, label)
    return made


def write_search_pictures(folder: Path) -> list[Path]:
    """Draw a search into ``folder/pictures``, finished or running; returns the pictures and their numbers.

    Raises:
        UserError: the folder is missing, holds no generation, or holds a damaged file.
    """
    run = gather(folder)
    if not run.generations or run.search_folder != folder:
        raise UserError(
            f"{folder} holds no generations.jsonl of a search; name the run folder of a search, such as runs/factors"
        )
    return _write(_searches([run]) | (_factors([run]) if run.search else {}), folder / "pictures")


def ensure_mix_pictures(folder: Path) -> list[Path]:
    """Draw a corpus's ``plan.json`` into ``folder/pictures``, unless all pictures are newer than the file."""
    paths = [folder / "pictures" / f"{name}.png" for name in MIX]
    planned = (folder / "plan.json").stat().st_mtime
    if not all(path.exists() and path.stat().st_mtime >= planned for path in paths):
        made = mix.corpus_charts(folder, read_json(folder / "plan.json"))
        _write({name: made[name] for name in MIX}, folder / "pictures")
    return paths


def write_memory_picture(folder: Path) -> list[Path]:
    """Draw the rehearsal of a run folder into ``folder/pictures``; returns the picture and its numbers."""
    return _write(memory.rehearsal_chart(folder), folder / "pictures")


def _write(drawings: Mapping[str, Chart], folder: Path) -> list[Path]:
    return [path for name, drawing in drawings.items() for path in drawing.write(folder / name)]
