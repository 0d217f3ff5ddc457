"""Sensitivities, plans and results as pictures and files."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.artifacts import BlockPlan, Plan, Sensitivity
from ..core.layout import Layout
from .history import FILE, Moment, write_history
from .run_picture import draw_run
from .tables import RANKING_HEADER, family_table, ranking_rows, summary

if TYPE_CHECKING:  # matplotlib is slow to import and may be missing
    from matplotlib.axes import Axes

CURVES_HEADER = ("site", "units_gone", "units", "predicted_rise")
LOWEST_RISE = 1e-4  # where the logarithmic axis of curves.png begins


def write_report(
    folder: str | Path,
    result: Mapping[str, Any],
    sensitivity: Sensitivity | None,
    plan: Plan | None,
    moments: Sequence[Moment] = (),
) -> list[Path]:
    """Write a report into `folder`, which is created if needed. Returns its files, sorted.

    result: the content of result.json, for summary.txt. With a plan: kept.png. With a ranking of tensors: ranking.csv
    and sensitivity.png. With predicted curves (method obs): curves.csv and curves.png. With the moments of a run:
    run.csv and run.png. Without matplotlib there are no pictures, and the summary says so."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = [summary(result)]
    if plan is not None:
        text.append(plan.table())
    pictures = importlib.util.find_spec("matplotlib") is not None
    if not pictures:
        text.append("No pictures: matplotlib is not installed.")
    (folder / "summary.txt").write_text("\n\n".join(text) + "\n")
    if plan is not None and pictures:
        _draw_plan(folder / "kept.png", plan)
    if sensitivity is not None and sensitivity.tensors:
        _write_csv(folder / "ranking.csv", [RANKING_HEADER, *ranking_rows(sensitivity, plan)])
        if pictures:
            _draw_sensitivity(folder / "sensitivity.png", sensitivity)
    if sensitivity is not None and sensitivity.curves:
        units = {site.name: site.units for site in sensitivity.layout.sites}
        rows = [(s, n, units[s], f"{r:.4e}") for s, curve in sensitivity.curves.items() for n, r in curve]
        _write_csv(folder / "curves.csv", [CURVES_HEADER, *rows])
        if pictures:
            _draw_curves(folder / "curves.png", sensitivity)
    if moments:
        write_history(folder / FILE, moments)
        if pictures:
            metric = next(iter(result["metrics"] or {}), "score")
            draw_run(folder / "run.png", moments, result["encoder_params_before"], metric)
    return sorted(folder.iterdir())


