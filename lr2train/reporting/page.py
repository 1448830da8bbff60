"""The page: ``page.html.j2`` filled with a run or a comparison of runs, in one file without scripts.

Choice: the template holds every sentence and all markup; this file hands it values and what is computed from them.
Jinja2 escapes all data; only drawings and
the style sheet are markup. Cost: the template cannot be type-checked; an unknown name in it is an
error at once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lr2train.evaluation.tables import trained_difference
from lr2train.reporting import numbers, results
from lr2train.reporting.canvas import Chart, style_sheet
from lr2train.reporting.inputs import HELD_OUT, Json, ReportInputs
from lr2train.reporting.population import candidates, winner

SHOWN_CHARACTERS = 1200  # the end of a prompt
FILTERS = ("count", "amount", "context_length", "perplexity", "duration", "percent")


def environment() -> Environment:
    """The templates of this package; every value is escaped."""
    made = Environment(
        loader=PackageLoader("lr2train.reporting", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {name: getattr(numbers, name) for name in FILTERS} | {
        "as_json": lambda one: json.dumps(one, indent=1)
    }
    return made


def render(
    runs: Sequence[ReportInputs], evaluation: Json | None, charts: Mapping[str, Chart], sheets: Mapping[str, Any]
) -> str:
    """The page as HTML.

    Args:
        runs: what the page is about; more than one is a comparison.
        evaluation: of all runs.
        charts: name -> drawing.
        sheets: section -> its tables.
    """
    run = runs[0]
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            style=Markup(style_sheet()),
            runs=runs,
            run=run,
            charts=charts,
            sheets=sheets,
            maps=[name for name in charts if name.startswith("needles_")],
            title=" · ".join(one.name for one in runs),
            windows=_windows(run, evaluation),
            model=_model(run),
            difference=trained_difference(evaluation["rows"]) if evaluation and len(runs) > 1 else "",
            headline=_headline(evaluation) if len(runs) == 1 else None,
            search=_search(run) if run.generations else None,
            training=[_training(one) for one in runs if one.metrics],
            cut=SHOWN_CHARACTERS,
            now=time.strftime("%Y-%m-%d %H:%M"),
        )
    )


def _windows(run: ReportInputs, evaluation: Json | None) -> tuple[int, int] | None:
    if run.factors:
        return run.factors.spectrum.window_tokens, run.factors.target_window_tokens
    return (evaluation["original_window_tokens"], evaluation["target_window_tokens"]) if evaluation else None


def _model(run: ReportInputs) -> str:
    """Name, architecture and size of a run's model."""
    base, config = (run.train or {}).get("base"), run.model
    name = f"{Path(base).parent.name}/{Path(base).name}" if base else ""
    if not config:
        return name
    kind = (config.get("architectures") or [config.get("model_type", "model")])[0]
    size = _parameters(run.model_folder) if run.model_folder else 0
    of_size = f", {numbers.amount(size, 3)} parameters" if size else ""
    return (f"{name}: " if name else "") + f"{kind}, {config.get('num_hidden_layers', '?')} layers{of_size}"


def _parameters(folder: Path) -> int:
    """Parameter count from the headers of the safetensors files."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            # safetensors: 8 bytes of length, then a JSON header {tensor: {shape, …}}, then the data
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _headline(evaluation: Json | None) -> Json | None:
    """The first row (the untrained model, where evaluated) and the last row (the trained model) at both windows."""
    if not evaluation or not evaluation["rows"]:
        return None
    rows = evaluation["rows"]
    lengths = sorted(set.intersection(*({one["length_tokens"] for one in row["by_length"]} for row in rows)))
    if not lengths:
        return None
    inside = [length for length in lengths if length <= evaluation["original_window_tokens"]]
    made = {
        name: {"length": length, "rows": [{"label": row["label"], **results.at_length(row, length)} for row in rows]}
        for name, length in (("target", lengths[-1]), *([("original", inside[-1])] if inside else []))
    }
    return {"original": None, **made}


def _search(run: ReportInputs) -> Json:
    lines, every = run.generations, candidates(run.generations)
    factor, _, index = winner(lines, run.search)
    return {
        "first": lines[0],
        "last": lines[-1],
        "winner": {"attention_factor": factor, "critical_index": index},
        "candidates": len(every),
        "dropped": len(every) - int(every.complete.sum()),
        "forwards": (run.search or {}).get("document_forwards", lines[-1]["document_forwards"]),
        "ranks": len({entry["rank"] for entry in run.journal}),
        "seconds": sum(entry["seconds"] for entry in run.journal) / max(len(run.journal), 1),
    }


def _training(run: ReportInputs) -> Json:
    lines, total = run.metrics, sum(line["step_s"] for line in run.metrics)
    held_out = {key: [line for line in run.held_out if key in line] for key in HELD_OUT}
    return {
        "run": run,
        "last": lines[-1],
        "losses": [line["loss"] for line in lines],
        "long": sum(line["window_mix"] for line in lines) / len(lines),
        "waited": sum(line.get("data_wait_s") or 0.0 for line in lines) / total if total else None,
        "held_out": [(key, name, every[0], every[-1]) for key, name in HELD_OUT.items() if (every := held_out[key])],
    }
