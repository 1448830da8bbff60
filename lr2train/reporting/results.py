"""Sections on what came out: headline, comparison, needle maps, sample, export."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from lr2train.reporting.heatmap import gradient, heatmap, short_count
from lr2train.reporting.inputs import Inputs, Json
from lr2train.reporting.page import Missing, card, change, count, facts, fold, heading, number, table, text
from lr2train.reporting.population import candidates, winner

MEASURES = (
    ("accuracy", "Needle accuracy", "share of documents whose answer greedy decoding says exactly; higher is better", max),
    ("answer_perplexity", "Answer perplexity", "over the answer's tokens; 1 is certain, lower is better", min),
    ("text_perplexity", "Text perplexity", "of held-out documents, every token; lower is better", min),
)
SHOWN_CHARACTERS = 1200  # of a prompt's end


def before_and_after(evaluation: Json) -> tuple[Json, Json]:
    """The first row (the model as it was, where that was evaluated) and the last (the trained one)."""
    return evaluation["rows"][0], evaluation["rows"][-1]


def at_length(row: Json, length: int) -> Json:
    """A row's figures at one length."""
    return next(cell for cell in row["by_length"] if cell["length_tokens"] == length)


def header(inputs: Inputs) -> str:
    """Title, one sentence, and the figures that matter."""
    windows = _windows(inputs)
    title = f"{windows[0]:,} → {windows[1]:,} tokens" if windows and windows[1] > windows[0] else inputs.folder.resolve().name
    cards = [*_improvements(inputs), *_facts(inputs)]
    return (
        f'<p class="eyebrow">lr2train · {text(inputs.folder.resolve().name)}</p><h1>{text(title)}</h1><p '
        f'class="lead">{_sentence(inputs)}</p>'
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _windows(inputs: Inputs) -> tuple[int, int] | None:
    if inputs.factors:
        return inputs.factors.spectrum.window_tokens, inputs.factors.target_window_tokens
    if inputs.evaluation:
        return inputs.evaluation["original_window_tokens"], inputs.evaluation["target_window_tokens"]
    return None


def _sentence(inputs: Inputs) -> str:
    model = _model(inputs)
    parts = [f"<strong>{text(model)}</strong>"] if model else []
    if inputs.factors and inputs.factors.scale > 1:
        parts.append(f"extended {inputs.factors.scale:g} times by <strong>{text(inputs.factors.method)}</strong> factors")
    if inputs.train:
        parts.append(
            f"trained for {inputs.train['steps']:,} steps on {_tokens(inputs.train['tokens_seen'])} tokens in "
            f"{_duration(inputs.train['seconds'])} on {count(inputs.train['world'], 'rank')}"
        )
    elif inputs.metrics:
        parts.append(f"{'in training' if parts else 'In training'}, step {inputs.metrics[-1]['step']:,} reached")
    if not inputs.train and not inputs.metrics and inputs.generations:
        parts.append(_searched(inputs))
    sentence = ", ".join(parts) + "." if parts else "Nothing has been recorded here yet."
    return sentence[0].upper() + sentence[1:]


def _searched(inputs: Inputs) -> str:
    """What a page about a search alone says of it."""
    last, knobs = inputs.generations[-1], inputs.search_settings
    if inputs.search is None:
        total = f" of {text(knobs['generations'])}" if "generations" in knobs else ""
        return f"in search, generation {last['generation']}{total} reached"
    took = f" in {_duration(inputs.search['seconds'])}" if "seconds" in inputs.search else ""
    return f"found in {last['generation']} generations of {len(last['perplexities'])} candidates{took}, not trained yet"


def _model(inputs: Inputs) -> str:
    base = (inputs.train or {}).get("base")
    config = inputs.model
    name = Path(base).parent.name + "/" + Path(base).name if base else ""
    if not config:
        return name
    size = _parameters(inputs.model_folder) if inputs.model_folder else ""
    kind = (config.get("architectures") or [config.get("model_type", "model")])[0]
    return (f"{name}: " if name else "") + f"{kind}, {config.get('num_hidden_layers', '?')} layers" + (f", {size}" if size else "")


def _parameters(folder: Path) -> str:
    """Counted in the headers of the safetensors files; empty where there are none."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return f"{_tokens(count)} parameters" if count else ""


def _improvements(inputs: Inputs) -> list[str]:
    if not inputs.evaluation:
        return []
    evaluation = inputs.evaluation
    before, after = before_and_after(evaluation)
    target, original = max(evaluation["lengths_tokens"]), evaluation["original_window_tokens"]
    short = max((length for length in evaluation["lengths_tokens"] if length <= original), default=None)
    old, new = at_length(before, target), at_length(after, target)
    note = f"{text(before['label'])} → {text(after['label'])}"
    value = change(f"{old['accuracy']:.0%}", f"{new['accuracy']:.0%}")
    cards = [card(f"Needle accuracy at {target:,} tokens", value, note, hero=True, extra=_bars(evaluation, target))]
    cards.append(
        card(
            f"Text perplexity at {short_count(target)}",
            change(number(old["text_perplexity"]), number(new["text_perplexity"])),
            "held-out text, long window",
        )
    )
    if short:
        old, new = at_length(before, short), at_length(after, short)
        cards.append(
            card(
                f"Kept at {short_count(short)}",
                change(number(old["text_perplexity"]), number(new["text_perplexity"])),
                f"text perplexity in the original window; needles {old['accuracy']:.0%} → {new['accuracy']:.0%}",
            )
        )
    return cards


def _bars(evaluation: Json, target: int) -> str:
    """Every row's accuracy at the target length as a bar."""
    rows = [(row["label"], at_length(row, target)["accuracy"]) for row in evaluation["rows"]]
    lines = "".join(
        f'<span>{text(label)}</span><i><b style="width:{100 * share:.1f}%"></b></i><span>{share:.0%}</span>' for label, share in rows
    )
    return f'<div class="bars">{lines}</div>'


def _facts(inputs: Inputs) -> list[str]:
    cards = []
    if len(inputs.generations) > 1:
        first, last = (inputs.generations[i]["best_perplexity"] for i in (0, -1))
        note = f"best of generation 0 → {inputs.generations[-1]['generation']}, before any training"
        alone = not inputs.evaluation and not inputs.metrics
        cards.append(card(f"Search: {inputs.objective} perplexity", change(number(first), number(last)), note, hero=alone, long=True))
        cards += _winner(inputs) if alone else []
    if inputs.metrics:
        losses = [line["loss"] for line in inputs.metrics]
        cards.append(
            card(
                "Training loss",
                change(number(losses[0]), number(losses[-1])),
                f"nats per target token, step {inputs.metrics[0]['step']} → {inputs.metrics[-1]['step']:,}",
            )
        )
    return cards


def _winner(inputs: Inputs) -> list[str]:
    """Of a search alone: what was found, and at what cost."""
    factor, _, index = winner(inputs.generations, inputs.search)
    cards = [card("Attention factor", f"{factor:g}", "of the long window, where the best candidate has it")]
    if inputs.has_border:
        spectrum = inputs.factors.spectrum if inputs.factors else None
        note = (
            f"searched from d10 = {spectrum.lowest_critical_index} to tcd = {spectrum.critical_index}"
            if spectrum
            else "of the best candidate"
        )
        cards.append(card("Critical index rcd", str(index), note))
    every = candidates(inputs.generations)
    dropped = len(every) - int(every.complete.sum())
    cards.append(
        card("Candidates", f"{len(every):,}", "all scored on every document" if not dropped else f"{dropped:,} of them dropped early")
    )
    cards.append(card("Document-forwards", f"{inputs.generations[-1]['document_forwards']:,}", "one candidate on one document each"))
    return cards


def comparison(inputs: Inputs) -> str | Missing:
    """Every row of the evaluation by length, one table a measure."""
    if not inputs.evaluation:
        return Missing(
            "How the trained model compares with other methods is not measured yet.",
            f"python -m lr2train.evaluate run={inputs.folder.resolve().name}",
        )
    tables = "".join(_table(inputs.evaluation, *measure) for measure in MEASURES)
    sentence = (
        "The untrained rows are the model before training under each method's factors; the last row is the trained one. "
        f"Lengths up to {inputs.evaluation['original_window_tokens']:,} tokens lie in the original window. The best of each "
        "column is green."
    )
    return heading("Comparison", sentence) + tables


def _table(evaluation: Json, key: str, name: str, what: str, better: Callable[..., float]) -> str:
    lengths = evaluation["lengths_tokens"]
    best = {length: better(at_length(row, length)[key] for row in evaluation["rows"]) for length in lengths}
    rows = [
        [
            text(row["label"]),
            *(_figure(at_length(row, length)[key], best[length], key) for length in lengths),
            f"{row['attention_factor']:.3f}",
        ]
        for row in evaluation["rows"]
    ]
    return table(f"{name} <span>{what}</span>", ["", *(f"{length:,}" for length in lengths), "attention factor"], rows, last=True)


def _figure(value: float, best: float, key: str) -> str:
    shown = f"{value:.0%}" if key == "accuracy" else number(value)
    bar = f'<span class="bar" style="width:{100 * value:.0f}%"></span>' if key == "accuracy" else ""
    return f"<td{' class=best' * (value == best)}>{shown}{bar}</td>"


def needles(inputs: Inputs) -> str | Missing:
    """A heat map a row, the trained model's last."""
    if not inputs.evaluation:
        return Missing("No needle was hidden yet.", f"python -m lr2train.evaluate run={inputs.folder.resolve().name}")
    rows = inputs.evaluation["rows"]
    panels = "".join(_panel(row, last=i == len(rows) - 1) for i, row in enumerate(rows))
    documents = max(cell["documents"] for row in rows for cell in row["cells"])
    sentence = (
        f"A fact is hidden at a depth of a document (0 % is its beginning) and asked for at its end; {documents} documents a cell. "
        "Numbers are percent answered exactly."
    )
    scale = f'<div class="scale">0 %<i style="background:{gradient()}"></i>100 %</div>'
    return heading("Needles by length and depth", sentence) + scale + f'<div class="panels">{panels}</div>'


def _panel(row: Json, last: bool) -> str:
    mean = sum(cell["accuracy"] for cell in row["cells"]) / len(row["cells"])
    return f"<figure{' class=last' * last}><h3>{text(row['label'])}<span>mean {mean:.0%}</span></h3>{heatmap(row['cells'])}</figure>"


def sample(inputs: Inputs) -> str | Missing:
    """What the model wrote."""
    if not inputs.sample:
        return Missing("No text was generated yet.", f"python -m lr2train.generate run={inputs.folder.resolve().name} generate.prompt=…")
    one = inputs.sample
    prompt, cut = one["prompt"][-SHOWN_CHARACTERS:], len(one["prompt"]) > SHOWN_CHARACTERS
    switch = (
        ", the original window until the text outgrew it, then the long one with a cache computed anew"
        if one["switched"]
        else f", {one['window']} window"
    )
    sentence = f"{one['prompt_tokens']:,} tokens of prompt, {one['new_tokens']:,} new{text(switch)}; {one['seconds']:.1f} s."
    return heading("Sample", sentence) + f"<pre>{'… ' * cut}{text(prompt)}<mark>{text(one['text'])}</mark></pre>"


def exported(inputs: Inputs) -> str | Missing:
    """The exported folder and its check."""
    if not inputs.export:
        return Missing("There is no folder for other runtimes yet.", f"python -m lr2train.export run={inputs.folder.resolve().name}")
    one = inputs.export
    pairs = [("folder", f"<code>{text(one['folder'])}</code>"), ("size", f"{one['bytes'] / 1e6:,.1f} MB, {text(one['dtype'])}")]
    for window in ("long", "short"):
        pairs.append((f"{window} window", f"largest logit difference {one[f'{window}_logit_difference']:.2e}"))
    sentence = (
        "The folder was loaded again with plain transformers and its logits compared with ours. Its format has one attention "
        "factor for both windows, so with a factor "
        "other than 1 the short window differs there by design; the model card says how to serve it."
    )
    return heading("Export", sentence) + facts(pairs)


def provenance(inputs: Inputs) -> str | Missing:
    """Commands, versions and configs of every run that took part."""
    if not inputs.origins:
        return Missing(
            "No verb has recorded its config here.",
            f"python -m lr2train.train experiment=… name={inputs.folder.resolve().name}",
        )
    return heading("Provenance", "What was run, with which code. Every config is complete: the same command makes the same run.") + "".join(
        _origin(*one) for one in inputs.origins
    )


def _origin(folder: Path, verb: str, config: Json, record: Json) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())
    pairs = [
        ("command", f"<code>{text(' '.join(record.get('command', [])))}</code>"),
        ("time", text(record.get("time", "?"))),
        ("host", f"{text(record.get('host', '?'))}, {count(record.get('world', 1), 'rank')}"),
        ("code", f"<code>{text(record.get('commit') or 'no commit')}</code>"),
        ("versions", text(f"python {record.get('python', '?')}, {versions}")),
    ]
    return fold(
        f"<strong>{text(verb)}</strong> <span>{text(folder)}</span>", facts(pairs) + f"<pre>{text(json.dumps(config, indent=1))}</pre>"
    )


def _tokens(value: float) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:g}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
