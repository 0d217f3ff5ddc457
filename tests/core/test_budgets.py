"""Several budgets in one text."""

import pytest

from sensibert.core.budgets import folder_name, parse_budgets
from sensibert.core.errors import SensibertError


@pytest.mark.parametrize(
    "text, budgets",
    [
        ("75,50,30,20%params", ["75%params", "50%params", "30%params", "20%params"]),
        ("75%params, 50%params", ["75%params", "50%params"]),
        ("7.5 , 5.3Mparams,40,30%flops", ["7.5Mparams", "5.3Mparams", "40%flops", "30%flops"]),
    ],
)
def test_a_bare_number_has_the_unit_of_the_next_entry_that_has_one(text, budgets):
    assert [str(budget) for budget in parse_budgets(text)] == budgets


def test_scope_and_length_are_those_of_all():
    assert {(b.scope, b.length) for b in parse_budgets("50,30%flops", "model", 64)} == {("model", 64)}


@pytest.mark.parametrize(
    "text, message",
    [
        ("75,50", "budgets: '75,50': '75' is not a budget"),
        ("75%params,50", "'50' is not a budget"),
        ("75,,50%params", "has an empty entry"),
        ("150,50%params", "'150%params' is outside"),
        ("50,50%params", "has 50%params twice"),
        ("50,50.0%params", "has 50%params twice"),
        ("50%params", "is one budget, want several, or --budget"),
    ],
)
def test_what_is_no_list_of_budgets_is_named(text, message):
    with pytest.raises(SensibertError, match=message):
        parse_budgets(text)


def test_folder_names_have_no_special_characters():
    names = [folder_name(budget) for budget in parse_budgets("75,7.5%params,30%flops,5.3Mparams")]
    assert names == ["75-params", "7.5-params", "30-flops", "5.3Mparams"]
