"""The style sheet: system fonts, the palette of Okabe and Ito, light, dark and print."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1e23; --soft: #5a626d;
  --rule: #d9dde3; --tint: #f4f6f8; --server: #b4bbc4; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e8eaed;
  --soft: #a3abb6; --rule: #363c45; --tint: #1e2228; --server: #68717d; } }
.c0 { --c: #0072b2 } .c1 { --c: #d55e00 } .c2 { --c: #009e73 } .c3 { --c: #cc79a7 }
.c4 { --c: #e69f00 } .c5 { --c: #56b4e9 } .c6 { --c: var(--ink) }
@media (prefers-color-scheme: dark) { .c0 { --c: #2b94d6 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 28px 24px 64px; max-width: 1128px; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.6rem 0 .3rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere }
p { margin: .2rem 0 .8rem; max-width: 46rem } .hint, figcaption { color: var(--soft) }
.hint, figcaption { font-size: .9rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr)); gap: .7rem 1.4rem;
  margin: 1rem 0 } dt { color: var(--soft); font-size: .85rem } dd { margin: 0;
  overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .95rem; min-width: 50% }
th { text-align: left }
thead th { color: var(--soft); font-size: .85rem; font-weight: 500 }
th, td { padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top }
tbody th { font-weight: 500; overflow-wrap: break-word; max-width: 22rem }
td.n, th.n { text-align: right } td.n, header td { white-space: nowrap }
td.why { color: var(--soft) }
table.full { width: 100% }
td.strip-cell { width: 24%; min-width: 110px; padding-top: .72rem }
.pair { display: grid; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); gap: 2.5rem;
  align-items: start } .pair table { width: 100% }
figure { margin: .8rem 0; max-width: 600px }
svg { display: block; overflow: visible } svg.chart { width: 100%; height: auto }
svg.strip { width: 100%; height: 12px }
svg text { font-size: 13px; fill: var(--soft) } svg .name { fill: var(--ink) }
.grid { stroke: var(--rule); fill: none } .diagonal { stroke: var(--soft); stroke-dasharray: 3 4 }
.line { fill: none; stroke: var(--c); stroke-width: 2.4; stroke-linejoin: round }
.thin { fill: none; stroke: var(--server); stroke-width: 1.2; stroke-linecap: round }
.lead { fill: none; stroke: var(--rule) }
.mark { stroke: var(--c); stroke-width: 1.8; fill: var(--c); fill-opacity: .18 }
.line + g .mark, .line ~ .mark, .line ~ g .mark, .mark.bold { fill-opacity: 1 }
.fill { fill: var(--c) } .block { fill: none; stroke-width: 10 }
.front { stroke: #0072b2 } .back { stroke: #e69f00 } .server { stroke: var(--server);
  stroke-width: 4 }
.legend { list-style: none; margin: .3rem 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .2rem 1.4rem; font-size: .95rem } .legend li { display: flex; align-items: center;
  gap: .5rem } .legend svg { flex: none }
.key { display: inline-block; width: 26px; vertical-align: middle; margin-right: .4rem }
.messages { padding-left: 1.1rem; overflow-wrap: anywhere } .messages b { font-weight: 650 }
pre { background: var(--tint); padding: .9rem 1rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere }
code { overflow-wrap: anywhere; font-size: .9em } summary { cursor: pointer; padding: .3rem 0 }
@media (max-width: 720px) { body { padding: 18px 16px 40px } .pair { grid-template-columns:
  minmax(0, 1fr); gap: 0 } h1 { font-size: 1.45rem } svg.chart text { font-size: 16px }
  dl { grid-template-columns: repeat(2, minmax(0, 1fr)) } th, td { padding-right: .6rem }
  td.why, th.why { display: none } td.strip-cell { min-width: 44px }
  table { font-size: .88rem } thead th { font-size: .8rem } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444;
  --rule: #ccc; --tint: #fff; --server: #999 } body { padding: 0; max-width: none;
  font-size: 10.5pt } h2, h3 { break-after: avoid } tr, figure, .legend { break-inside: avoid }
  .wide { overflow: visible } details::details-content { content-visibility: visible;
  block-size: auto; display: block } }
"""
