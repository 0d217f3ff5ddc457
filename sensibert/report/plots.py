"""Sensitivities, plans and results as pictures and files."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import BlockPlan, Plan, Sensitivity
from ..core.layout import Layout
from .tables import RANKING_HEADER, family_table, ranking_rows, summary

if TYPE_CHECKING:  # matplotlib is slow to import and may be missing
    from matplotlib.axes import Axes

CURVES_HEADER = ("site", "units_gone", "units", "predicted_rise")
LOWEST_RISE = 1e-4  # where the logarithmic axis of curves.png begins


def write_report(
    folder: str | Path, result: Mapping[str, Any], sensitivity: Sensitivity | None, plan: Plan | None
) -> list[Path]:
    """Write a report into `folder`, which is created if needed. Returns its files, sorted.

    result: the content of result.json, for summary.txt. With a plan: kept.png. With a ranking of tensors: ranking.csv
    and sensitivity.png. With predicted curves (method obs): curves.csv and curves.png. Without matplotlib there are no
    pictures, and the summary says so."""
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
            labels = "sensitivity", "mean |weight · gradient|"
            _draw_tensors(folder / "sensitivity.png", sensitivity.layout, sensitivity.tensors, *labels)
    if sensitivity is not None and sensitivity.curves:
        units = {site.name: site.units for site in sensitivity.layout.sites}
        rows = [(s, n, units[s], f"{r:.4e}") for s, curve in sensitivity.curves.items() for n, r in curve]
        _write_csv(folder / "curves.csv", [CURVES_HEADER, *rows])
        if pictures:
            _draw_curves(folder / "curves.png", sensitivity)
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
        return _draw_tensors(path, plan.layout, shares, "kept", "share of the elements", top=1)
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


def _draw_tensors(
    path: Path, layout: Layout, values: Mapping[str, float], title: str, label: str, top: float | None = None
) -> None:
    """One value per weight as a heat map: layers along x, the weights of a layer along y, in the order of a pass.

    top: the value at the end of the color scale, which then begins at 0."""
    from matplotlib.figure import Figure

    owner = {m.parameter: site.layer for site in layout.sites for m in site.members}
    layers = sorted(set(owner.values()))
    rows: dict[str, dict[int, float]] = {role(name): {} for name in owner if name in values}
    for parameter, value in values.items():
        rows[role(parameter)][owner[parameter]] = value
    cells = [[row.get(layer, float("nan")) for layer in layers] for row in rows.values()]
    figure = Figure(figsize=(3.6 + 0.55 * len(layers), 1.4 + 0.42 * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(cells, aspect="auto", cmap="viridis", vmin=None if top is None else 0, vmax=top)
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
    """Predicted rise of the loss over the share of units removed, one line per site; smaller rises are drawn at
    LOWEST_RISE."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = dict(zip(("head", "ffn"), figure.subplots(1, 2, sharey=True)))
    sites = [site for site in sensitivity.layout.sites if site.units]
    last, colors = max(1, max(site.layer for site in sites)), colormaps["viridis"]
    for site in sites:
        gone, rises = zip(*sensitivity.curves[site.name])
        heights = [max(rise, LOWEST_RISE) for rise in rises]
        axes[site.kind].plot([n / site.units for n in gone], heights, "o-", ms=3, color=colors(site.layer / last))
    for kind, axis in axes.items():
        title = {"head": "attention heads of a layer", "ffn": "FFN neurons of a layer"}[kind]
        axis.set(title=title, xlabel="share of units removed")
        axis.set(yscale="log", ylim=(LOWEST_RISE, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes["head"].set_ylabel("predicted rise of the loss")
    scale, whole = ScalarMappable(Normalize(0, last), colors), MaxNLocator(integer=True)
    figure.colorbar(scale, ax=list(axes.values()), label="layer", ticks=whole)
    figure.savefig(path, dpi=130)