def write_front(folder: str | Path, result: Mapping[str, Any]) -> None:
    """Write the report of a family into `folder`, which is created: summary.txt, and front.png, its scores over its
    encoder parameters. result: the content of the family's result.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.txt").write_text(family_table(result) + "\n")
    rows = [row for row in result["rows"] if row["metrics"]]
    if importlib.util.find_spec("matplotlib") is None or not rows:
        return
    from matplotlib.figure import Figure

    metric, figure = result["metric"], Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    sizes, scores = zip(*sorted((row["encoder_params_after"] / 1e6, row["metrics"][metric]) for row in rows))
    axis.plot(sizes, scores, "o-", color="#2f6f9f", label="trimmed")
    for row in rows:
        place = row["encoder_params_after"] / 1e6, row["metrics"][metric]
        axis.annotate(row["budget"], place, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    whole = result["encoder_params_before"] / 1e6
    if baseline := result.get("metrics_baseline"):
        axis.plot([whole], [baseline[metric]], "s", color="#555", label="not trimmed")
        axis.axhline(baseline[metric], color="#555", lw=0.8, ls=":")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set(xlabel="encoder parameters, millions", ylabel=metric, xlim=(0, 1.05 * whole))
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "front.png", dpi=130)


def _write_csv(path: Path, rows: list[tuple]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def _draw_plan(path: Path, plan: Plan) -> None:
    """Bars of heads and FFN widths for a plan of units, the kept share of every weight for a plan of blocks."""
    if isinstance(plan, BlockPlan):
        shares = {name: kept / whole for name, kept, whole, _ in plan.table_rows() if whole}
        cells = {name: f"{100 * value:.0f}" for name, value in shares.items()}
        return _draw_tensors(path, plan.layout, shares, cells, "kept", "share of the elements", Scale(0, 1, "linear"))
    from matplotlib.figure import Figure  # not pyplot, which would set a backend for the whole process

    rows = plan.table_rows()
    figure = Figure(figsize=(4 + 0.7 * len(rows), 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    _bars(axes[0], "attention heads", [r[1] for r in rows], [r[2] for r in rows])
    _bars(axes[1], "FFN width", [r[3] for r in rows], [r[4] for r in rows])
    figure.savefig(path, dpi=130)


def _bars(axis: Axes, title: str, kept: list[int], whole: list[int]) -> None:
    layers = range(len(kept))
    axis.bar(layers, whole, color="#d9dee4", label="before")
    axis.bar(layers, kept, color="#2f6f9f", label="kept")
    for layer, value in zip(layers, kept):
        axis.annotate(str(value), (layer, value), ha="center", va="bottom", fontsize=8)
    axis.set(title=title, xlabel="layer", xticks=list(layers))
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


class Scale(NamedTuple):
    """The values at both ends of a color scale, and a scale of matplotlib between them."""

    low: float
    high: float
    kind: str


def _draw_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """A logarithmic scale, so that one tensor far above the others does not hide how these differ."""
    positive = [value for value in sensitivity.tensors.values() if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    power = math.floor(math.log10(low))
    scaled = {name: value / 10.0**power for name, value in sensitivity.tensors.items()}
    cells = {name: f"{value:.1f}" if value < 100 else f"{value:,.0f}" for name, value in scaled.items()}
    label = f"mean |weight · gradient| (numbers: in 1e{power})"
    scale = Scale(low, max(high, 1.01 * low), "log")
    _draw_tensors(path, sensitivity.layout, sensitivity.tensors, cells, "sensitivity", label, scale)


def _draw_tensors(
    path: Path,
    layout: Layout,
    values: Mapping[str, float],
    texts: Mapping[str, str],
    title: str,
    label: str,
    scale: Scale,
) -> None:
    """One value per weight as a heat map with its text: layers along x, the weights of a layer along y, in the order of
    a pass."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    owner = {m.parameter: site.layer for site in layout.sites for m in site.members}
    layers = sorted(set(owner.values()))
    rows: dict[str, dict[int, str]] = {role(name): {} for name in owner if name in values}
    for parameter in values:
        rows[role(parameter)][owner[parameter]] = parameter
    cells = [[values.get(row.get(layer, ""), math.nan) for layer in layers] for row in rows.values()]
    figure = Figure(figsize=(3.6 + 0.62 * len(layers), 1.4 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    norm = LogNorm(scale.low, scale.high, clip=True) if scale.kind == "log" else Normalize(scale.low, scale.high)
    image = axis.imshow(cells, aspect="auto", cmap="viridis", norm=norm)
    for y, row in enumerate(rows.values()):
        for x, layer in enumerate(layers):
            if (name := row.get(layer)) is not None:
                color = "white" if norm(values[name]) < 0.6 else "black"
                axis.text(x, y, texts[name], ha="center", va="center", fontsize=8, color=color)
    axis.set(title=title, xlabel="layer")
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_yticks(range(len(rows)), list(rows))
    figure.colorbar(image, ax=axis, label=label)
    figure.savefig(path, dpi=130)


def role(parameter: str) -> str:
    """`encoder.layer.3.output.dense.weight` -> `output.dense`: the name of a tensor inside its layer."""
    parts = parameter.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _draw_curves(path: Path, sensitivity: Sensitivity) -> None:
    """Predicted rise of the loss over the share of units removed, one line per site. A logarithm needs a lowest rise:
    smaller ones, and falls, are drawn there as triangles, and a note says so."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = dict(zip(("head", "ffn"), figure.subplots(1, 2, sharey=True)))
    sites = [site for site in sensitivity.layout.sites if site.units]
    last, colors, clipped = max(1, max(site.layer for site in sites)), colormaps["viridis"], False
    for site in sites:
        curve = [(gone / site.units, rise) for gone, rise in sensitivity.curves[site.name] if gone]
        color, axis = colors(site.layer / last), axes[site.kind]
        axis.plot([x for x, _ in curve], [max(rise, LOWEST_RISE) for _, rise in curve], "o-", ms=3, color=color)
        if low := [x for x, rise in curve if rise < LOWEST_RISE]:
            axis.plot(low, [LOWEST_RISE] * len(low), "v", ms=6, color=color, clip_on=False)
            clipped = True
    for kind, axis in axes.items():
        title = {"head": "attention heads of a layer", "ffn": "FFN neurons of a layer"}[kind]
        axis.set(title=title, xlabel="share of units removed")
        axis.set(yscale="log", ylim=(LOWEST_RISE, None), xlim=(0, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    axes["head"].set_ylabel("predicted rise of the loss")
    if clipped:
        figure.supxlabel(f"Triangles: a rise below {LOWEST_RISE:g}, or a fall.", fontsize=9)
    scale, whole = ScalarMappable(Normalize(0, last), colors), MaxNLocator(integer=True)
    figure.colorbar(scale, ax=list(axes.values()), label="layer", ticks=whole)
    figure.savefig(path, dpi=130)
