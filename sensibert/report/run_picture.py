"""The picture of a run: loss, score and size against steps, with the cuts marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .history import Moment, cut_steps, losses, scores, sizes

if TYPE_CHECKING:  # matplotlib is slow to import and may be missing
    from matplotlib.axes import Axes


def draw_run(path: Path, moments: Sequence[Moment], params_before: int, metric: str) -> None:
    """A panel each for the loss, the score if there is one, and the encoder's size. metric: the name of the score."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    scored, lost = scores(moments), losses(moments)
    titles = [*(["training loss"] if lost else []), *([metric] if scored else []), "encoder parameters left"]
    figure = Figure(figsize=(7.2, 0.7 + 1.6 * len(titles)), layout="constrained")
    axes = dict(zip(titles, figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0]))
    if lost:
        axes["training loss"].plot(*zip(*lost), color="#2f6f9f")
    if scored:
        axes[metric].plot(*zip(*scored), "o--", color="#2f6f9f", linewidth=1)
        for step, score in scored:
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes[metric].annotate(f"{score:.4f}", (step, score), **place)
        axes[metric].margins(y=0.35)
    left = axes["encoder parameters left"]
    steps, sizes_ = zip(*sizes(moments, params_before))
    left.plot(steps, [size / params_before for size in sizes_], color="#2f6f9f", drawstyle="steps-post")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.set(ylim=(0, 1.08), xlabel="step")
    for title, axis in axes.items():
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        _mark_cuts(axis, cut_steps(moments))
    first = axes[titles[0]]
    for step in cut_steps(moments)[:1]:
        first.annotate("cut", (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points",
                       fontsize=8, color="0.4")  # fmt: skip
    left.set_xlim(0, moments[-1].step * 1.03)
    figure.savefig(path, dpi=130)


def _mark_cuts(axis: Axes, steps: Sequence[int]) -> None:
    for step in steps:
        axis.axvline(step, color="0.6", linestyle=":", linewidth=1)
