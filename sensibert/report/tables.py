"""Sensitivities and results as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.artifacts import Plan, Sensitivity
from ..core.config import BASELINE
from ..core.statistics import FORMER_METHODS
from ..core.text import share, table
from .phase import LABELS

THROUGHPUT = {"tokens_per_s": "tokens a second", "ops_per_step": "ops a step", "peak_memory_gb": "peak memory, GB"}


def summary(result: Mapping[str, Any]) -> str:
    """The summary of a run as text: sizes before and after, scores at the cut and at the end.

    result: the content of result.json."""
    baseline = FORMER_METHODS.get(result["method"], result["method"]) == BASELINE
    made_by = "baseline (not trimmed)" if baseline else f"{result['budget']} by {result['method']}"
    sizes: list[tuple[object, ...]] = []
    for label, name in (("encoder parameters", "encoder_params"), ("all parameters", "total_params")):
        before, after = result[f"{name}_before"], result[f"{name}_after"]
        sizes.append((label, before, after, share(after, before)))
    before, after = result["flops_before"], result["flops_after"]
    label = f"{result['scope']} GFLOPs at {result['flops_length']} tokens"
    sizes.append((label, f"{before / 1e9:.3f}", f"{after / 1e9:.3f}", share(after, before)))
    sizes += _on_a_device(result)
    parts = [f"{result['task']}, {made_by}", table(("", "before", "after", "left"), sizes)]
    speed = [
        (THROUGHPUT[name], values.get("before", "-"), values.get("after", "-"))
        for name, values in (result.get("throughput") or {}).items()
    ]
    if speed:
        parts.append(table(("training", "before the cut", "after the cut"), speed))
    metrics, at_cut = result.get("metrics") or {}, _at_cut(result)
    if at_cut:
        scores = [(name, f"{at_cut[name]:.4f}" if name in at_cut else "-", f"{v:.4f}") for name, v in metrics.items()]
        parts += [table(("", "at the cut", "at the end"), scores), "At the cut: the model just before it was trimmed."]
    elif metrics:
        parts.append(table(("", "at the end"), [(name, f"{value:.4f}") for name, value in metrics.items()]))
    if (step := result.get("best_step")) is not None:
        parts.append(f"At the end: the best of {len(result['evaluations'])} evaluations, at step {step}.")
    if latency := result.get("latency"):
        parts.append(f"Latency: one forward pass on the CPU, {latency['threads']} threads.")
    if seconds := result.get("seconds"):
        spent = (f"{LABELS.get(phase, phase)} {value:.1f}" for phase, value in seconds.items())
        parts.append(f"Seconds: {', '.join(spent)}.")
    parts += [f"Warning: {text}." for text in result.get("warnings", ())]
    return "\n\n".join(parts)


def _on_a_device(result: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Rows of the file's size and of latencies, as far as the result has them."""
    rows, latency = [], result.get("latency") or {}
    if "mb_after" in result:
        rows.append(("model file, MB", result["mb_before"], result["mb_after"]))
    for name, times in latency.items():
        if name.startswith("batch_"):
            batch = name.removeprefix("batch_").removesuffix("_ms")
            rows.append((f"latency of {batch} x {latency['length']} tokens, ms", times["before"], times["after"]))
    return [(label, f"{before:.1f}", f"{after:.1f}", share(after, before)) for label, before, after in rows]


def _at_cut(result: Mapping[str, Any]) -> dict[str, float]:
    """Scores just before trimming; their name up to version 0.1 was metrics_dense."""
    return result.get("metrics_at_cut") or result.get("metrics_dense") or {}


def ranking(sensitivity: Sensitivity, most: int = 10) -> str:
    """A table of the `most` most sensitive tensors."""
    rows = [(rank, name, value, units) for rank, name, value, _, units in ranking_rows(sensitivity)[:most]]
    return table(("rank", "tensor", "mean |w g|", "units"), rows, left=(1,))


RANKING_HEADER = ("rank", "tensor", "mean_abs_w_grad", "units_kept", "units")


def ranking_rows(sensitivity: Sensitivity, plan: Plan | None = None) -> list[tuple[int, str, str, int, int]]:
    """Rows under RANKING_HEADER, the most sensitive tensor first; without a plan all units count as kept.

    Units are heads or neurons, or with a grid the blocks of the tensor."""
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
