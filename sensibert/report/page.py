"""A trimmed model as one HTML page: no script, nothing fetched, readable in light, in dark and in black and white."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..core.artifacts import Sensitivity
from ..core.text import share
from ..data.tasks import MULTI_LABEL
from .history import Moment
from .page_plots import curves, run
from .plots import role
from .tables import score_columns, score_notes

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
# Shades of a heat map as opacities of the main colour, few enough that the text on them stays readable.
DEEPEST, SHADES = 0.55, 6
TENSORS = 10  # at each end of the ranking
SIZES = (("encoder parameters", "encoder_params"), ("all parameters", "total_params"), ("FLOPs", "flops"))


def page(
    facts: Mapping[str, Any],
    sensitivity: Sensitivity | None = None,
    megabytes: float | None = None,
    moments: Sequence[Moment] = (),
) -> str:
    """HTML of a trimmed model. facts: of `inspect_folder`. megabytes: of its weights file.

    With a sensitivity: the tensors by sensitivity, and with its curves the predicted rise of the loss. With the moments
    of a run: loss, score and size against steps."""
    name = str(facts["model"]).rstrip("/").rpartition("/")[2]
    parts = [f"<h1>{escape(name)}</h1>", f'<p class="soft">{escape(_origin(facts))}</p>', _headline(facts, megabytes)]
    parts += [_section("What was cut", _layers(facts)), _section("Sizes", _sizes(facts))]
    if facts.get("metrics"):
        parts.append(_section("Scores", _scores(facts)))
    if moments:
        metric = next(iter(facts.get("metrics") or {}), "score")
        parts.append(_section("The run", run(moments, facts["encoder_params_before"], metric)))
    if sensitivity is not None and sensitivity.tensors:
        parts.append(_section("Sensitivity of the tensors", _tensors(sensitivity)))
    if sensitivity is not None and sensitivity.curves:
        parts.append(_section("Predicted rise of the loss", curves(sensitivity)))
    if facts.get("seconds"):
        parts.append(_section("Where the time went", _seconds(facts["seconds"])))
    parts.append(_section("Use it", _use(facts)))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(name)}</title>'
    body = "\n".join(parts)
    style = f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}\n{style}</head>\n<body>\n{body}\n</body></html>\n'


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _origin(facts: Mapping[str, Any]) -> str:
    made = f"trimmed to {facts['budget']} by {facts['method']}" if facts.get("budget") else "not trimmed by a budget"
    steps = f", {facts['steps']:,} steps, seed {facts['seed']}" if facts.get("steps") else ""
    return f"{facts['family']}{', ' + str(facts['task']) if facts.get('task') else ''}: {made}{steps}"


def _headline(facts: Mapping[str, Any], megabytes: float | None) -> str:
    found = []
    for name, value in list((facts.get("metrics") or {}).items())[:1]:
        others = (
            (facts.get("metrics_baseline"), "without trimming"),
            (facts.get("metrics_at_cut"), "just before the cut"),
        )
        known = (f"{scores[name]:.4f} {when}" for scores, when in others if scores and name in scores)
        found.append((f"{value:.4f}", name, next(known, "")))
    for label, name in SIZES[::2]:
        before, after = facts[f"{name}_before"], facts[f"{name}_after"]
        found.append((share(after, before), f"of the {label}", f"{_short(after)} of {_short(before)}"))
    if megabytes is not None:
        found.append((f"{megabytes:.1f} MB", "weights file", ""))
    cards = (
        f'<div class="fact"><b>{escape(number)}</b>{escape(label)}<br><span class="soft">{escape(more)}</span></div>'
        for number, label, more in found
    )
    return f'<div class="facts">{"".join(cards)}</div>'


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], plain: bool = True) -> str:
    """plain: cells are text, else HTML with their own <td>."""
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ("".join(f"<td>{escape(cell)}</td>" if plain else cell for cell in row) for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _bar(value: float, whole: float) -> str:
    width = 100 * value / whole if whole else 0
    return (
        '<td class="bar"><svg viewBox="0 0 100 6" preserveAspectRatio="none" width="100%" height="12" '
        'aria-hidden="true"><rect width="100" height="6" fill="var(--off)"/>'
        f'<rect width="{width:.1f}" height="6" fill="var(--main)"/></svg></td>'
    )


def _layers(facts: Mapping[str, Any]) -> str:
    if facts["tensors"]:  # of a grid
        rows = []
        for row in facts["tensors"]:
            count = f"<td>{row['kept']:,} of {row['of']:,}</td>"
            rows.append([f"<td>{escape(row['tensor'])}</td>", count, _bar(row["kept"], row["of"])])
        return _table(("weight", "kept", ""), rows, plain=False)
    rows = []
    for row in facts["layers"]:
        cells = [f"<td>{row['layer']}</td>"]
        for name in ("heads", "ffn"):
            if name in row:
                cells += [f"<td>{row[name]:,} of {row[f'{name}_of']:,}</td>", _bar(row[name], row[f"{name}_of"])]
            else:
                cells += ["<td>-</td>", "<td></td>"]
        rows.append(cells)
    return _table(("layer", "attention heads", "", "FFN neurons", ""), rows, plain=False)


def _sizes(facts: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    for label, name in SIZES:
        before, after = facts[f"{name}_before"], facts[f"{name}_after"]
        shown = f"{label} at {facts['flops_length']} tokens" if name == "flops" else label
        rows.append((shown, f"{before:,}", f"{after:,}", share(after, before)))
    latency = facts.get("latency") or {}
    for name, times in latency.items():
        if name.startswith("batch_"):
            batch = name.removeprefix("batch_").removesuffix("_ms")
            ms = [f"{times[when]:.1f} ms" for when in ("before", "after")]
            label = f"latency of {batch} x {latency['length']} tokens"
            rows.append((label, *ms, share(times["after"], times["before"])))
    return _table(("", "before", "after", "left"), rows)


def _scores(facts: Mapping[str, Any]) -> str:
    columns = score_columns(facts)
    rows = [
        (name, *(f"{scores[name]:.4f}" if name in scores else "-" for scores in columns.values()))
        for name in facts["metrics"]
    ]
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in score_notes(facts))
    return _table(("", *columns), rows) + notes


def _tensors(sensitivity: Sensitivity) -> str:
    owner = {m.parameter: site.layer for site in sensitivity.layout.sites for m in site.members}
    values = {name: value for name, value in sensitivity.tensors.items() if name in owner}
    layers = sorted({owner[name] for name in values})
    roles = list(dict.fromkeys(role(name) for name in owner if name in values))
    found = {(role(name), owner[name]): value for name, value in values.items()}
    logs = sorted(math.log10(value) for value in values.values() if value > 0)
    low, high = (logs[0], logs[-1]) if logs else (0.0, 0.0)

    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        depth = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
        shade = round(depth * SHADES) / SHADES * DEEPEST
        return f'<td class="cell" style="background: rgb(from var(--main) r g b / {shade:.2f})">{value:.1e}</td>'

    rows = [[f"<td>{escape(name)}</td>", *(cell(found.get((name, layer))) for layer in layers)] for name in roles]
    heat = _table(("", *(f"layer {layer}" for layer in layers)), rows, plain=False)
    ranked = [(str(n), role(t), str(owner[t]), f"{value:.2e}") for n, (t, value) in enumerate(values.items(), 1)]
    header = ("rank", "tensor", "layer", "mean |w · g|")
    if len(ranked) <= 2 * TENSORS:
        ends = [("From the most to the least sensitive:", ranked)]
    else:
        ends = [("The most sensitive:", ranked[:TENSORS]), ("The least sensitive:", ranked[-TENSORS:])]
    tables = "".join(f"<div><p>{title}</p>{_table(header, rows)}</div>" for title, rows in ends)
    return (
        "<p>Mean |weight · gradient| of every weight matrix: what the loss changes by if one of its weights becomes 0. "
        f'Shades are logarithmic.</p>{heat}<div class="pair">{tables}</div>'
    )


def _seconds(seconds: Mapping[str, float]) -> str:
    phases = {name: value for name, value in seconds.items() if name != "total"}
    whole = seconds.get("total") or sum(phases.values())
    rows = [[f"<td>{escape(n)}</td>", f"<td>{value:.1f} s</td>", _bar(value, whole)] for n, value in phases.items()]
    return _table(("phase", f"of {whole:.1f} s", ""), rows, plain=False)


def _use(facts: Mapping[str, Any]) -> str:
    folder = escape(str(facts["model"]))
    lines = [
        "import sensibert  # or trust_remote_code=True",
        "from transformers import pipeline" if facts.get("task") in PIPELINES else "from transformers import AutoModel",
    ]
    kind = PIPELINES.get(str(facts.get("task")))
    more = ", top_k=None" if facts.get("task") == MULTI_LABEL else ""  # the scores of all labels
    lines.append(
        f'model = pipeline("{kind}", "{folder}"{more})' if kind else f'model = AutoModel.from_pretrained("{folder}")'
    )
    again = f"sensibert finetune --config {folder}/recipe.json --output again" if facts.get("steps") else ""
    warned = "".join(f"<li>{escape(text)}</li>" for text in facts.get("warnings") or ())
    parts = ["<pre>" + "\n".join(lines) + "</pre>"]
    parts += [f"<p>The same run again:</p><pre>{again}</pre>"] if again else []
    parts += [f"<p>The run warned:</p><ul>{warned}</ul>"] if warned else []
    return "".join(parts)


PIPELINES = {
    **{name: name for name in ("text-classification", "question-answering", "token-classification")},
    **dict.fromkeys((MULTI_LABEL, "regression"), "text-classification"),
}
