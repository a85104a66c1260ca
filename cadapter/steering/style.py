"""The style of the page: light and dark, colours that the colour-blind tell apart, nothing from elsewhere."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f1; --card: #ffffff; --ink: #1d2329; --soft: #5a646e; --rule: #e2e0d9; --grid: #ecebe6;
  --zero: #b3b7bb; --accent: #0b5c8f; --wash: #e9f1f6; --limit: #a13d63;
  --c0: #0072b2; --c1: #d55e00; --c2: #00866a; --c3: #b0578f; --c4: #8a6d00; --c5: #3f8fbf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111518; --card: #191f24; --ink: #e6e9eb; --soft: #9ba6af; --rule: #2b333a; --grid: #252c32;
    --zero: #55606a; --accent: #7cc4f2; --wash: #1a2a35; --limit: #e58bb0;
    --c0: #5ab1ef; --c1: #f58a4b; --c2: #3ccba3; --c3: #e29ac4; --c4: #e5c453; --c5: #a6d8f5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 56px; }
h1, h2, h3 { line-height: 1.25; font-weight: 650; margin: 0; }
h1 { font-size: 30px; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 48px 0 4px; }
h3 { font-size: 15px; overflow-wrap: anywhere; }
p { margin: 0; }
.over { color: var(--accent); font-size: 12px; font-weight: 650; letter-spacing: 0.09em; text-transform: uppercase; }
.facts, .lead, .caption { color: var(--soft); }
.facts { margin-top: 6px; overflow-wrap: anywhere; }
.lead { max-width: 76ch; margin-bottom: 16px; }
.verdict {
  margin: 26px 0 16px; padding: 18px 22px; background: var(--wash); border-left: 4px solid var(--accent);
  border-radius: 0 10px 10px 0;
}
.verdict p { max-width: 88ch; }
.verdict p:first-child { font-size: 18px; font-weight: 600; }
.verdict p + p { margin-top: 6px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 14px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 14px 18px; }
.tile b { display: block; font-size: 26px; font-weight: 650; letter-spacing: -0.02em; }
.tile b small { font-size: 15px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile span { color: var(--soft); font-size: 13px; }
.remarks { margin: 16px 0 0; padding: 0 0 0 18px; color: var(--soft); font-size: 13.5px; max-width: 100ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.card { margin: 0; padding: 18px 20px 16px; min-width: 0; }
.card .caption { font-size: 13px; margin-top: 2px; }
.chart { display: block; width: 100%; height: auto; margin-top: 10px; overflow: visible; }
.chart text { font-family: inherit; fill: var(--soft); font-variant-numeric: tabular-nums; }
.tick { font-size: 11.5px; }
.label { font-size: 12px; }
.rule, .axis, .zero, .limit, .line, .error { fill: none; }
.chart .rule { stroke: var(--grid); } .chart .zero { stroke: var(--zero); } .chart .axis { stroke: var(--zero); }
.limit { stroke: var(--limit); stroke-dasharray: 5 4; stroke-width: 1.3; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.line { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.error { stroke: var(--c); stroke-width: 1.2; opacity: 0.65; }
.chart .mark, .key .mark { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.chart .mark.hollow { fill: var(--card); stroke: var(--c); stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 10px 0 0; padding: 0; font-size: 13px; }
.legend li { list-style: none; display: flex; align-items: center; gap: 7px; overflow-wrap: anywhere; }
.key { width: 26px; height: 12px; flex: none; }
.card.sample { margin-top: 14px; }
.prompt { font-family: Charter, "Iowan Old Style", Georgia, "DejaVu Serif", serif; font-size: 15px; margin-top: 4px; }
.prompt::after { content: " …"; color: var(--soft); }
.tag { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; margin-top: 12px; }
.texts { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(196px, 1fr); gap: 0; }
.texts > div { padding: 0 16px; border-left: 1px solid var(--rule); min-width: 0; }
.texts > div:first-child { padding-left: 0; border-left: 0; }
.dial { font-weight: 650; font-variant-numeric: tabular-nums; }
.dial small { font-weight: 500; color: var(--soft); font-size: 12.5px; }
.text {
  font-family: Charter, "Iowan Old Style", Georgia, "DejaVu Serif", serif; font-size: 14px; line-height: 1.5;
  margin-top: 4px; white-space: pre-line; overflow-wrap: anywhere;
}
.after { color: var(--soft); font-size: 12px; margin-top: 6px; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--accent); font-weight: 550; }
.table { overflow-x: auto; margin-top: 20px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 5px 10px; white-space: nowrap; }
th { color: var(--soft); font-weight: 550; border-bottom: 1px solid var(--rule); }
td { border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.best td { background: var(--wash); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; margin: 12px 0 0; font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); max-width: 84ch; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.92em; }
@media (max-width: 560px) {
  main { padding: 24px 14px 40px; }
  .card { padding: 14px 12px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
}
@media print { .card, .tile { break-inside: avoid; } body { background: #fff; } }
"""
