"""The report page's style sheet: a light and a dark theme, one layout that folds on a phone.

Series colours s0 … s5 follow Okabe and Ito, whose palette colour-blind readers can tell apart.
"""

LIGHT = {
    "paper": "#faf9f6",
    "card": "#ffffff",
    "ink": "#1d1f24",
    "muted": "#666b76",
    "line": "#e3e1da",
    "soft": "#f1efe9",
    "accent": "#0b62a8",
    "good": "#00734f",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#009e73",
    "s3": "#b4568f",
    "s4": "#8a6d00",
    "s5": "#767b86",
}
DARK = {
    "paper": "#131519",
    "card": "#1b1e24",
    "ink": "#e9e8e4",
    "muted": "#9aa0ab",
    "line": "#31353e",
    "soft": "#242830",
    "accent": "#6db7f0",
    "good": "#4fcf9f",
    "s0": "#56b4e9",
    "s1": "#f2934b",
    "s2": "#35c79b",
    "s3": "#dd8fc0",
    "s4": "#e0c341",
    "s5": "#9298a3",
}


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}:{color};" for name, color in colors.items())


_COLORS = f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
STYLE = (
    _COLORS
    + """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.4rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
header { padding-top: clamp(1.8rem, 6vw, 4rem); }
h1 { font-size: clamp(1.9rem, 5vw, 3rem); line-height: 1.08; letter-spacing: -.028em; margin: .15rem 0 .7rem; text-wrap: balance;
  overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; letter-spacing: -.015em; line-height: 1.2; margin: 0 0 .35rem; }
h3 { font-size: .95rem; margin: 1.6rem 0 .5rem; }
p { margin: .3rem 0 .9rem; max-width: 72ch; }
a { color: var(--accent); }
code, pre { font: .84em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { background: var(--soft); border-radius: 4px; padding: .1em .35em; overflow-wrap: anywhere; }
pre { background: var(--soft); border-radius: 8px; padding: .9rem 1rem; overflow: auto; max-height: 28rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .5rem 0; }
.eyebrow { color: var(--accent); font-size: .76rem; font-weight: 650; letter-spacing: .09em; text-transform: uppercase; margin: 0; }
.lead { font-size: 1.12rem; color: var(--muted); max-width: 64ch; }
.lead strong { color: var(--ink); font-weight: 620; }
nav { position: sticky; top: 0; z-index: 2; background: color-mix(in srgb, var(--paper) 92%, transparent); backdrop-filter: blur(6px);
  border-bottom: 1px solid var(--line); margin-top: 1.6rem; }
nav div { max-width: 1120px; margin: 0 auto; padding: .55rem clamp(1rem, 4vw, 2.5rem); display: flex; gap: 1.15rem; overflow-x: auto;
  scrollbar-width: none; }
nav a { color: var(--muted); font-size: .86rem; text-decoration: none; white-space: nowrap; }
nav a:hover { color: var(--accent); }
section { padding: 2.2rem 0 .4rem; }
.sub { color: var(--muted); }
.cards { display: grid; grid-template-columns: minmax(0, 2fr) repeat(2, minmax(0, 1fr)); gap: .8rem; margin: 1.4rem 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .95rem 1.1rem; }
.card .name { font-size: .8rem; color: var(--muted); }
.card .value { font-size: 1.75rem; line-height: 1.2; font-weight: 640; letter-spacing: -.025em; margin: .2rem 0; }
.card .note { font-size: .8rem; color: var(--muted); line-height: 1.4; }
.card.hero { grid-row: span 2; display: flex; flex-direction: column; justify-content: center; border-color: color-mix(in srgb,
  var(--accent) 45%, var(--line)); }
.card.hero .value { font-size: clamp(2.4rem, 6vw, 3.9rem); } .card.hero .name { font-size: .95rem; }
.card.hero.long .value { font-size: clamp(1.8rem, 4.2vw, 2.9rem); }
.arrow { color: var(--muted); font-weight: 400; padding: 0 .12em; } .after { color: var(--good); }
.bars { display: grid; grid-template-columns: fit-content(50%) 1fr max-content; gap: .18rem .7rem; align-items: center; font-size:
  .8rem; color: var(--muted); margin: .5rem 0 .2rem; }
.bars i { height: .42rem; border-radius: 4px; background: var(--soft); overflow: hidden; }
.bars b { display: block; height: 100%; border-radius: 4px; background: var(--s0); }
.bars i:nth-last-child(2) b { background: var(--good); } .bars span:nth-last-child(-n+3) { color: var(--ink); font-weight: 620; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem; margin: .8rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1rem .8rem; min-width:
  0; }
figure.wide { grid-column: 1 / -1; }
figure h3 { margin: 0 0 .3rem; font-size: .93rem; }
figcaption { color: var(--muted); font-size: .81rem; line-height: 1.45; margin-top: .35rem; max-width: 80ch; }
.chart { overflow-x: auto; } .chart svg { display: block; width: 100%; height: auto; } figure.wide .chart svg { min-width: 560px; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: .8rem; margin: .8rem 0; }
.panels figure { padding: .7rem .7rem .6rem; } .panels figure.last { border: 2px solid var(--good); }
.panels h3 { font-size: .84rem; display: flex; justify-content: space-between; gap: .5rem; }
.panels h3 span { color: var(--muted); font-weight: 400; }
.scale { display: flex; align-items: center; gap: .6rem; color: var(--muted); font-size: .8rem; }
.scale i { width: 9rem; height: .65rem; border-radius: 3px; }
.sheet { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: .7rem 0 1rem; overflow: hidden; }
.sheet > div { overflow-x: auto; }
.sheet > p { font-size: .88rem; font-weight: 620; margin: 0; padding: .75rem .9rem .35rem; max-width: none; }
.sheet > p span { color: var(--muted); font-weight: 400; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; font-size: .8rem; border-top: 0; vertical-align: bottom; }
tbody th { font-weight: 450; } th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tr.last th, tr.last td { border-top: 2px solid var(--good); font-weight: 620; }
td.best { color: var(--good); font-weight: 650; }
td .bar { display: block; height: 3px; border-radius: 2px; background: var(--s0); margin: .15rem 0 0 auto; }
details { border-top: 1px solid var(--line); padding: .6rem 0; } summary { cursor: pointer; } summary span { color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .88rem; margin: .6rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.missing { border: 1px dashed var(--line); border-radius: 12px; padding: .9rem 1.1rem; color: var(--muted);
  font-size: .9rem; list-style: none; }
.missing li { margin: .35rem 0; } .missing strong { color: var(--ink); font-weight: 560; }
mark { background: color-mix(in srgb, var(--good) 20%, transparent); color: inherit; border-radius: 3px; padding: 0 .1em; }
footer { color: var(--muted); font-size: .82rem; padding-top: 2.5rem; padding-bottom: 3rem; }
@media (max-width: 820px) { .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } .card.hero { grid-column: 1 / -1; } }
@media (max-width: 560px) { .card { padding: .75rem .85rem; } .card .value { font-size: 1.2rem; } figure { padding: .7rem .6rem; } th,
  td { padding: .38rem .6rem; } }
@media print { nav { display: none; } section { break-inside: avoid; } }
"""
)
