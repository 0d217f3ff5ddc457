"""The models of several budgets as one HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..core.text import share, short
from .page_parts import cards, document, heading, loading, section, table
from .page_plots import Measured, against_score
from .timings import Times, one_text


def family_page(folder: str, facts: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a family. facts: the content of its result.json. members: that of each of its models, in its order."""
    name = folder.rstrip("/").rpartition("/")[2]
    made = f"{len(members)} models by {facts['method']}, {facts['steps']:,} steps, seed {facts['seed']}"
    times = [one_text(member) for member in members]
    parts = [heading(name, f"{facts['task']}: {made}"), _headline(facts)]
    parts.append(section("The models", _models(facts, members, times)))
    if any(row["metrics"] for row in facts["rows"]):
        parts.append(section("Score against cost", _against(facts, times)))
    warned = [f"{row['budget']}: {text}" for row in facts["rows"] for text in row["warnings"]]
    if warned:
        listed = "".join(f"<li>{escape(text)}</li>" for text in warned)
        parts.append(section("Warnings", f"<ul>{listed}</ul>"))
    smallest = min(facts["rows"], key=lambda row: row["encoder_params_after"])
    parts.append(section("Use one", loading(f"{folder.rstrip('/')}/{smallest['folder']}", facts["task"])))
    return document(name, parts)


def _headline(facts: Mapping[str, Any]) -> str:
    rows, metric, seconds = facts["rows"], facts["metric"], facts["seconds"]
    found = [(short(facts["encoder_params_before"]), "encoder parameters", "before trimming")]
    if baseline := facts.get("metrics_baseline"):
        found.append((f"{baseline[metric]:.4f}", metric, "without trimming"))
    found.append((str(len(rows)), "models", f"from {seconds['warm_up_and_analysis']:.0f} s of warm-up and analysis"))
    found.append((f"{seconds['total']:.0f} s", "in all", ""))
    return cards(found)


def _models(facts: Mapping[str, Any], members: Sequence[Mapping[str, Any]], times: Sequence[Times | None]) -> str:
    metric, baseline, whole = facts["metric"], facts.get("metrics_baseline"), facts["encoder_params_before"]
    timed = [found for found in times if found is not None]
    sized = all("mb_after" in member for member in members)
    header = ["budget", metric, *(["of the baseline"] if baseline else []), "left", "encoder parameters"]
    header += [*(["latency, ms"] if len(timed) == len(members) else []), *(["MB"] if sized else []), "folder"]
    rows = []
    for row, member, found in zip(facts["rows"], members, times, strict=True):
        score, params = (row["metrics"] or {}).get(metric), row["encoder_params_after"]
        cells = [row["budget"], "-" if score is None else f"{score:.4f}"]
        cells += ["-" if score is None else share(score, baseline[metric])] if baseline else []
        cells += [share(params, whole), f"{params:,}"]
        cells += [f"{found.after:.1f}"] if found is not None and len(timed) == len(members) else []
        cells += [*([f"{member['mb_after']:.1f}"] if sized else []), row["folder"]]
        rows.append(cells)
    return table(header, rows)


def _against(facts: Mapping[str, Any], times: Sequence[Times | None]) -> str:
    metric, whole = facts["metric"], facts["encoder_params_before"]
    models = []
    for row, found in zip(facts["rows"], times, strict=True):
        if row["metrics"]:
            left = 100 * row["encoder_params_after"] / whole
            models.append(Measured(row["budget"], row["metrics"][metric], left, found and found.after))
    timed = [found for found in times if found is not None]
    before = statistics.median(found.before for found in timed) if timed else None  # each run timed the same model
    baseline = facts.get("metrics_baseline")
    return against_score(metric, models, baseline and baseline[metric], before, timed[0].what if timed else None)
