"""Artifacts and results -> tables and pictures for people."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from .artifacts import Layout, Plan, Sensitivity
from .cost import counts_of


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: Collection[int] = (0,)) -> str:
    """Aligned plain text: columns of words (`left`, the first) to the left, numbers to the right."""
    cells = [list(header)] + [[f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    lines = []
    for row in cells:
        placed = (cell.ljust(w) if c in left else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths)))
        lines.append("  ".join(placed).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def share(after: float, before: float) -> str:
    return f"{100 * after / before:.1f} %" if before else "-"


def summary(result: dict) -> str:
    """The table a run ends with, from result.json."""
    rows = []
    for label, name in (("encoder parameters", "encoder_params"), ("all parameters", "total_params")):
        before, after = result[f"{name}_before"], result[f"{name}_after"]
        rows.append((label, before, after, share(after, before)))
    before, after = result["flops_before"], result["flops_after"]
    label = f"{result['scope']} GFLOPs at {result['flops_length']} tokens"
    rows.append((label, f"{before / 1e9:.3f}", f"{after / 1e9:.3f}", share(after, before)))
    dense = result.get("metrics_dense") or {}
    for name, value in (result.get("metrics") or {}).items():
        then = f"{dense[name]:.4f}" if name in dense else "-"
        rows.append((name, then, f"{value:.4f}", ""))
    text = table(("", "dense", "trimmed" if result["method"] != "dense" else "tuned", "left"), rows)
    return f"{text}\n\nThe dense scores are those of this run just before the cut." if dense else text


def ranking(sensitivity: Sensitivity, most: int = 10) -> str:
    """The table of the most sensitive tensors."""
    rows = [(rank, name, value, units) for rank, name, value, _, units in ranking_rows(sensitivity)[:most]]
    return table(("rank", "tensor", "mean |w g|", "units"), rows, left=(1,))


def structure_rows(layout: Layout, keep: dict | None = None) -> list[tuple]:
    """(layer, heads kept, heads, FFN width kept, width) for every layer."""
    counts, rows = counts_of(layout, keep), {}
    for site in layout.sites:
        rows.setdefault(site.layer, {})[site.kind] = (counts[site.name], site.units)
    return [(f"layer {n}", *row.get("head", (0, 0)), *row.get("ffn", (0, 0))) for n, row in sorted(rows.items())]


STRUCTURE_HEADER = ("", "heads", "of", "ffn width", "of")


def ranking_rows(sensitivity: Sensitivity, plan: Plan | None = None) -> list[tuple]:
    """(rank, tensor, mean |w g|, units kept, units): the parameter tensors, most sensitive first."""
    layout = sensitivity.layout if plan is None else plan.layout
    owner = {m.parameter: site for site in layout.sites for m in site.members}
    rows = []
    for rank, (name, value) in enumerate(sensitivity.tensors.items(), 1):
        site = owner[name]
        kept = int(plan.keep[site.name].sum()) if plan is not None else site.units
        rows.append((rank, name, f"{value:.3e}", kept, site.units))
    return rows


RANKING_HEADER = ("rank", "tensor", "mean_abs_w_grad", "units_kept", "units")


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


def _draw_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    from matplotlib.figure import Figure

    owner = {m.parameter: site for site in sensitivity.layout.sites for m in site.members}
    layers = sorted({site.layer for site in sensitivity.layout.sites})
    names: dict[str, dict[int, float]] = {}
    for site in sensitivity.layout.sites:  # rows in the order of the forward pass
        for member in site.members:
            if member.parameter in sensitivity.tensors:
                names.setdefault(_role(member.parameter), {})
    for parameter, value in sensitivity.tensors.items():
        names[_role(parameter)][owner[parameter].layer] = value
    grid = [[row.get(layer, float("nan")) for layer in layers] for row in names.values()]
    figure = Figure(figsize=(3.6 + 0.55 * len(layers), 1.4 + 0.42 * len(names)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set(title="tensor sensitivity", xlabel="layer")
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(names)), list(names))
    figure.colorbar(image, ax=axis, label="mean |w · gradient|")
    figure.savefig(path, dpi=130)


def _role(parameter: str) -> str:
    """`encoder.layer.3.output.dense.weight` -> `output.dense`: the tensor's name without its layer."""
    parts = parameter.removesuffix(".weight").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def write_report(folder: str | Path, result: dict, sensitivity: Sensitivity | None, plan: Plan | None) -> list[Path]:
    """summary.txt, ranking.csv, kept.png and sensitivity.png into folder; the pictures need matplotlib."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = [summary(result)]
    if plan is not None:
        text.append(table(STRUCTURE_HEADER, structure_rows(plan.layout, plan.keep)))
    drawn = importlib.util.find_spec("matplotlib") is not None
    if not drawn:
        text.append("No pictures: matplotlib is not installed.")
    (folder / "summary.txt").write_text("\n\n".join(text) + "\n")
    if plan is not None and drawn:
        _draw_kept(folder / "kept.png", structure_rows(plan.layout, plan.keep))
    if sensitivity is not None and sensitivity.tensors:
        with open(folder / "ranking.csv", "w", newline="") as file:
            csv.writer(file).writerows([RANKING_HEADER, *ranking_rows(sensitivity, plan)])
        if drawn:
            _draw_sensitivity(folder / "sensitivity.png", sensitivity)
    return sorted(folder.iterdir())
