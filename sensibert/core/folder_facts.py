"""What a trimmed folder says about itself: the entry `sensibert` of its config.json, and result.json."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from .arguments import show, want
from .budget import SCOPES
from .errors import SensibertError
from .json_text import BITS, parse_json

LARGEST = 2**24  # of a number of layers, heads or neurons
LONGEST = 10_000_000  # tokens
SIZES = ("encoder_params", "total_params", "flops")
# Names that both have -> types. Other names are those of users.
FACTS: dict[str, Any] = {
    **dict.fromkeys(("task", "method", "budget", "scope", "model", "grid", "weights"), str | None),
    **dict.fromkeys(("seed", "steps", "samples", "max_length", "doc_stride", "flops_length"), int | None),
    **dict.fromkeys(("cut_step", "best_step"), int | None),
    **dict.fromkeys([f"{n}_{when}" for n in SIZES for when in ("before", "after")], int),
    **dict.fromkeys(("mb_before", "mb_after"), float),
    **dict.fromkeys(("metrics", "metrics_at_cut", "metrics_dense", "metrics_in_full"), dict[str, float] | None),
    **dict.fromkeys(("metrics_baseline", "seconds"), dict[str, float] | None),
    "warnings": list[str] | None,
    **dict.fromkeys(("latency", "size"), dict[str, Any] | None),
    "throughput": dict[str, dict[str, float]] | None,
}
# Of `latency`, and of each of its entries batch_N_ms.
LATENCY: dict[str, Any] = {"length": int, "threads": int}
TIMES: dict[str, Any] = {"before": float, "after": float}
# Of `size`, and of each of its forms.
SIZE: dict[str, Any] = {"rows": int, "of": str, "loss_before": float, "forms": list[dict[str, Any]]}
FORM: dict[str, Any] = {
    "weights": str,
    "vocabulary": int | None,
    "mb_saved": float,
    **dict.fromkeys(("heads_and_neurons", "loss"), float | None),
    "chosen": bool,
}
# Of the shapes, which are there if layers were cut.
SHAPES: dict[str, Any] = {
    "format": int,
    "head_dim": int,
    "heads": list[int],
    "ffn": list[int],
    "kept_heads": list[list[int]],
    "table": dict[str, Any],
}
AXIS: dict[str, Any] = {"produces": list[str], "consumes": str, "parts": int, "counts": list[str], "widths": list[str]}


def want_entry(entry: Any, place: str) -> None:
    """SensibertError for an entry `sensibert` whose values are of other types, or whose numbers no model has."""
    if not isinstance(entry, dict):
        raise SensibertError(f"{place} has a config.json whose entry sensibert is {show(entry)}, want an object")
    label = f"{place}, config.json: sensibert"
    want_facts(entry, label)
    if not entry.keys() & (SHAPES.keys() - {"format"}):
        return
    _want_types(entry, SHAPES, label)
    table = entry["table"]
    _want_types(table, {"layers": str, "position_bias": str, "head": dict[str, Any], "ffn": dict[str, Any]}, label)
    for axis in ("head", "ffn"):
        _want_types(table[axis], AXIS, f"{label}.{axis}")
    kept, counts, widths = entry["kept_heads"], entry["heads"], entry["ffn"]
    if not len(kept) == len(counts) == len(widths):
        raise SensibertError(
            f"{label} has {len(counts)} heads, {len(kept)} kept_heads and {len(widths)} ffn, want equal"
        )
    for number, heads in enumerate(kept):
        if len(heads) != counts[number]:
            raise SensibertError(f"{label}: kept_heads[{number}] has {len(heads)} heads, want {counts[number]}")
        if heads and (heads[0] < 0 or any(a >= b for a, b in pairwise(heads))):
            raise SensibertError(f"{label}: kept_heads[{number}] is not ascending, want every head once")
    sizes = [entry["head_dim"], *counts, *widths, *(head for heads in kept for head in heads)]
    if max(sizes) > LARGEST or min(sizes) < 0:
        raise SensibertError(
            f"{label} has the size {show(min(sizes) if min(sizes) < 0 else max(sizes))}, want that of a model"
        )


def read_result(file: Path) -> dict[str, Any]:
    """The content of a result.json; SensibertError if it cannot be read or has values of other types."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SensibertError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise SensibertError(f"{file} holds {show(content)}, want an object")
    want_facts(content, str(file))
    return content


