"""Sensitivities and results as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.artifacts import Plan, Sensitivity
from ..core.config import BASELINE
from ..core.size_forms import DIVIDED, form_lines
from ..core.statistics import FORMER_METHODS
from ..core.text import number_of, share, table
from .phase import LABELS
from .timings import timings

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
    if "vocabulary_before" in result:
        before, after = result["vocabulary_before"], result["vocabulary_after"]
        sizes.append(("vocabulary", before, after, share(after, before)))
    before, after = result["flops_before"], result["flops_after"]
    label = f"{result['scope']} GFLOPs at {result['flops_length']} tokens"
    sizes.append((label, f"{before / 1e9:.3f}", f"{after / 1e9:.3f}", share(after, before)))
    sizes += _on_a_device(result)
    parts = [f"{result['task']}, {made_by}", table(("", "before", "after", "left"), sizes)]
    if measured := result.get("measured"):
        parts.append(_measured(measured))
    if size := result.get("size"):
        parts.append("\n".join((DIVIDED, *form_lines(size))))
    speed = [
        (THROUGHPUT[name], values.get("before", "-"), values.get("after", "-"))
        for name, values in (result.get("throughput") or {}).items()
    ]
    if speed:
        parts.append(table(("training", "before the cut", "after the cut"), speed))
    metrics, columns = result.get("metrics") or {}, score_columns(result)
    if metrics:
        rows = [(m, *(f"{scores[m]:.4f}" if m in scores else "-" for scores in columns.values())) for m in metrics]
        parts.append(table(("", *columns), rows))
    parts += score_notes(result)
    if result.get("keep"):
        parts.append(floor_table(result["keep"]))
    if (step := result.get("best_step")) is not None:
        parts.append(f"At the end: the best of {len(result['evaluations'])} evaluations, at step {step}.")
    if latency := result.get("latency"):
        parts.append(f"Latency: one forward pass on the CPU, {number_of(latency['threads'], 'thread')}.")
    if seconds := result.get("seconds"):
        spent = (f"{LABELS.get(phase, phase)} {value:.1f}" for phase, value in seconds.items())
        parts.append(f"Seconds: {', '.join(spent)}.")
    parts += [f"Warning: {text}." for text in result.get("warnings", ())]
    return "\n\n".join(parts)


def _measured(facts: Mapping[str, Any]) -> str:
    """A budget of latency or size, and what was measured, in a sentence."""
    unit, met = facts["unit"], f"{facts.get('after', facts['predicted']):.4g}"
    before = f" (untrimmed: {facts['before']:.4g})" if "before" in facts else " by the table of costs"
    return f"{met} {unit}{before}, budget {facts['budget']:.4g} {unit}: {facts['of']}."


def score_columns(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Heading -> scores: at the cut (up to version 0.1 named metrics_dense), at the end, and without trimming."""
    at_cut = result.get("metrics_at_cut") or result.get("metrics_dense")
    columns = {"at the cut": at_cut, "at the end": result.get("metrics"), BASELINE: result.get("metrics_baseline")}
    return {heading: scores for heading, scores in columns.items() if scores}


def score_notes(result: Mapping[str, Any]) -> list[str]:
    """Sentences that say what the columns of `score_columns` are scores of."""
    columns, notes, steps = score_columns(result), [], result.get("steps")
    if "at the cut" in columns:
        after = f"after {result['cut_step']:,} of {steps:,} steps, " if steps and result.get("cut_step") else ""
        notes.append(f"At the cut: {after}just before the model was trimmed.")
    if BASELINE in columns:
        seconds = (result.get("seconds") or {}).get(BASELINE)
        took = f" (from the cut on {seconds:.0f} s)" if seconds else ""
        notes.append(f"Baseline: the same run without trimming{f', {steps:,} steps' if steps else ''}{took}.")
    if full := result.get("metrics_in_full"):
        scores = ", ".join(f"{name} {value:.4f}" for name, value in full.items())
        notes.append(f"As it was trained, before the file was made smaller: {scores}.")
    return notes


def floor_table(kept: Mapping[str, Any]) -> str:
    """How the budget was found that keeps a fraction of the baseline's score. kept: `keep` of result.json."""
    rows = [
        (row["budget"], row["rows"], f"{row['score']:.4f}", f"{100 * row['of_baseline']:.1f} %",
         "holds" if row["holds"] else "below", f"{row['seconds']:.0f} s")
        for row in kept["tried"]
    ]  # fmt: skip
    floor = f"{100 * kept['floor']:g} %"

    def shown(name: str, scale: float = 1, digits: int = 4) -> str:
        low, high = (scale * value for value in kept[f"{name}_interval"])
        return f"{scale * kept[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    text = (
        f"On the {kept['rows']:,} rows that did not choose the budget: {kept['metric']} {shown('score')}, baseline "
        f"{shown('baseline')}, difference {shown('difference')}; percent of the baseline: "
        f"{shown('of_baseline', 100, 1)}. Intervals: {kept['intervals']}."
    )
    header = ("tried", "validation rows", kept["metric"], "of the baseline", f"floor {floor}", "seconds")
    return "\n\n".join([table(header, rows, left=(0, 1)), text])


def family_table(result: Mapping[str, Any]) -> str:
    """The models of a family as text. result: the content of its result.json."""
    whole, metric, baseline = result["encoder_params_before"], result["metric"], result.get("metrics_baseline")
    sized = all("mb_after" in row for row in result["rows"])  # those of earlier versions lack it
    rows: list[tuple[object, ...]] = []
    if baseline:
        size, seconds = f"{result.get('mb_before', 0):.1f}", result["seconds"][BASELINE]
        rows.append((BASELINE, whole, share(whole, whole), size, f"{baseline[metric]:.4f}", "", seconds))
    for row in result["rows"]:
        score, params = (row["metrics"] or {}).get(metric), row["encoder_params_after"]
        of = share(score, baseline[metric]) if score is not None and baseline else ""
        shown = "-" if score is None else f"{score:.4f}"
        size = f"{row['mb_after']:.1f}" if sized else ""
        rows.append((row["budget"], params, share(params, whole), size, shown, of, row["seconds"]))
    cells = [(*row[:-1], f"{row[-1]:.0f} s") for row in rows]
    header = ("budget", "encoder parameters", "left", "file, MB", metric, "of the baseline", "seconds")
    kept = [c for c in range(len(header)) if (c != 3 or sized) and (c != 5 or baseline)]
    parts = [f"{result['task']}, {len(result['rows'])} budgets by {result['method']}"]
    parts.append(table([header[c] for c in kept], [[row[c] for c in kept] for row in cells]))
    shared = result["seconds"]["warm_up_and_analysis"]
    parts.append(f"Shared warm-up and analysis: {shared:.0f} s. Total: {result['seconds']['total']:.0f} s.")
    parts += [f"Warning: {row['budget']}: {text}." for row in result["rows"] for text in row["warnings"]]
    return "\n\n".join(parts)


def _on_a_device(result: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Rows of the file's size and of latencies, as far as the result has them."""
    rows = [("model file, MB", result["mb_before"], result["mb_after"])] if "mb_after" in result else []
    rows += [(f"{what}, ms", before, after) for what, before, after in timings(result)]
    return [(label, f"{before:.1f}", f"{after:.1f}", share(after, before)) for label, before, after in rows]


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
