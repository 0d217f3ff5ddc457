"""bench/results/bench_accuracy_runs.jsonl -> two pictures of the score kept against the share of the encoder left.

docs/accuracy.png: the mean over the tasks, three methods. docs/accuracy_by_task.png: a panel a task and rival, with
bands of one standard deviation over seeds. Points are at the true share: layer dropping cannot meet every budget.
Use: make readme
"""

import importlib.util
import math
import statistics
from pathlib import Path

from accuracy_tables import GRIDS, METHODS, SHOWN, kept, own_recovery, pooled, scores, share_kept, task_label
from rows import ROOT, load

OURS, RIVAL = "#1f5f99", "#c0603a"
LEAST_SPAN = 6.0  # percent that a panel shows
Point = tuple[float, float, float]
MEANS = {"ours": OURS, "torch-pruning": RIVAL, "magnitude": "#777777"}  # of the picture of means


def means(rows: list[dict]) -> dict[str, list[tuple[float, float, int]]]:
    """method -> [(share left, share of the untrimmed score kept, number of tasks), shares in percent], by share left.

    The mean over tasks that the tables have; a task counts as 100 % at most."""
    chosen = [row for row in scores(rows) if row["case"].split()[1].endswith("%params")]
    found: dict[str, list[tuple[float, float, int]]] = {}
    for budget, methods in kept(chosen).items():
        for method in MEANS.keys() & methods.keys():
            left = [100 * row["encoder_share"] for row in chosen if row["case"].endswith(f" {budget} {method}")]
            shares = [100 * share_kept(runs) for runs in methods[method].values()]
            found.setdefault(method, []).append((statistics.mean(left), statistics.mean(shares), len(shares)))
    return {method: sorted(points) for method, points in found.items()}


def draw_means(path: Path, found: dict[str, list[tuple[float, float, int]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    most = max(tasks for points in found.values() for _, _, tasks in points)
    axis.axhline(100, color="black", linestyle="--", linewidth=1)
    axis.annotate("untrimmed model", (0.5, 100), xytext=(0, 5), textcoords="offset points", fontsize=9)
    for method in (name for name in MEANS if name in found):
        ours, color = method == "ours", MEANS[method]
        left, stays, tasks = zip(*found[method], strict=True)
        name = f"{SHOWN[method]} (ours)" if ours else SHOWN[method]
        axis.plot(left, stays, color=color, linewidth=2.6 if ours else 1.8, marker="o", markersize=5, label=name)
        for x, y, number in found[method]:
            note = [f"{y:.1f}"] * ours + [f"{number} of {most} tasks"] * (number < most)
            place = {"xytext": (0, 8 if ours else -14), "textcoords": "offset points", "ha": "center"}
            place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axis.annotate(", ".join(note), (x, y), color=color, fontsize=9, **place)
    axis.legend(loc="lower right", frameon=False, fontsize=11)
    low, _ = axis.get_ylim()
    axis.set(
        xlim=(0, 80),
        ylim=(low, 102.5),
        xlabel="encoder parameters left (%)",
        ylabel="score kept (% of the untrimmed model)",
    )
    axis.set_title(f"MiniLM-L6, mean over {most} tasks", fontsize=11)
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def curves(rows: list[dict]) -> dict[str, dict[str, list[Point]]]:
    """task -> method -> [(share left, share of the untrimmed score, its standard deviation), in percent], by share.

    Budgets of parameters, methods that cut, the default recovery. The mean over all runs of a GPU and of a CPU, each
    beside the untrimmed runs of the same seeds and place."""
    found: dict[str, dict[str, dict[str, list[dict]]]] = {}
    for row in scores(rows):
        _, budget, method = row["case"].split(maxsplit=2)
        shown = budget.endswith("%params") and method not in ("dense", *GRIDS) and not own_recovery(row)
        if shown and row.get("ratio") is not None:
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
    spreads = [(row.get("std") or 0.0) / (row["value"] or 1.0) for row in group]  # nothing is kept of a score of 0
    free = sum(seeds - 1 for _, seeds in runs)
    squares = sum((seeds - 1) * (stays * spread) ** 2 for (stays, seeds), spread in zip(runs, spreads, strict=True))
    return left, pooled(runs), math.sqrt(squares / free) if free else 0.0


def draw(path: Path, found: dict[str, dict[str, list[Point]]]) -> None:
    """A row of panels a task, a panel a rival: the rival and ours, which every panel repeats."""
    from matplotlib.figure import Figure

    names = {name for lines in found.values() for name in lines} - {"ours"}
    rivals = [name for name in METHODS if name in names] + sorted(names - set(METHODS))
    size = 1.9 * len(rivals) + 0.6, 1.55 * len(found) + 0.7
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(found), len(rivals), squeeze=False, sharex=True, sharey="row")
    for (task, lines), row in zip(found.items(), panels):
        for rival, axis in zip(rivals, row):
            _panel(axis, lines.get(rival), lines.get("ours"))
        row[0].set_ylabel(task)
        low, high = row[0].get_ylim()
        short = max(0.0, LEAST_SPAN - (high - low)) / 2  # so that differences within the noise look small
        row[0].set_ylim(low - short, high + short)
    for rival, axis in zip(rivals, panels[0]):
        axis.set_title(rival, fontsize=10, color=RIVAL)
    panels[0][0].set_xlim(0, 84)
    figure.supxlabel("encoder parameters left (%)", fontsize=10)
    figure.supylabel("score kept (%)", fontsize=10)
    figure.suptitle("ours", fontsize=10, color=OURS, x=0.995, ha="right")
    figure.savefig(path, dpi=110)


def _panel(axis, rival: list[Point] | None, ours: list[Point] | None) -> None:
    axis.axhline(100, color="0.7", linewidth=0.8)
    for line, color in ((rival, RIVAL), (ours, OURS)):
        if line is None:
            continue
        left, stays, spread = zip(*line, strict=True)
        low, high = ([y + sign * s for y, s in zip(stays, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(left, low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(left, stays, color=color, linewidth=1.6, marker="o", markersize=3)
    if rival is None:
        axis.annotate("not run", (0.5, 0.08), xycoords="axes fraction", ha="center", fontsize=8, color="0.5")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    measured = load(ROOT / "bench" / "results")
    if importlib.util.find_spec("matplotlib") is None:
        print("the pictures in docs/ are unchanged: matplotlib is not installed")
    else:
        draw_means(ROOT / "docs" / "accuracy.png", means(measured))
        draw(ROOT / "docs" / "accuracy_by_task.png", curves(measured))
