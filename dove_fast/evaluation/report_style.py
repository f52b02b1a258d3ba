"""How the report looks: light and dark, on a desk and on a phone."""

from __future__ import annotations

from dove_fast.html import STYLE

__all__ = ["REPORT_STYLE"]

REPORT_STYLE = (
    STYLE
    + """
:root { --paper: #fff; --shade: #00000009; --warn: #9a5b00 }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --shade: #ffffff0c; --warn: #e0a95b } }
body { max-width: 72rem; background: var(--paper) }
h1 { margin-bottom: .5rem }
h2 { margin: 2.5rem 0 .5rem }
p { max-width: 48rem; margin: .5rem 0 1rem }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-bottom: 1rem }
a { color: var(--mark) }
code { font-size: .9em; overflow-wrap: anywhere }
summary { cursor: pointer; margin: 1rem 0 .5rem; font-weight: 600; overflow-wrap: anywhere }
.warning { border-left: 3px solid var(--warn); padding: .1rem 0 .1rem .8rem }
.wide { overflow-x: auto; margin: 0 -1rem; padding: 0 1rem }
.wide:focus-visible { outline: 2px solid var(--mark) }
.gallery, .grid { width: auto }
.gallery th, .gallery td { border: 0; padding: .35rem; width: auto; text-align: center }
.gallery thead th { font-size: .85rem; vertical-align: bottom }
.gallery tbody th { position: sticky; left: -1rem; background: var(--paper); font-weight: 400; z-index: 1 }
.gallery { --picture: clamp(4rem, 6.5vw, 5rem) }
.gallery figure { width: var(--picture) }
.gallery img { display: block; width: var(--picture); height: var(--picture); border-radius: 3px }
.gallery figcaption { overflow-wrap: anywhere; line-height: 1.3; padding-top: .2rem; min-height: 1rem }
figure img.photo { image-rendering: auto }
figure img.cells { image-rendering: pixelated }
.chosen img { outline: 3px solid var(--mark); outline-offset: 1px }
thead .chosen { color: var(--mark) }
polyline.behind { opacity: .5 }
.kept img { box-shadow: 0 3px 0 var(--mark) }
.kept figcaption { padding-top: .35rem }
span.kept { box-shadow: 0 2px 0 var(--mark) }
.grid th, .grid td { white-space: nowrap; width: auto; text-align: right; padding: .2rem 0 .2rem 1.4rem }
.grid th:first-child { text-align: left; padding-left: 0 }
.grid td { font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.5rem }
.charts figure, .curves figure { width: auto; max-width: 34rem }
.charts svg, .curves svg { overflow: visible }
.charts { margin: 1.5rem 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem 2rem }
.cards h3 { margin: 0 0 .5rem; font-size: 1rem; overflow-wrap: anywhere }
.cards div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .7rem }
.cards figure { width: auto }
.cards img { display: block; width: 100%; border-radius: 3px }
.cards figcaption { line-height: 1.35; padding-top: .4rem }
.beside { display: flex; gap: .6rem; align-items: center }
.beside img { width: 2.5rem; height: 2.5rem; border-radius: 3px }
.line { stroke-linejoin: round }
.level { stroke: var(--warn); stroke-dasharray: 5 4; stroke-width: 1 }
.note { fill: var(--warn) }
.dot { fill: var(--mark) }
circle.chosen { fill: var(--paper); stroke: var(--mark); stroke-width: 2.5 }
.cloud { fill: var(--mark); fill-opacity: .35 }
@media (max-width: 40rem) {
  body { margin: 1rem auto; font-size: 14px }
  th { width: 8rem }
  .curves { grid-template-columns: 1fr 1fr; gap: 1rem }
  .gallery { --picture: 5rem }
}
"""
)
