"""Plots of the HTML page, as inline SVG in the colors of its style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..core.artifacts import Sensitivity
from .history import Moment, cut_steps, losses, scores, sizes
from .plots import LOWEST_RISE

LEFT, RIGHT = 44, 388  # of the area of a plot that is 410 wide
LINE = 11  # height of the numbers beside a plot
WIDE = 7.3  # of a letter, in a font that runs wide
Points = Sequence[tuple[float, float]]


class Measured(NamedTuple):
    """A model in a plot of scores. left: percent of the encoder's parameters. ms: of a forward pass, if measured."""

    name: str
    score: float
    left: float
    ms: float | None


def run(moments: Sequence[Moment], params_before: int, metric: str) -> str:
    """Loss, score and size against steps, with the cuts as dotted lines. metric: the name of the score."""
    cuts, last = cut_steps(moments), moments[-1].step
    left = [(step, 100 * size / params_before) for step, size in sizes(moments, params_before)]
    panels = [
        ("training loss", losses(moments), "{:.2f}", False),
        (metric, scores(moments), "{:.3f}", False),
        ("encoder parameters left", left, "{:.0f} %", True),
    ]
    drawn = "".join(_against_steps(*panel, cuts, last) for panel in panels if panel[1])
    note = '<p class="soft">Dotted lines are cuts.</p>' if cuts else ""
    return f'{note}<div class="plots">{drawn}</div>'


def _against_steps(title: str, points: Points, form: str, from_zero: bool, cuts: Sequence[int], last: int) -> str:
    """One panel; from_zero: the axis begins at 0, and the value changes in steps."""
    upper, lower = 10, 112
    values = [value for _, value in points]
    low, high = (0.0, max(values)) if from_zero else (min(values), max(values))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(step: float, value: float) -> tuple[float, float]:
        return LEFT + step / last * (RIGHT - LEFT), lower - (value - low) / (high - low) * (lower - upper)

    parts = [_rule(place(0, value)[1], form.format(value)) for value in (low, (low + high) / 2, high)]
    for step in (0, last):
        parts.append(_below(place(step, low)[0], lower, f"{step:,}"))
    for step in cuts:
        x = place(step, low)[0]
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{upper}" y2="{lower}" stroke="var(--soft)" '
                     'stroke-dasharray="2 3"/>')  # fmt: skip
    path = [place(*point) for point in points]
    if from_zero:
        path = [corner for (x, y), (after, _) in zip(path, [*path[1:], path[-1]]) for corner in ((x, y), (after, y))]
    parts.append(_line(path))
    if len(points) <= 12 and not from_zero:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--main)"/>' for x, y in path]
    return _figure(parts, title, f"{title}, by step", 135)


def against_score(
    metric: str, models: Sequence[Measured], baseline: float | None, baseline_ms: float | None, pass_: str | None
) -> str:
    """The scores of models against their size, and against their latency if all were timed.

    baseline: score of the model that was trained without trimming, its latency, and what was timed, in words."""
    panels = [("encoder parameters left, percent", [(m.left, m.score, m.name) for m in models], 100.0)]
    timed = [(m.ms, m.score, m.name) for m in models if m.ms is not None]
    if len(timed) == len(models) and baseline_ms is not None:
        panels.append((f"{pass_}, ms", timed, baseline_ms))
    drawn = "".join(_scatter(metric, title, points, whole, baseline) for title, points, whole in panels)
    note = "" if baseline is None else f'<p class="soft">Square and dotted line: {escape(metric)} without trimming.</p>'
    return f'{note}<div class="plots">{drawn}</div>'


