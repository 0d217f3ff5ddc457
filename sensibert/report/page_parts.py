"""What the HTML pages have in common: their frame and style, tables, bars, and how a model is loaded.

No script, nothing fetched, readable in light, in dark and in black and white."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ..data.tasks import MULTI_LABEL

STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --soft: #5b6776; --paper: #fff; --rule: #d8dee6; --off: #e4e9ef;
  --main: #1f6fb2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf1; --soft: #9aa7b5; --paper: #14191f; --rule: #303a45;
  --off: #2b343e; --main: #5aa9e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin-top: 1.25rem; }
.fact { border: 1px solid var(--rule); border-radius: .5rem; padding: .6rem .8rem; }
.fact b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap; } th { font-weight: 600; color: var(--soft); }
td:first-child, th:first-child { text-align: left; } tr + tr td { border-top: 1px solid var(--rule); }
td.bar { min-width: 9rem; width: 40%; text-align: left; } svg { display: block; max-width: 100%; height: auto; }
pre { border: 1px solid var(--rule); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 1.5rem; }
.pair td:nth-child(2), .pair th:nth-child(2) { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .75rem; }
td.cell { border: 1px solid var(--paper); } ul, ol { padding-left: 1.8rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { td.bar { min-width: 3rem; } th, td { padding: .2rem .3rem; } table { font-size: .8rem; }
  td:first-child { white-space: normal; } }
"""


def document(name: str, parts: Iterable[str]) -> str:
    """The HTML of a page with a name and its content."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
    body, style = "\n".join(parts), f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}\n{style}</head>\n<body>\n{body}\n</body></html>\n'


def heading(name: str, origin: str) -> str:
    return f'<h1>{escape(name)}</h1><p class="soft">{escape(origin)}</p>'


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def cards(found: Iterable[tuple[str, str, str]]) -> str:
    """Boxes of (number, what it is, more about it)."""
    shown = (
        f'<div class="fact"><b>{escape(number)}</b>{escape(label)}<br><span class="soft">{escape(more)}</span></div>'
        for number, label, more in found
    )
    return f'<div class="facts">{"".join(shown)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], plain: bool = True) -> str:
    """plain: cells are text, else HTML with their own <td>."""
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ("".join(f"<td>{escape(cell)}</td>" if plain else cell for cell in row) for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def bar(value: float, whole: float) -> str:
    width = 100 * value / whole if whole else 0
    return (
        '<td class="bar"><svg viewBox="0 0 100 6" preserveAspectRatio="none" width="100%" height="12" '
        'aria-hidden="true"><rect width="100" height="6" fill="var(--off)"/>'
        f'<rect width="{width:.1f}" height="6" fill="var(--main)"/></svg></td>'
    )


def loading(folder: str, task: Any) -> str:
    """Python that loads a model folder for its task."""
    kind = PIPELINES.get(str(task))
    more = ", top_k=None" if task == MULTI_LABEL else ""  # the scores of all labels
    lines = [
        "import sensibert  # or trust_remote_code=True",
        "from transformers import pipeline" if kind else "from transformers import AutoModel",
        f'model = pipeline("{kind}", "{folder}"{more})' if kind else f'model = AutoModel.from_pretrained("{folder}")',
    ]
    return f"<pre>{escape(chr(10).join(lines), quote=False)}</pre>"


PIPELINES = {
    **{name: name for name in ("text-classification", "question-answering", "token-classification")},
    **dict.fromkeys((MULTI_LABEL, "regression"), "text-classification"),
}
