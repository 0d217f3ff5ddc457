"""What a budget of size was divided by, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIVIDED = "The budget was divided by what each part costs in loss."


def form_lines(facts: Mapping[str, Any]) -> list[str]:
    """What was measured and chosen, a line each: first what the bits cost alone, and the vocabulary, then every form of
    the file with the heads and neurons that fit. facts: `size` of a result.json."""
    lines = [f"{facts['rows']:,} {facts['of']} rows at the cut, loss {facts['loss_before']:.4f}"]
    for form in facts["forms"]:
        if (loss := form.get("loss_alone")) is not None:
            what, saved = _change(form, facts["forms"][0]), form["mb_saved"]
            a_mb = f", {loss / saved:+.1g} a MB" if saved else ""
            lines.append(f"{what} alone: {saved:.4g} MB less, loss {loss:+.2g}{a_mb}")
    for form in facts["forms"]:
        met = "cannot meet the budget"
        if (left := form["heads_and_neurons"]) is not None and form["loss"] is not None:
            met = f"{100 * left:.0f} % of heads and neurons, loss {form['loss']:+.2g}"
        lines.append(f"{_name(form)}: {met}" + ", chosen" * form["chosen"])
    return lines


def _change(form: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """The one thing that differs from the first form."""
    return _bits(form) if form["weights"] != first["weights"] else _pieces(form)


def _name(form: Mapping[str, Any]) -> str:
    return f"{_bits(form)}, {_pieces(form)}"


def _bits(form: Mapping[str, Any]) -> str:
    return f"weights in {form['weights']}"


def _pieces(form: Mapping[str, Any]) -> str:
    return f"{form['vocabulary']:,} pieces" if form["vocabulary"] else "all pieces"
