"""Several budgets in one text."""

from __future__ import annotations

import re

from .arguments import show
from .budget import Budget
from .errors import SensibertError

_BARE = r"[0-9]*\.?[0-9]+"


def parse_budgets(text: str, scope: str = "encoder", length: int = 128) -> list[Budget]:
    """`75,50,30%params` or `5.3Mparams,30%flops` -> budgets. A bare number has the unit of the next entry that has one.

    SensibertError for an entry that is not a budget, a budget that is given twice, and a single one."""
    entries = [entry.strip() for entry in text.split(",")]
    if "" in entries:
        raise SensibertError(f"budgets: {show(text)} has an empty entry, want a list such as 75,50,30%params")
    unit = ""
    for place, entry in reversed(list(enumerate(entries))):
        if re.fullmatch(_BARE, entry):
            entries[place] = entry + unit
        else:
            unit = re.sub(rf"^{_BARE}", "", entry)
    try:
        budgets = [Budget.parse(entry, scope, length) for entry in entries]
    except SensibertError as error:
        reason = str(error).removeprefix("budget: ")
        raise SensibertError(f"budgets: {show(text)}: {reason} in a list such as 75,50,30%params") from None
    names = [str(budget) for budget in budgets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SensibertError(f"budgets: {show(text)} has {twice} twice, want different ones")
    if len(budgets) == 1:
        raise SensibertError(f"budgets: {show(text)} is one budget, want several, or --budget")
    return budgets


def folder_name(budget: Budget) -> str:
    """`75%params` -> `75-params`: without characters that shells and file systems treat specially."""
    return str(budget).replace("%", "-")