# Of a family's result.json, and of each of its rows.
FAMILY: dict[str, Any] = {
    **dict.fromkeys(("task", "method", "metric"), str),
    **dict.fromkeys(("encoder_params_before", "seed", "steps"), int),
    "metrics_baseline": dict[str, float] | None,
    "seconds": dict[str, float],
    "rows": list[dict[str, Any]],
}
ROW: dict[str, Any] = {
    **dict.fromkeys(("folder", "budget"), str),
    **dict.fromkeys(("encoder_params_after", "total_params_after"), int),
    "metrics": dict[str, float] | None,
    "seconds": float,
    "warnings": list[str],
}


def read_family(file: Path) -> dict[str, Any] | None:
    """The content of the result.json of a family, or None if it is that of a single run, or there is none.

    SensibertError if it cannot be read or has values of other types."""
    if not file.exists() or "rows" not in (content := read_result(file)):
        return None
    _want_types(content, FAMILY, str(file))
    metric, seconds = content["metric"], {"warm_up_and_analysis", "total"}
    baseline = content["metrics_baseline"]
    if not content["rows"] or not content["seconds"].keys() >= seconds or metric not in (baseline or {metric: 0.0}):
        raise SensibertError(f"{file} has no models or no scores, want the result that sensibert wrote")
    if baseline is not None and "baseline" not in content["seconds"]:
        raise SensibertError(f"{file}: seconds has no baseline, want the result that sensibert wrote")
    for number, row in enumerate(content["rows"]):
        label = f"{file}: rows[{number}]"
        _want_types(row, ROW, label)
        if row["metrics"] is not None and metric not in row["metrics"]:
            raise SensibertError(f"{label}: metrics has no {show(metric)}, want the result that sensibert wrote")
        if Path(row["folder"]).name != row["folder"]:
            raise SensibertError(f"{label}: folder is {show(row['folder'])}, want a name without a path")
    return content


def want_facts(facts: Mapping[str, Any], label: str) -> None:
    """SensibertError for a fact of FACTS that is of another type or out of range."""
    for name, hint in FACTS.items():
        if name in facts:
            want(f"{label}: {name}", facts[name], hint)
            _want_bounded(f"{label}: {name}", facts[name])
    if (scope := facts.get("scope")) is not None and scope not in SCOPES:
        raise SensibertError(f"{label}: scope is {show(scope)}, want {' or '.join(SCOPES)}")
    for name in ("max_length", "doc_stride", "flops_length"):
        if (length := facts.get(name)) is not None and not 0 <= length <= LONGEST:
            raise SensibertError(f"{label}: {name} is {show(length)}, want a number of tokens")
    if latency := facts.get("latency"):
        _want_types(latency, LATENCY, f"{label}: latency")
        for name, times in latency.items():
            if name.startswith("batch_"):
                want(f"{label}: latency: {name}", times, dict[str, float])
                _want_types(times, TIMES, f"{label}: latency: {name}")
    if size := facts.get("size"):
        _want_types(size, SIZE, f"{label}: size")
        for number, form in enumerate(size["forms"]):
            _want_types(form, FORM, f"{label}: size: forms[{number}]")
            want(f"{label}: size: forms[{number}]: loss_alone", form.get("loss_alone"), float | None)


def _want_bounded(label: str, value: Any) -> None:
    """SensibertError for a whole number that is too large to be computed with."""
    if isinstance(value, dict):
        for name, inside in value.items():
            _want_bounded(f"{label}[{show(name)}]", inside)
    elif isinstance(value, list):
        for number, inside in enumerate(value):
            _want_bounded(f"{label}[{number}]", inside)
    elif isinstance(value, int) and abs(value) >= 2**BITS:
        raise SensibertError(f"{label} has more than {BITS} bits, want a smaller number")


def _want_types(values: Mapping[str, Any], types: Mapping[str, Any], label: str) -> None:
    for name, hint in types.items():
        if name not in values:
            raise SensibertError(f"{label} has no {name}, want what sensibert wrote")
        want(f"{label}: {name}", values[name], hint)
