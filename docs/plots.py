"""bench/results/bench_accuracy.jsonl -> docs/accuracy.png: score against the share of the encoder that is left.

One panel a task, one line a method with the standard deviation over seeds, the dense control as a dashed line. Points
stand at the true share: layer dropping cannot meet every budget. Use: make readme
"""

import importlib.util
import math
from pathlib import Path

from tables import METHODS, ROOT, load, scores, task_label, usual_label

COLORS = ("#2f6f9f", "#c0603a", "#5b8f4e", "#8a5fa8", "#b8933a", "#4fa3a3", "#a0526d", "#7a7a7a")
COLUMNS = 4
LEAST_SPAN = 4.0  # points of score a panel shows


def curves(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """task -> method -> [(share left in percent, score, standard deviation)], by share. Budgets of parameters only.

    A CPU's runs only where the GPU lacks some. What has more than one budget has a panel, of its own where it was a CPU
    or another recovery. Where embeddings went on learning below half, what is above half belongs there too: it is the
    same recovery."""
    chosen = [row for row in scores(rows, everywhere=False) if row["case"].split()[1].endswith("%params")]
    learn = {_by_default(row) for row in chosen if row.get("freeze_embeddings") is False}
    deep = {task_label(row) for row in chosen if _below_half(row)}
    found: dict[str, dict[str, list]] = {}
    other: dict[str, str] = {}  # panels of another recovery than the default one
    for row in chosen:
        _, budget, method = row["case"].split(maxsplit=2)
        label, labels = task_label(row), [task_label(row)]
        if label in learn and method != "dense" and not _below_half(row):
            labels = [*labels[: label in deep], task_label({**row, "freeze_embeddings": False})]
        share = 100 * row["encoder_share"] if "encoder_share" in row else float(budget.removesuffix("%params"))
        for label in labels:
            if label != usual_label(row):
                other[label] = usual_label(row)
            found.setdefault(label, {}).setdefault(method, []).append((share, row["value"], row.get("std") or 0.0))
    for task, usual in other.items():
        lines = found.get(usual, {})
        found[task].setdefault("dense", lines.get("dense", []))  # it has no recovery to choose
    lines = {task for task, methods in found.items() if any(len(points) > 1 for points in methods.values())}
    drawn = {task.split()[0] for task in lines}
    panels = sorted(task for task in found if task in lines or task.split()[0] not in drawn)
    return {task: {method: sorted(points) for method, points in found[task].items()} for task in panels}


def _by_default(row: dict) -> str:
    return task_label({**row, "freeze_embeddings": None})


def _below_half(row: dict) -> bool:
    return float(row["case"].split()[1].removesuffix("%params")) < 50


def draw(path: Path, found: dict[str, dict[str, list[tuple[float, float, float]]]]) -> None:
    from matplotlib.figure import Figure

    names = {name for lines in found.values() for name in lines} - {"dense"}
    methods = [name for name in METHODS if name in names] + sorted(names - set(METHODS))
    columns = min(COLUMNS, len(found))
    lines_of_panels = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.2 * columns + 1.9, 3.4 * lines_of_panels), layout="constrained")
    axes = figure.subplots(lines_of_panels, columns, squeeze=False).flatten()
    shown = {}
    for axis, (task, lines) in zip(axes, found.items()):
        for _, score, _ in lines.get("dense", []):
            shown["dense"] = axis.axhline(score, color="black", linestyle="--", linewidth=1)
        for method in methods:
            if method in lines:
                share, score, spread = zip(*lines[method])
                color = COLORS[methods.index(method) % len(COLORS)]
                weight = 2.2 if method == "ours" else 1.2
                shown[method] = axis.errorbar(
                    share, score, spread, color=color, linewidth=weight, marker="o", markersize=4, capsize=3
                )
        axis.set(title=task, xlabel="% of the encoder's parameters left", ylabel="score in %")
        axis.set_xlim(0, 104)
        low, high = axis.get_ylim()
        short = max(0.0, LEAST_SPAN - (high - low)) / 2  # differences within the noise shall look like it
        axis.set_ylim(low - short, high + short)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    lines = curves(load(ROOT / "bench" / "results"))
    if importlib.util.find_spec("matplotlib") is None:
        print("docs/accuracy.png stays as it was: matplotlib is not installed")
    elif lines:
        draw(ROOT / "docs" / "accuracy.png", lines)
