"""The frame of the page: style, the few lines of script, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1d1f;--ink2:#5b6068;--line:#e3e4e6;--mark:#fff3cd;
--c0:#1f6fb4;--c1:#d1651a;--c2:#2c8a57;--c3:#a8438f;--c4:#8a6d1b;--c5:#5e62c9;--good:#1f7a45;--warn:#9a5b00}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1d2024;--ink:#e7e8ea;--ink2:#a3a9b2;--line:#33373d;
--mark:#4a3f17;--c0:#6db3f2;--c1:#f0975a;--c2:#6fcb97;--c3:#e08fca;--c4:#d9ba60;--c5:#a3a6f5;--good:#6fcb97;--warn:#f0b25a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2rem) 3rem}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.4rem 0 .5rem}h4{font-size:.95rem;margin:.9rem 0 .35rem;overflow-wrap:anywhere}
small{color:var(--ink2);font-weight:400}p{max-width:75ch}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.6rem 0;font-size:.92rem}a{color:var(--c0)}
.verdict{font-size:1.05rem;margin:.3rem 0;font-weight:600;overflow-wrap:anywhere}
.finished{color:var(--good)}.stopped,.unfinished,.empty{color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.6rem;margin:1rem 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.5rem .75rem}
.tiles dt{color:var(--ink2);font-size:.82rem}.tiles dd{margin:0;font-size:1.12rem;font-weight:600;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,265px),1fr));gap:.8rem}
figure{margin:0}
.chart{display:flex;flex-direction:column;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:.6rem .7rem}
.chart figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 .6rem;font-size:.93rem}
.chart figcaption small{flex-basis:100%;line-height:1.3;font-size:.82rem}.last{font-variant-numeric:tabular-nums}
.chart svg{display:block;width:100%;height:auto;font-family:inherit;margin-top:auto;padding-top:.3rem}
.wide{max-width:660px;margin-top:.8rem}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin:.3rem 0 0;padding:0;font-size:.83rem}
.legend i{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.35em}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(47%,205px),1fr));gap:.6rem}
.spectrogram{display:flex;flex-direction:column}.spectrogram audio{margin-top:auto}
.spectrogram img{display:block;width:100%;height:128px;object-fit:fill;border-radius:4px;background:#000}
.spectrogram figcaption{font-size:.85rem;line-height:1.3;margin:.2rem 0}
audio{width:100%;height:34px;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%;max-width:100%}
th,td{text-align:left;vertical-align:top;padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}th{font-weight:600}thead th{color:var(--ink2)}
.probe td,.probe th{overflow-wrap:normal}td:first-child,th:first-child{min-width:8.5rem}
.pairs td:first-child{width:14rem}
@media (min-width:621px){.settings td:first-child{min-width:14rem}
.settings td:nth-child(2),.settings td:nth-child(3){min-width:6rem}}
tr.changed td:nth-child(2){background:var(--mark)}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem;font-size:.8rem}
.tall{max-height:32rem;overflow:auto;border:1px solid var(--line);border-radius:8px;padding:0 .7rem;
background:var(--card)}
.tall thead th{position:sticky;top:0;background:var(--card);z-index:1}
.sort th button{all:unset;cursor:pointer;font-weight:600}.sort th button:focus-visible{outline:2px solid var(--c0)}
.sort th[aria-sort=ascending] button::after{content:" \\2191"}
.sort th[aria-sort=descending] button::after{content:" \\2193"}
.sort td,.scores td{font-variant-numeric:tabular-nums}.sort th{white-space:nowrap}
.sort td,.scores td,.sort th,.scores th{overflow-wrap:normal}.sort td[data-v]:not(:first-child){min-width:5rem}
.scores td:first-child,.scores th:first-child{min-width:4rem}.scores td:nth-child(2){min-width:6.5rem}
.scores small{white-space:nowrap}
.sort td.bar{min-width:7rem}.bar i{display:block;height:.32rem;border-radius:2px;background:var(--c0);min-width:1px}
.heat{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem}
.heat svg{display:block;font-family:inherit}.heat text{fill:var(--ink2)}
.heat .in{fill:var(--ink)}.heat .on{fill:var(--card)}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr));gap:.7rem}
.clip{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.5rem .7rem;font-size:.9rem;
display:flex;flex-direction:column;gap:.25rem;overflow-wrap:anywhere}.clip audio,.clip .missing{margin-top:auto}
.missing{color:var(--ink2);font-style:italic}footer{margin-top:2.5rem;color:var(--ink2);font-size:.85rem}
@media (max-width:620px){.settings td:nth-child(4),.settings th:nth-child(4){display:none}}
"""

SCRIPT = (
    "document.addEventListener('play',e=>document.querySelectorAll('audio').forEach(a=>a!==e.target&&a.pause()),true);"
    "document.addEventListener('click',e=>{const h=e.target.closest('.sort th');if(!h)return;"
    "const t=h.closest('table'),up=h.getAttribute('aria-sort')!=='ascending',i=h.cellIndex,b=t.tBodies[0],"
    "v=r=>r.cells[i].dataset.v??r.cells[i].textContent,c=(p,q)=>{const x=v(p),y=v(q);"
    "if(x===''||y==='')return (x==='')-(y==='');"
    "return (isNaN(x)||isNaN(y)?x.localeCompare(y):x-y)*(up?1:-1)};"
    "t.querySelectorAll('th').forEach(o=>o.removeAttribute('aria-sort'));"
    "h.setAttribute('aria-sort',up?'ascending':'descending');b.append(...[...b.rows].sort(c))})"
)
"""One player at a time; a click on a column's title sorts its table, cells without a value last."""

Section = tuple[str, str]


def page(title: str, lead: str, sections: Sequence[Section], footer: str) -> str:
    """The whole document. Titles are escaped here; lead, footer and the sections' bodies are HTML already."""
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    bodies = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{body}</section>' for i, (name, body) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{lead}<nav>{links}</nav>{bodies}<footer>{footer}</footer></main>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def tiles(entries: Mapping[str, str]) -> str:
    """Short facts side by side."""
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entries.items())
        + "</dl>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "", marked: Sequence[bool] = ()) -> str:
    """A table; cells are escaped. Marked rows have their second cell highlighted."""
    flags = list(marked)
    lines = []
    for index, row in enumerate(rows):
        style = ' class="changed"' if index < len(flags) and flags[index] else ""
        lines.append(f"<tr{style}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>")
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table></div>'


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result
