"""HTML building blocks of the report: one page without scripts or external files, in the reader's light or dark theme.

Choice: small functions return strings, so no template engine is needed. Cost: nothing is escaped by itself. Every
value that comes from data passes through ``text``; markup of this package does not.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from lr2train.reporting.style import STYLE


def text(value: object) -> str:
    """Data as HTML text."""
    return html.escape(str(value))


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The whole document; ``sections`` holds (anchor, name, content), ``header``, content and ``footer`` are HTML."""
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}">{content}</section>' for anchor, _, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>"
        f"<header>{header}</header><nav><div>{links}</div></nav>"
        f"<main>{body}</main><footer>{footer}</footer></body></html>\n"
    )


def heading(name: str, sentence: str = "") -> str:
    """A section's title and an introducing sentence; ``sentence`` is HTML."""
    return f"<h2>{text(name)}</h2>" + (f'<p class="sub">{sentence}</p>' if sentence else "")


@dataclass(frozen=True)
class Missing:
    """A section without content: the reason, and the command that produces the content."""

    why: str
    command: str


def wanting(sections: Sequence[tuple[str, Missing]]) -> str:
    """The missing sections as a list."""
    lines = "".join(
        f"<li><strong>{text(name)}</strong> {text(one.why)} <code>{text(one.command)}</code></li>"
        for name, one in sections
    )
    return f'{heading("Not here yet")}<ul class="missing">{lines}</ul>'


def card(name: str, value: str, note: str, hero: bool = False, extra: str = "", long: bool = False) -> str:
    """A figure in large type; ``value``, ``note`` and ``extra`` are HTML. ``long`` takes smaller type."""
    return (
        f'<div class="card{" hero" * hero}{" long" * long}"><div class="name">{text(name)}</div><div '
        f'class="value">{value}</div><div '
        f'class="note">{note}</div>{extra}</div>'
    )


def change(before: str, after: str) -> str:
    """before → after."""
    return f'{text(before)}<span class="arrow">→</span><span class="after">{text(after)}</span>'


def figure(name: str, svg: str, caption: str, wide: bool = False) -> str:
    """A chart with its title and caption; ``caption`` is HTML."""
    return (
        f'<figure class="{"wide" if wide else "half"}"><h3>{text(name)}</h3><div '
        f'class="chart">{svg}</div><figcaption>{caption}</figcaption></figure>'
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], last: bool = False) -> str:
    """A table that scrolls sideways. Cells are HTML, with or without ``<td>``; a row's first cell is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(_row(row, last and i == len(rows) - 1) for i, row in enumerate(rows))
    rows_html = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="sheet"><p>{caption}</p><div>{rows_html}</div></div>'


def _row(row: Sequence[str], last: bool) -> str:
    cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row[1:])
    return f'<tr{" class=last" * last}><th scope="row">{row[0]}</th>{cells}</tr>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of (name, value); values are HTML."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in pairs) + "</dl>"


def fold(summary: str, content: str) -> str:
    """A block that opens on a click; ``summary`` and ``content`` are HTML."""
    return f"<details><summary>{summary}</summary>{content}</details>"
