"""Artifacts and results as pictures and files."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from ..core.artifacts import Plan, Sensitivity
from ..core.layout import Layout
from .tables import RANKING_HEADER, kept_rows, ranking_rows, structure_rows, summary, what_is_left


def _bars(axis, title: str, kept: list[int], whole: list[int]) -> None:
    places = range(len(kept))
    axis.bar(places, whole, color="#d9dee4", label="dense")
    axis.bar(places, kept, color="#2f6f9f", label="kept")
    for place, value in zip(places, kept):
        axis.annotate(str(value), (place, value), ha="center", va="bottom", fontsize=8)
    axis.set(title=title, xlabel="layer", xticks=list(places))
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_kept(path: Path, rows: list[tuple]) -> None:
    from matplotlib.figure import Figure  # not pyplot: the caller's backend is not ours to choose

    figure = Figure(figsize=(4 + 0.7 * len(rows), 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    _bars(axes[0], "attention heads kept", [r[1] for r in rows], [r[2] for r in rows])
    _bars(axes[1], "FFN width kept", [r[3] for r in rows], [r[4] for r in rows])
    figure.savefig(path, dpi=130)


def _draw_left(path: Path, plan: Plan) -> None:
    if plan.grid is None:
        return _draw_kept(path, structure_rows(plan.layout, plan.keep))
    shares = {name: kept / of for name, kept, of, _ in kept_rows(plan.layout, plan.keep, plan.grid) if of}
    _draw_tensors(path, plan.layout, shares, "kept", "share of the weights", vmin=0, vmax=1)


def _draw_tensors(path: Path, layout: Layout, values: Mapping[str, float], title: str, label: str, **scale) -> None:
    """One number a weight tensor: layers across, the tensors of a layer down in the order of its forward pass."""
    from matplotlib.figure import Figure

    owner = {m.parameter: site.layer for site in layout.sites for m in site.members}
    layers = sorted(set(owner.values()))
    names: dict[str, dict[int, float]] = {_role(name): {} for name in owner if name in values}
    for parameter, value in values.items():
        names[_role(parameter)][owner[parameter]] = value
    grid = [[row.get(layer, float("nan")) for layer in layers] for row in names.values()]
    figure = Figure(figsize=(3.6 + 0.55 * len(layers), 1.4 + 0.42 * len(names)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis", **scale)
    axis.set(title=title, xlabel="layer")
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(names)), list(names))
    figure.colorbar(image, ax=axis, label=label)
    figure.savefig(path, dpi=130)


CURVE_FLOOR = 1e-4
CURVES_HEADER = ("site", "units_gone", "units", "predicted_rise")


def _draw_curves(path: Path, sensitivity: Sensitivity) -> None:
    """Predicted rise of the loss against the share of units gone, a line a site; it ends at CURVE_FLOOR below."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = dict(zip(("head", "ffn"), figure.subplots(1, 2, sharey=True)))
    sites = [site for site in sensitivity.layout.sites if site.units]
    scale = ScalarMappable(Normalize(0, max(1, max(site.layer for site in sites))), colormaps["viridis"])
    for site in sites:
        gone, rises = zip(*sensitivity.curves[site.name])
        heights = [max(rise, CURVE_FLOOR) for rise in rises]
        axes[site.kind].plot([n / site.units for n in gone], heights, "o-", ms=3, color=scale.to_rgba(site.layer))
    for kind, axis in axes.items():
        axis.set(title={"head": "heads of a layer", "ffn": "FFN of a layer"}[kind], xlabel="share of the units gone")
        axis.set(yscale="log", ylim=(CURVE_FLOOR, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes["head"].set_ylabel("predicted rise of the loss")
    figure.colorbar(scale, ax=list(axes.values()), label="layer")
    figure.savefig(path, dpi=130)


def _role(parameter: str) -> str:
    """`encoder.layer.3.output.dense.weight` -> `output.dense`: the tensor's name without its layer."""
    parts = parameter.removesuffix(".weight").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def write_report(folder: str | Path, result: dict, sensitivity: Sensitivity | None, plan: Plan | None) -> list[Path]:
    """summary.txt, ranking.csv, kept.png and sensitivity.png into folder, with obs also curves.csv and curves.png; the
    pictures need matplotlib."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = [summary(result)]
    if plan is not None:
        text.append(what_is_left(plan))
    drawn = importlib.util.find_spec("matplotlib") is not None
    if not drawn:
        text.append("No pictures: matplotlib is not installed.")
    (folder / "summary.txt").write_text("\n\n".join(text) + "\n")
    if plan is not None and drawn:
        _draw_left(folder / "kept.png", plan)
    if sensitivity is not None and sensitivity.tensors:
        with open(folder / "ranking.csv", "w", newline="") as file:
            csv.writer(file).writerows([RANKING_HEADER, *ranking_rows(sensitivity, plan)])
        if drawn:
            said = "tensor sensitivity", "mean |w · gradient|"
            _draw_tensors(folder / "sensitivity.png", sensitivity.layout, sensitivity.tensors, *said)
    if sensitivity is not None and sensitivity.curves:
        units = {site.name: site.units for site in sensitivity.layout.sites}
        rows = [(s, n, units[s], f"{r:.4e}") for s, curve in sensitivity.curves.items() for n, r in curve]
        with open(folder / "curves.csv", "w", newline="") as file:
            csv.writer(file).writerows([CURVES_HEADER, *rows])
        if drawn:
            _draw_curves(folder / "curves.png", sensitivity)
    return sorted(folder.iterdir())
