"""A trimmed model as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..core.artifacts import Sensitivity
from ..core.size_forms import DIVIDED, form_lines
from ..core.text import share, short
from .history import Moment
from .page_parts import bar, cards, document, heading, loading, section, table
from .page_plots import Measured, against_score, curves, run
from .plots import role
from .tables import score_columns, score_notes
from .timings import one_text, timings

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
    parts = [heading(name, _origin(facts)), _headline(facts, megabytes)]
    parts += [section("What was cut", _layers(facts)), section("Sizes", _sizes(facts))]
    if facts.get("metrics"):
        parts.append(section("Scores", _scores(facts)))
        if facts.get("metrics_baseline"):
            parts.append(section("Score against cost", _against(facts)))
    if moments:
        metric = next(iter(facts.get("metrics") or {}), "score")
        parts.append(section("The run", run(moments, facts["encoder_params_before"], metric)))
    if sensitivity is not None and sensitivity.tensors:
        parts.append(section("Sensitivity of the tensors", _tensors(sensitivity)))
    if sensitivity is not None and sensitivity.curves:
        parts.append(section("Predicted rise of the loss", curves(sensitivity)))
    if facts.get("seconds"):
        parts.append(section("Where the time went", _seconds(facts["seconds"])))
    parts.append(section("Use it", _use(facts)))
    return document(name, parts)


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
        found.append((share(after, before), f"of the {label}", f"{short(after)} of {short(before)}"))
    if megabytes is not None:
        found.append((f"{megabytes:.1f} MB", "weights file", f"in {facts['weights']}" if facts.get("weights") else ""))
    return cards(found)


def _layers(facts: Mapping[str, Any]) -> str:
    if facts["tensors"]:  # of a grid
        rows = []
        for row in facts["tensors"]:
            count = f"<td>{row['kept']:,} of {row['of']:,}</td>"
            rows.append([f"<td>{escape(row['tensor'])}</td>", count, bar(row["kept"], row["of"])])
        return table(("weight", "kept", ""), rows, plain=False)
    rows = []
    for row in facts["layers"]:
        cells = [f"<td>{row['layer']}</td>"]
        for name in ("heads", "ffn"):
            if name in row:
                cells += [f"<td>{row[name]:,} of {row[f'{name}_of']:,}</td>", bar(row[name], row[f"{name}_of"])]
            else:
                cells += ["<td>-</td>", "<td></td>"]
        rows.append(cells)
    return table(("layer", "attention heads", "", "FFN neurons", ""), rows, plain=False)


def _sizes(facts: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    for label, name in SIZES:
        before, after = facts[f"{name}_before"], facts[f"{name}_after"]
        shown = f"{label} at {facts['flops_length']} tokens" if name == "flops" else label
        rows.append((shown, f"{before:,}", f"{after:,}", share(after, before)))
    for what, old, new in timings(facts):
        rows.append((what, f"{old:.1f} ms", f"{new:.1f} ms", share(new, old)))
    sizes = table(("", "before", "after", "left"), rows)
    if facts.get("size"):
        forms = "".join(f"<li>{escape(line)}</li>" for line in form_lines(facts["size"]))
        sizes += f'<p class="soft">{DIVIDED}</p><ul>{forms}</ul>'
    return sizes


def _scores(facts: Mapping[str, Any]) -> str:
    columns = score_columns(facts)
    rows = [
        (name, *(f"{scores[name]:.4f}" if name in scores else "-" for scores in columns.values()))
        for name in facts["metrics"]
    ]
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in score_notes(facts))
    return table(("", *columns), rows) + notes


def _against(facts: Mapping[str, Any]) -> str:
    """The model beside the baseline."""
    metric = next(iter(facts["metrics"]))
    left, times = 100 * facts["encoder_params_after"] / facts["encoder_params_before"], one_text(facts)
    model = Measured(facts["budget"] or "trimmed", facts["metrics"][metric], left, times and times.after)
    score = facts["metrics_baseline"].get(metric)
    return against_score(metric, [model], score, times and times.before, times and times.what)


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
    heat = table(("", *(f"layer {layer}" for layer in layers)), rows, plain=False)
    ranked = [(str(n), role(t), str(owner[t]), f"{value:.2e}") for n, (t, value) in enumerate(values.items(), 1)]
    header = ("rank", "tensor", "layer", "mean |w · g|")
    if len(ranked) <= 2 * TENSORS:
        ends = [("From the most to the least sensitive:", ranked)]
    else:
        ends = [("The most sensitive:", ranked[:TENSORS]), ("The least sensitive:", ranked[-TENSORS:])]
    tables = "".join(f"<div><p>{title}</p>{table(header, rows)}</div>" for title, rows in ends)
    return (
        "<p>Mean |weight · gradient| of every weight matrix: what the loss changes by if one of its weights becomes 0. "
        f'Shades are logarithmic.</p>{heat}<div class="pair">{tables}</div>'
    )


def _seconds(seconds: Mapping[str, float]) -> str:
    phases = {name: value for name, value in seconds.items() if name != "total"}
    whole = seconds.get("total") or sum(phases.values())
    rows = [[f"<td>{escape(n)}</td>", f"<td>{value:.1f} s</td>", bar(value, whole)] for n, value in phases.items()]
    return table(("phase", f"of {whole:.1f} s", ""), rows, plain=False)


def _use(facts: Mapping[str, Any]) -> str:
    folder = str(facts["model"])
    again = f"sensibert finetune --config {escape(folder)}/recipe.json --output again" if facts.get("steps") else ""
    warned = "".join(f"<li>{escape(text)}</li>" for text in facts.get("warnings") or ())
    parts = [loading(folder, facts.get("task"))]
    parts += [f"<p>The same run again:</p><pre>{again}</pre>"] if again else []
    parts += [f"<p>The run warned:</p><ul>{warned}</ul>"] if warned else []
    return "".join(parts)
