"""HTML by hand: a page without scripts and without anything from elsewhere, light or dark as the reader's system is.

Choice: small functions that return strings. Whatever comes from data passes through ``text``; only this package's own markup does not.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --paper:#faf9f6; --card:#ffffff; --ink:#1d1f24; --muted:#666b76; --line:#e3e1da; --soft:#f1efe9; --accent:#0b62a8; --good:#00734f;
  --s0:#0072b2; --s1:#d55e00; --s2:#009e73; --s3:#b4568f; --s4:#8a6d00; --s5:#767b86; }
@media (prefers-color-scheme: dark) { :root { --paper:#131519; --card:#1b1e24; --ink:#e9e8e4; --muted:#9aa0ab; --line:#31353e; --soft:#242830; --accent:#6db7f0; --good:#4fcf9f;
  --s0:#56b4e9; --s1:#f2934b; --s2:#35c79b; --s3:#dd8fc0; --s4:#e0c341; --s5:#9298a3; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.4rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; font-variant-numeric: tabular-nums; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
header { padding-top: clamp(1.8rem, 6vw, 4rem); }
h1 { font-size: clamp(1.9rem, 5vw, 3rem); line-height: 1.08; letter-spacing: -.028em; margin: .15rem 0 .7rem; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; letter-spacing: -.015em; line-height: 1.2; margin: 0 0 .35rem; }
h3 { font-size: .95rem; margin: 1.6rem 0 .5rem; }
p { margin: .3rem 0 .9rem; max-width: 72ch; }
a { color: var(--accent); }
code, pre { font: .84em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { background: var(--soft); border-radius: 4px; padding: .1em .35em; overflow-wrap: anywhere; }
pre { background: var(--soft); border-radius: 8px; padding: .9rem 1rem; overflow: auto; max-height: 28rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
.eyebrow { color: var(--accent); font-size: .76rem; font-weight: 650; letter-spacing: .09em; text-transform: uppercase; margin: 0; }
.lead { font-size: 1.12rem; color: var(--muted); max-width: 64ch; }
.lead strong { color: var(--ink); font-weight: 620; }
nav { position: sticky; top: 0; z-index: 2; background: color-mix(in srgb, var(--paper) 92%, transparent); backdrop-filter: blur(6px); border-bottom: 1px solid var(--line); margin-top: 1.6rem; }
nav div { max-width: 1120px; margin: 0 auto; padding: .55rem clamp(1rem, 4vw, 2.5rem); display: flex; gap: 1.15rem; overflow-x: auto; scrollbar-width: none; }
nav a { color: var(--muted); font-size: .86rem; text-decoration: none; white-space: nowrap; }
nav a:hover { color: var(--accent); }
section { padding: 2.2rem 0 .4rem; }
.sub { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: .8rem; margin: 1.4rem 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .95rem 1.1rem; }
.card .name { font-size: .8rem; color: var(--muted); }
.card .value { font-size: 1.75rem; line-height: 1.2; font-weight: 640; letter-spacing: -.025em; margin: .2rem 0; }
.card .note { font-size: .8rem; color: var(--muted); line-height: 1.4; }
.card.hero { grid-column: span 2; border-color: color-mix(in srgb, var(--accent) 45%, var(--line)); }
.card.hero .value { font-size: clamp(2.1rem, 6vw, 3rem); }
.arrow { color: var(--muted); font-weight: 400; padding: 0 .12em; } .after { color: var(--good); }
.steps { display: flex; height: .5rem; border-radius: 4px; background: var(--soft); overflow: hidden; margin: .35rem 0 .55rem; }
.steps i { display: block; height: 100%; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem; margin: .8rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1rem .8rem; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure h3 { margin: 0 0 .3rem; font-size: .93rem; }
figcaption { color: var(--muted); font-size: .81rem; line-height: 1.45; margin-top: .35rem; max-width: 80ch; }
.chart { overflow-x: auto; } .chart svg { display: block; width: 100%; height: auto; } figure.wide .chart svg { min-width: 560px; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)); gap: .8rem; margin: .8rem 0; }
.panels figure { padding: .7rem .7rem .6rem; } .panels figure.last { border: 2px solid var(--good); }
.panels h3 { font-size: .84rem; display: flex; justify-content: space-between; gap: .5rem; } .panels h3 span { color: var(--muted); font-weight: 400; }
.scale { display: flex; align-items: center; gap: .6rem; color: var(--muted); font-size: .8rem; } .scale i { width: 9rem; height: .65rem; border-radius: 3px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: .7rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
caption { text-align: left; font-weight: 620; padding: .75rem .9rem .1rem; } caption span { color: var(--muted); font-weight: 400; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; font-size: .8rem; border-top: 0; vertical-align: bottom; }
tbody th { font-weight: 450; } th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tr.last th, tr.last td { border-top: 2px solid var(--good); font-weight: 620; }
td.best { color: var(--good); font-weight: 650; } td .bar { display: block; height: 3px; border-radius: 2px; background: var(--s0); margin: .15rem 0 0 auto; }
details { border-top: 1px solid var(--line); padding: .6rem 0; } summary { cursor: pointer; } summary span { color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .88rem; margin: .6rem 0; } dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.missing { border: 1px dashed var(--line); border-radius: 12px; padding: .8rem 1rem; color: var(--muted); font-size: .9rem; }
mark { background: color-mix(in srgb, var(--good) 20%, transparent); color: inherit; border-radius: 3px; padding: 0 .1em; }
footer { color: var(--muted); font-size: .82rem; padding-top: 2.5rem; padding-bottom: 3rem; }
@media (max-width: 560px) { .card.hero { grid-column: auto; } .cards { grid-template-columns: 1fr 1fr; } .card.hero { grid-column: 1 / -1; } .card .value { font-size: 1.35rem; } figure { padding: .7rem .6rem; } th, td { padding: .38rem .6rem; } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""


def text(value: object) -> str:
    """Data as HTML text."""
    return html.escape(str(value))


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The whole document from (anchor, name, content) sections."""
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}">{content}</section>' for anchor, _, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><header>{header}</header><nav><div>{links}</div></nav>"
        f"<main>{body}</main><footer>{footer}</footer></body></html>\n"
    )


