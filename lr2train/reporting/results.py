"""Report sections on results: headline, comparison, needle maps, sample, export, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from lr2train.reporting.heatmap import gradient, heatmap
from lr2train.reporting.inputs import Json, ReportInputs
from lr2train.reporting.numbers import amount, context_length, count, duration, perplexity
from lr2train.reporting.page import Missing, card, change, facts, fold, heading, table, text
from lr2train.reporting.population import candidates, winner

MEASURES = (
    (
        "accuracy",
        "Needle accuracy",
        "share of documents that greedy decoding answers exactly; higher is better",
        max,
    ),
    ("answer_perplexity", "Answer perplexity", "over the answer's tokens; 1 is certainty, lower is better", min),
    ("text_perplexity", "Text perplexity", "over every token of held-out documents; lower is better", min),
)
SHOWN_CHARACTERS = 1200  # the end of a prompt


def before_and_after(evaluation: Json) -> tuple[Json, Json]:
    """The first row (the untrained model, where evaluated) and the last row (the trained model)."""
    return evaluation["rows"][0], evaluation["rows"][-1]


def at_length(row: Json, length: int) -> Json:
    """A row's figures at one length."""
    return next(cell for cell in row["by_length"] if cell["length_tokens"] == length)


def header(inputs: ReportInputs) -> str:
    """Title, lead sentence and headline figures."""
    windows = _windows(inputs)
    title = (
        f"{windows[0]:,} → {windows[1]:,} tokens"
        if windows and windows[1] > windows[0]
        else inputs.folder.resolve().name
    )
    cards = [*_improvements(inputs), *_facts(inputs)]
    return (
        f'<p class="eyebrow">lr2train · {text(inputs.folder.resolve().name)}</p><h1>{text(title)}</h1><p '
        f'class="lead">{_sentence(inputs)}</p>'
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _windows(inputs: ReportInputs) -> tuple[int, int] | None:
    if inputs.factors:
        return inputs.factors.spectrum.window_tokens, inputs.factors.target_window_tokens
    if inputs.evaluation:
        return inputs.evaluation["original_window_tokens"], inputs.evaluation["target_window_tokens"]
    return None


def _sentence(inputs: ReportInputs) -> str:
    model = _model(inputs)
    parts = [f"<strong>{text(model)}</strong>"] if model else []
    if inputs.factors and inputs.factors.scale > 1:
        parts.append(
            f"extended {inputs.factors.scale:g} times by <strong>{text(inputs.factors.method)}</strong> factors"
        )
    if inputs.train:
        parts.append(
            f"trained for {inputs.train['steps']:,} steps on {amount(inputs.train['tokens_seen'], 3)} tokens in "
            f"{duration(inputs.train['seconds'])} on {count(inputs.train['world'], 'rank')}"
        )
    elif inputs.metrics:
        parts.append(f"{'in training' if parts else 'In training'}, step {inputs.metrics[-1]['step']:,} reached")
    if not inputs.train and not inputs.metrics and inputs.generations:
        parts.append(_searched(inputs))
    sentence = ", ".join(parts) + "." if parts else "Nothing has been recorded here yet."
    return sentence[0].upper() + sentence[1:]


def _searched(inputs: ReportInputs) -> str:
    """The lead sentence about a search without training."""
    last, settings = inputs.generations[-1], inputs.search_settings
    if inputs.search is None:
        total = f" of {text(settings['generations'])}" if "generations" in settings else ""
        return f"in search, generation {last['generation']}{total} reached"
    took = f" in {duration(inputs.search['seconds'])}" if "seconds" in inputs.search else ""
    return f"found in {last['generation']} generations of {len(last['perplexities'])} candidates{took}, not trained yet"


def _model(inputs: ReportInputs) -> str:
    base = (inputs.train or {}).get("base")
    config = inputs.model
    name = Path(base).parent.name + "/" + Path(base).name if base else ""
    if not config:
        return name
    size = _parameters(inputs.model_folder) if inputs.model_folder else ""
    kind = (config.get("architectures") or [config.get("model_type", "model")])[0]
    return (
        (f"{name}: " if name else "")
        + f"{kind}, {config.get('num_hidden_layers', '?')} layers"
        + (f", {size}" if size else "")
    )


def _parameters(folder: Path) -> str:
    """Parameter count from the headers of the safetensors files; empty where the folder has none."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            # safetensors: 8 bytes of length, then a JSON header {tensor: {shape, …}}, then the data
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return f"{amount(count, 3)} parameters" if count else ""


def _improvements(inputs: ReportInputs) -> list[str]:
    if not inputs.needles:
        return []
    evaluation = inputs.needles
    before, after = before_and_after(evaluation)
    target, original = max(evaluation["lengths_tokens"]), evaluation["original_window_tokens"]
    short = max((length for length in evaluation["lengths_tokens"] if length <= original), default=None)
    old, new = at_length(before, target), at_length(after, target)
    note = f"{text(before['label'])} → {text(after['label'])}"
    value = change(f"{old['accuracy']:.0%}", f"{new['accuracy']:.0%}")
    cards = [card(f"Needle accuracy at {target:,} tokens", value, note, hero=True, extra=_bars(evaluation, target))]
    cards.append(
        card(
            f"Text perplexity at {context_length(target)}",
            change(perplexity(old["text_perplexity"]), perplexity(new["text_perplexity"])),
            "held-out text, long window",
        )
    )
    if short:
        old, new = at_length(before, short), at_length(after, short)
        cards.append(
            card(
                f"Kept at {context_length(short)}",
                change(perplexity(old["text_perplexity"]), perplexity(new["text_perplexity"])),
                f"text perplexity in the original window; needles {old['accuracy']:.0%} → {new['accuracy']:.0%}",
            )
        )
    return cards


def _bars(evaluation: Json, target: int) -> str:
    """Accuracy of every row at the target length, as bars."""
    rows = [(row["label"], at_length(row, target)["accuracy"]) for row in evaluation["rows"]]
    lines = "".join(
        f'<span>{text(label)}</span><i><b style="width:{100 * share:.1f}%"></b></i><span>{share:.0%}</span>'
        for label, share in rows
    )
    return f'<div class="bars">{lines}</div>'


def _facts(inputs: ReportInputs) -> list[str]:
    cards = []
    if len(inputs.generations) > 1:
        first, last = (inputs.generations[i]["best_perplexity"] for i in (0, -1))
        note = f"best of generation 0 → {inputs.generations[-1]['generation']}, before any training"
        alone = not inputs.needles and not inputs.metrics
        cards.append(
            card(
                f"Search: {inputs.objective} perplexity",
                change(perplexity(first), perplexity(last)),
                note,
                hero=alone,
                long=True,
            )
        )
        cards += _winner(inputs) if alone else []
    if inputs.metrics:
        losses = [line["loss"] for line in inputs.metrics]
        cards.append(
            card(
                "Training loss",
                change(perplexity(losses[0]), perplexity(losses[-1])),
                f"nats per target token, step {inputs.metrics[0]['step']} → {inputs.metrics[-1]['step']:,}",
            )
        )
    return cards


def _winner(inputs: ReportInputs) -> list[str]:
    """Cards of a search without training: winner and cost."""
    factor, _, index = winner(inputs.generations, inputs.search)
    cards = [card("Attention factor", f"{factor:g}", "of the best candidate, in the long window")]
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
        card(
            "Candidates",
            f"{len(every):,}",
            "all scored on every document" if not dropped else f"{dropped:,} dropped early",
        )
    )
    cards.append(
        card(
            "Document-forwards",
            f"{inputs.generations[-1]['document_forwards']:,}",
            "each scores one candidate on one document",
        )
    )
    return cards


def comparison(inputs: ReportInputs) -> str | Missing:
    """Every row of the evaluation by length, one table per measure."""
    if not inputs.needles:
        return Missing(
            "The trained model has not been compared with other methods.",
            f"lr2train evaluate run={inputs.folder.resolve().name}",
        )
    tables = "".join(_table(inputs.needles, *measure) for measure in MEASURES)
    sentence = (
        "Untrained rows are the base model under each method's factors; the last row is the trained model. "
        f"Lengths up to {inputs.needles['original_window_tokens']:,} tokens lie in the original window. The best "
        "figure "
        "of each column is green."
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
    return table(
        f"{name} <span>{what}</span>", ["", *(f"{length:,}" for length in lengths), "attention factor"], rows, last=True
    )


def _figure(value: float, best: float, key: str) -> str:
    shown = f"{value:.0%}" if key == "accuracy" else perplexity(value)
    bar = f'<span class="bar" style="width:{100 * value:.0f}%"></span>' if key == "accuracy" else ""
    return f"<td{' class=best' * (value == best)}>{shown}{bar}</td>"


def needles(inputs: ReportInputs) -> str | Missing:
    """A heat map per row of the evaluation; the trained model comes last."""
    if not inputs.needles:
        return Missing("Needles have not been evaluated.", f"lr2train evaluate run={inputs.folder.resolve().name}")
    rows = inputs.needles["rows"]
    panels = "".join(_panel(row, last=i == len(rows) - 1) for i, row in enumerate(rows))
    documents = max(cell["documents"] for row in rows for cell in row["cells"])
    sentence = (
        "A fact is hidden at some depth of a document (0 % is the beginning), and asked for at the end. "
        f"Numbers are percent of documents answered exactly; {documents} documents per cell."
    )
    scale = f'<div class="scale">0 %<i style="background:{gradient()}"></i>100 %</div>'
    return heading("Needles by length and depth", sentence) + scale + f'<div class="panels">{panels}</div>'


def _panel(row: Json, last: bool) -> str:
    mean = sum(cell["accuracy"] for cell in row["cells"]) / len(row["cells"])
    title = f"<h3>{text(row['label'])}<span>mean {mean:.0%}</span></h3>"
    return f"<figure{' class=last' * last}>{title}{heatmap(row['cells'])}</figure>"


def sample(inputs: ReportInputs) -> str | Missing:
    """A prompt and the generated text."""
    if not inputs.sample:
        return Missing(
            "No text has been generated.",
            f"lr2train generate run={inputs.folder.resolve().name} generate.prompt=…",
        )
    one = inputs.sample
    prompt, cut = one["prompt"][-SHOWN_CHARACTERS:], len(one["prompt"]) > SHOWN_CHARACTERS
    switch = (
        "; the original window at first, then the long window with a recomputed cache"
        if one["switched"]
        else f", {one['window']} window"
    )
    sentence = (
        f"{one['prompt_tokens']:,} tokens of prompt, {one['new_tokens']:,} new{text(switch)}; {one['seconds']:.1f} s."
    )
    return heading("Sample", sentence) + f"<pre>{'… ' * cut}{text(prompt)}<mark>{text(one['text'])}</mark></pre>"


def exported(inputs: ReportInputs) -> str | Missing:
    """The exported folder and the check of its logits."""
    if not inputs.export:
        return Missing(
            "The model has not been exported.",
            f"lr2train export run={inputs.folder.resolve().name}",
        )
    one = inputs.export
    pairs = [
        ("folder", f"<code>{text(one['folder'])}</code>"),
        ("size", f"{one['bytes'] / 1e6:,.1f} MB, {text(one['dtype'])}"),
    ]
    for name, folder in one.get("folders", {}).items():
        compared = [
            f"largest logit difference {folder[key]:.2e} in the {window} window"
            for window in ("short", "long")
            if (key := f"{window}_logit_difference") in folder
        ]
        said = "; ".join([f"{folder['window_tokens']:,} tokens", *(compared or ["not compared"])])
        pairs.append((f"<code>{text(name)}/</code>", said))
    sentence = (
        "transformers loaded each folder, and its logits were compared with lr2train's. long/ has one RoPE table for "
        "every length and the attention factor in its weights; short/ is the original window; two/ has both tables "
        "and is exact in both windows with trust_remote_code=True. The model card in each folder says what each "
        "runtime does with it."
    )
    return heading("Export", sentence) + facts(pairs)


def provenance(inputs: ReportInputs) -> str | Missing:
    """Commands, versions and configs of all runs involved."""
    if not inputs.origins:
        return Missing(
            "No verb has recorded its config.",
            f"lr2train train experiment=… name={inputs.folder.resolve().name}",
        )
    return heading(
        "Provenance", "Commands, code and configs. Configs are complete: the same command repeats the run."
    ) + "".join(_origin(*one) for one in inputs.origins)


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
        f"<strong>{text(verb)}</strong> <span>{text(folder)}</span>",
        facts(pairs) + f"<pre>{text(json.dumps(config, indent=1))}</pre>",
    )
