"""Artifacts and results -> tables and pictures for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from ..core.artifacts import Plan, Sensitivity
from ..core.cost import counts_of, kept_elements
from ..core.grid import Grid
from ..core.layout import Layout


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
    """What a run ends with, from result.json: what it was, and the table."""
    dense = result["method"] in ("baseline", "dense")
    title = f"{result['task']}, {'dense' if dense else result['budget'] + ' by ' + result['method']}"
    rows = []
    for label, name in (("encoder parameters", "encoder_params"), ("all parameters", "total_params")):
        before, after = result[f"{name}_before"], result[f"{name}_after"]
        rows.append((label, before, after, share(after, before)))
    before, after = result["flops_before"], result["flops_after"]
    label = f"{result['scope']} GFLOPs at {result['flops_length']} tokens"
    rows.append((label, f"{before / 1e9:.3f}", f"{after / 1e9:.3f}", share(after, before)))
    at_cut = result.get("metrics_at_cut") or result.get("metrics_dense") or {}
    for name, value in (result.get("metrics") or {}).items():
        then = f"{at_cut[name]:.4f}" if name in at_cut else "-"
        rows.append((name, then, f"{value:.4f}", ""))
    text = f"{title}\n\n{table(('', 'dense', 'tuned' if dense else 'trimmed', 'left'), rows)}"
    return f"{text}\n\nThe dense scores are those of this run just before the cut." if at_cut else text


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


def kept_rows(layout: Layout, keep: Mapping[str, Tensor] | None, grid: Grid | None) -> list[tuple]:
    """(tensor, elements in kept blocks, elements, share) for every weight that a grid masks; [] without one."""
    if grid is None or keep is None:
        return []
    counts = [(w.parameter, kept_elements(w, keep[w.parameter], grid), w.rows * w.cols) for w in layout.weights]
    return [(*count, share(*count[1:])) for count in counts]


KEPT_HEADER = ("tensor", "kept", "of", "left")


def what_is_left(plan: Plan) -> str:
    """The table of a plan: heads and widths by layer, or with a grid what every tensor keeps."""
    if plan.grid is not None:
        return table(KEPT_HEADER, kept_rows(plan.layout, plan.keep, plan.grid))
    return table(STRUCTURE_HEADER, structure_rows(plan.layout, plan.keep))


def ranking_rows(sensitivity: Sensitivity, plan: Plan | None = None) -> list[tuple]:
    """(rank, tensor, mean |w g|, units kept, units): most sensitive first; with a grid its blocks are the units."""
    layout = sensitivity.layout if plan is None else plan.layout
    owner = {m.parameter: site.name for site in layout.sites for m in site.members}
    units = {site.name: site.units for site in layout.sites}
    if sensitivity.grid is not None:
        owner = {w.parameter: w.parameter for w in layout.weights}
        units = {name: score.numel() for name, score in sensitivity.scores.items()}
    rows = []
    for rank, (name, value) in enumerate(sensitivity.tensors.items(), 1):
        whole = units[owner[name]]
        kept = int(plan.keep[owner[name]].sum()) if plan is not None else whole
        rows.append((rank, name, f"{value:.3e}", kept, whole))
    return rows


RANKING_HEADER = ("rank", "tensor", "mean_abs_w_grad", "units_kept", "units")