def _scatter(
    metric: str, title: str, points: Sequence[tuple[float, float, str]], whole: float, baseline: float | None
) -> str:
    """Scores over a cost that begins at 0. whole: the cost of the untrimmed model."""
    upper, lower = 14, 150
    scores = [score for _, score, _ in points] + ([] if baseline is None else [baseline])
    spare = 0.15 * (max(scores) - min(scores)) or 0.05
    low, high, last = min(scores) - spare, max(scores) + spare, max([whole, *(cost for cost, _, _ in points)])

    def place(cost: float, score: float) -> tuple[float, float]:
        return LEFT + cost / last * (RIGHT - LEFT), lower - (score - low) / (high - low) * (lower - upper)

    parts = [_rule(place(0, score)[1], f"{score:.3f}") for score in (low, (low + high) / 2, high)]
    parts += [_below(place(cost, low)[0], lower, f"{cost:.3g}") for cost in (0, last / 2, last)]
    if baseline is not None:
        x, y = place(whole, baseline)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--soft)" '
                     'stroke-dasharray="2 3"/>')  # fmt: skip
        parts.append(f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="var(--ink)"/>')
    path = [(*place(cost, score), name) for cost, score, name in sorted(points)]
    parts.append(_line([(x, y) for x, y, _ in path]))
    named: list[tuple[float, float, float]] = []  # (left, right, base) of the names so far
    for x, y, name in path:
        width = WIDE * len(name)
        left, base = min(x + 6, RIGHT - width), y + 13  # beside the line, which rises to the right, and in the plot
        while any(left < right and start < left + width and abs(base - at) < LINE for start, right, at in named):
            base += LINE
        named.append((left, left + width, base))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--main)"/>')
        parts.append(f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="start">{escape(name)}</text>')
    return _figure(parts, f"{metric} against {title}", f"{metric} against {title}", 175)


def _rule(y: float, text: str) -> str:
    line = f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'


def _below(x: float, lower: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{lower + 18}" text-anchor="middle">{escape(text)}</text>'


def _line(path: Points, opacity: float = 1.0) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    stroke = f'stroke="var(--main)" stroke-opacity="{opacity:.2f}" stroke-width="1.8"'
    return f'<polyline points="{points}" fill="none" {stroke}/>'


def _figure(parts: Sequence[str], label: str, caption: str, height: int) -> str:
    drawn = "".join(parts)
    return (
        f'<figure style="margin: 0"><svg viewBox="0 0 410 {height}" role="img" aria-label="{escape(label)}" '
        f'font-size="11" fill="var(--soft)">{drawn}</svg>'
        f'<figcaption class="soft">{escape(caption)}</figcaption></figure>'
    )


def curves(sensitivity: Sensitivity) -> str:
    kinds = {"head": "attention heads of a layer", "ffn": "FFN neurons of a layer"}
    sites = [site for site in sensitivity.layout.sites if site.units and site.name in sensitivity.curves]
    rises = [rise for site in sites for _, rise in sensitivity.curves[site.name]]
    top = math.ceil(math.log10(max([*rises, 10 * LOWEST_RISE])))
    bottom = math.log10(LOWEST_RISE)
    last = max([1, *(site.layer for site in sites)])
    shown = "".join(
        _curve_plot(title, [site for site in sites if site.kind == kind], sensitivity, bottom, top, last)
        for kind, title in kinds.items()
    )
    return (
        "<p>Each line is a layer alone, as it loses its least important units; numbers name the layers. "
        f"A rise below {LOWEST_RISE:g}, or a fall, is drawn on the lower edge.</p>"
        f'<div class="plots">{shown}</div>'
    )


def _curve_plot(title: str, sites: list, sensitivity: Sensitivity, bottom: float, top: float, last: int) -> str:
    upper, lower = 10, 200

    def place(share_gone: float, rise: float) -> tuple[float, float]:
        height = (math.log10(max(rise, LOWEST_RISE)) - bottom) / (top - bottom)
        return LEFT + share_gone * (RIGHT - LEFT), lower - height * (lower - upper)

    parts = []
    for power in range(round(bottom), round(top) + 1):
        parts.append(_rule(place(0, 10.0**power)[1], f"1e{power}"))
    for percent in (0, 50, 100):
        parts.append(_below(place(percent / 100, 1)[0], lower, f"{percent} %"))
    ends = []
    for site in sites:
        curve = [place(gone / site.units, rise) for gone, rise in sensitivity.curves[site.name]]
        parts.append(_line(curve, 0.35 + 0.65 * site.layer / last))
        ends.append((curve[-1][1], site.layer))
    below: float = upper - LINE
    for y, layer in sorted(ends):
        below = max(y, below + LINE)  # numbers that would overlap move down
        parts.append(f'<text x="{RIGHT + 5}" y="{below + 4:.1f}">{layer}</text>')
    return _figure(parts, title, f"{title}: share removed", 225)
