"""Budgets are read from text, written back, and refused with an example."""

import pytest

from sensibert.core.budget import Budget
from sensibert.core.errors import SensibertError


@pytest.mark.parametrize(
    "text, value, kind, relative",
    [
        ("50%params", 0.5, "params", True),
        ("100 % params", 1.0, "params", True),
        ("12.5%flops", 0.125, "flops", True),
        ("5.3Mparams", 5.3e6, "params", False),
        ("1.2Gflops", 1.2e9, "flops", False),
        ("123456params", 123456, "params", False),
        (".5Kparams", 500, "params", False),
        ("8ms", 8000, "latency", False),
        ("50%latency", 0.5, "latency", True),
        ("12.5 MB", 12.5e6, "size", False),
        ("800KB", 8e5, "size", False),
        ("40%size", 0.4, "size", True),
    ],
)
def test_budgets_are_read(text, value, kind, relative):
    budget = Budget.parse(text, "model", 256)
    assert (budget.value, budget.kind, budget.relative) == (pytest.approx(value, rel=1e-12), kind, relative)
    assert (budget.scope, budget.length) == ("model", 256)
    assert Budget.parse(str(budget), "model", 256) == budget


@pytest.mark.parametrize(
    "text, message",
    [
        ("0%params", r"outside \(0 %, 100 %\]"),
        ("120%params", r"outside \(0 %, 100 %\]"),
        ("0params", r"outside \(0 %, 100 %\]"),
        ("abc", "is not a budget"),
        ("", "is not a budget"),
        ("-1params", "is not a budget"),
        ("50%", "is not a budget"),
        ("50", "is not a budget"),
        ("8mss", "is not a budget"),
        ("8%ms", "is not a budget"),
        ("8latency", "is not a budget"),
        ("0ms", r"outside \(0 %, 100 %\]"),
        ("nan%params", "is not a budget"),
        ("1e3params", "is not a budget"),
        ("50%params, 30%flops", "is not a budget"),
    ],
)
def test_a_text_that_is_no_budget_is_refused_with_an_example(text, message):
    with pytest.raises(SensibertError, match=f"^budget: {text!r} (is )?{message}") as caught:
        Budget.parse(text)
    assert "want for example 50%params" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_scope_is_named():
    with pytest.raises(SensibertError, match="scope is 'head', want one of encoder, model"):
        Budget.parse("50%params", scope="head")
