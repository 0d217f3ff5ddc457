"""What a budget of size was divided by, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def form_lines(facts: Mapping[str, Any]) -> list[str]:
    """What was measured and chosen, a line each. facts: `size` of a result.json."""
    lines = [f"{facts['rows']:,} {facts['of']} rows at the cut, loss {facts['loss_before']:.4f}"]
    for form in facts["forms"]:
        if (loss := form.get("loss_alone")) is not None:
            per = loss / form["mb_saved"]
            lines.append(f"{_name(form)}: {form['mb_saved']:.4g} MB less, loss {loss:+.2g}, {per:+.1g} a MB")
    for form in facts["forms"]:
        met = "cannot meet the budget"
        if form["loss"] is not None:
            met = f"{100 * form['heads_and_neurons']:.0f} % of heads and neurons, loss {form['loss']:+.2g}"
        lines.append(f"{_name(form)}: {met}" + ", chosen" * form["chosen"])
    return lines


def _name(form: Mapping[str, Any]) -> str:
    pieces = f"{form['vocabulary']:,} pieces" if form["vocabulary"] else "all pieces"
    return f"weights in {form['weights']}, {pieces}"