def heading(name: str, sentence: str = "") -> str:
    """A section's title and the sentence that says what it shows; ``sentence`` is HTML."""
    return f"<h2>{text(name)}</h2>" + (f'<p class="sub">{sentence}</p>' if sentence else "")


def missing(name: str, what: str, command: str) -> str:
    """A section whose input is not there, and the command that makes it."""
    return f'{heading(name)}<p class="missing">{text(what)} Make it with <code>{text(command)}</code></p>'


def card(name: str, value: str, note: str, hero: bool = False, extra: str = "") -> str:
    """A figure in large type; ``value``, ``note`` and ``extra`` are HTML."""
    return f'<div class="card{" hero" * hero}"><div class="name">{text(name)}</div><div class="value">{value}</div>{extra}<div class="note">{note}</div></div>'


def change(before: str, after: str) -> str:
    """before -> after."""
    return f'{text(before)}<span class="arrow">→</span><span class="after">{text(after)}</span>'


def figure(name: str, svg: str, caption: str, wide: bool = False) -> str:
    """A chart with its title and caption; ``caption`` is HTML."""
    return f'<figure class="{"wide" if wide else "half"}"><h3>{text(name)}</h3><div class="chart">{svg}</div><figcaption>{caption}</figcaption></figure>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], last: bool = False) -> str:
    """A table that scrolls sideways by itself; cells are HTML ``<td>…`` or plain HTML, the first of a row its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(_row(row, last and i == len(rows) - 1) for i, row in enumerate(rows))
    return f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Sequence[str], last: bool) -> str:
    cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row[1:])
    return f'<tr{" class=last" * last}><th scope="row">{row[0]}</th>{cells}</tr>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values; values are HTML."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in pairs) + "</dl>"


def fold(summary: str, content: str) -> str:
    """A block that opens on a click; both are HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"
