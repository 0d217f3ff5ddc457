"""Budgets are read from text, written back, and refused with an example."""

import pytest

from sensibert.core.budget import Budget
from sensibert.core.cost_table import CostTable
from sensibert.core.errors import SensibertError

TABLE = CostTable("latency", "torch", 1, ((0, 0), (4, 8)), ((0, 0), (6, 6)), "bert", 32)


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


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"value": "50%params"}, "value is '50%params', want a number; Budget.parse reads a text"),
        ({"value": 0.0}, "value is 0.0, want more than 0"),
        ({"value": float("inf")}, "value is inf, want more than 0"),
        ({"value": float("nan"), "relative": True}, r"value is nan, want a fraction in \(0, 1\]"),
        ({"value": 1.5, "relative": True}, r"value is 1.5, want a fraction in \(0, 1\]"),
        ({"kind": "hours"}, "kind is 'hours', want one of params, flops, latency, size"),
        ({"scope": "layer"}, "scope is 'layer', want one of encoder, model"),
        ({"length": 0}, "length is 0, want at least 1"),
        ({"kind": "size", "table": TABLE}, "kind is 'size', and table is of latency"),
    ],
)
def test_a_field_that_no_budget_has_is_named(fields, message):
    with pytest.raises(SensibertError, match=f"^Budget: {message}$"):
        Budget(**({"value": 1.0, "kind": "params"} | fields))
    assert (
        Budget(1.0, "params", True).length == Budget.parse("50%params").length == 128
        and Budget(1.5, "params", length=1).scope == "encoder"
    )


def test_measured_costs_are_those_of_the_whole_model():
    assert Budget.parse("8ms").scope == Budget(1.0, "latency", table=TABLE).scope == "model"
    assert (Budget.parse("8ms").measured, Budget.parse("5params").measured) == (True, False)
    assert Budget.parse("8ms").with_table(TABLE).table == TABLE


@pytest.mark.parametrize(
    "text, cost, amount",
    [("8ms", 12_345, "12.35 ms"), ("8MB", 1_500_000, "1.5 MB"), ("50%flops", 1_234_567, "1,234,567 flops")],
)
def test_a_cost_is_written_in_the_unit_of_the_budget(text, cost, amount):
    assert Budget.parse(text).amount(cost) == amount


@pytest.mark.parametrize(
    "value, text",
    [(2e12, "2Tflops"), (1e9, "1Gflops"), (999e6, "999Mflops"), (1e6, "1Mflops"), (1000, "1Kflops"), (999, "999flops")],
)
def test_the_largest_unit_that_fits_is_written(value, text):
    assert str(Budget(float(value), "flops")) == text and Budget.parse(text).value == value


def test_what_masks_cannot_meet_is_refused():
    Budget.parse("50%params").check_grid(elements=True)
    Budget.parse("50%flops").check_grid(elements=False)
    with pytest.raises(SensibertError, match="50%flops, but no kernel skips single elements"):
        Budget.parse("50%flops").check_grid(elements=True)
    for elements in (True, False):
        with pytest.raises(SensibertError, match="8ms, but masked weights cost what they did, want grid unit"):
            Budget.parse("8ms").check_grid(elements)
