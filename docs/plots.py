"""bench/results/bench_accuracy.jsonl -> docs/accuracy.png: what stays of the dense score against what is left of the
encoder.

One panel a task, one line a method with the standard deviation over seeds, 100 % as a dashed line. Points stand at the
true share: layer dropping cannot meet every budget. Use: make readme
"""

import importlib.util
import math
from pathlib import Path

from tables import GRIDS, METHODS, ROOT, load, own_recovery, pooled, scores, task_label

COLORS = ("#2f6f9f", "#c0603a", "#5b8f4e", "#8a5fa8", "#b8933a", "#4fa3a3", "#a0526d", "#7a7a7a")
COLUMNS = 3
LEAST_SPAN = 6.0  # percent that a panel shows
Point = tuple[float, float, float]


def curves(rows: list[dict]) -> dict[str, dict[str, list[Point]]]:
    """task -> method -> [(share left, share of the dense score, its standard deviation), all in percent], by share.

    Budgets of parameters, methods that cut, the default recovery. The mean over all runs of a GPU and of a CPU, each
    beside the dense runs of the same seeds and place."""
    found: dict[str, dict[str, dict[str, list[dict]]]] = {}
    for row in scores(rows):
        _, budget, method = row["case"].split(maxsplit=2)
        shown = budget.endswith("%params") and method not in ("dense", *GRIDS) and not own_recovery(row)
        if shown and row.get("ratio"):
            task = task_label({**row, "place": None})
            found.setdefault(task, {}).setdefault(method, {}).setdefault(budget, []).append(row)
    return {
        task: {method: sorted(map(_point, groups.values())) for method, groups in methods.items()}
        for task, methods in sorted(found.items())
    }


def _point(group: list[dict]) -> Point:
    """Of the rows of one method and budget, one a place."""
    budget = float(group[0]["case"].split()[1].removesuffix("%params"))
    left = 100 * group[0]["encoder_share"] if "encoder_share" in group[0] else budget
    runs = [(100 * row["ratio"], row.get("seeds", 1)) for row in group]
    spreads = [(row.get("std") or 0.0) / row["value"] for row in group]
    free = sum(seeds - 1 for _, seeds in runs)
    squares = sum((seeds - 1) * (stays * spread) ** 2 for (stays, seeds), spread in zip(runs, spreads, strict=True))
    return left, pooled(runs), math.sqrt(squares / free) if free else 0.0


def draw(path: Path, found: dict[str, dict[str, list[Point]]]) -> None:
    from matplotlib.figure import Figure

    names = {name for lines in found.values() for name in lines}
    methods = [name for name in METHODS if name in names] + sorted(names - set(METHODS))
    columns = min(COLUMNS, len(found))
    lines_of_panels = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.2 * columns + 1.9, 3.4 * lines_of_panels), layout="constrained")
    axes = figure.subplots(lines_of_panels, columns, squeeze=False).flatten()
    shown = {}
    for axis, (task, lines) in zip(axes, found.items()):
        shown["dense"] = axis.axhline(100, color="black", linestyle="--", linewidth=1)
        for method in methods:
            if method in lines:
                left, stays, spread = zip(*lines[method])
                color, width = COLORS[methods.index(method) % len(COLORS)], 2.2 if method == "ours" else 1.2
                shown[method] = axis.errorbar(
                    left, stays, spread, color=color, linewidth=width, marker="o", markersize=4, capsize=3
                )
        axis.set(title=task, xlabel="% of the encoder's parameters left", ylabel="% of the dense score")
        axis.set_xlim(0, 104)
        low, high = axis.get_ylim()
        short = max(0.0, LEAST_SPAN - (high - low)) / 2  # differences within the noise shall look like it
        axis.set_ylim(low - short, high + short)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    order = sorted(shown, key=["dense", *methods].index)
    figure.legend([shown[name] for name in order], order, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    lines = curves(load(ROOT / "bench" / "results"))
    if importlib.util.find_spec("matplotlib") is None:
        print("docs/accuracy.png stays as it was: matplotlib is not installed")
    elif lines:
        draw(ROOT / "docs" / "accuracy.png", lines)
