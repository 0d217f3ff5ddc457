"""JSON of others: what Python reads, without what it would overlook."""

import json

import pytest

from sensibert.core.json_text import parse_json


@pytest.mark.parametrize(
    "text", ["-1", "0", "9223372036854775807", "-9223372036854775807", "1.5", '{"a": [true, null]}']
)
def test_a_value_is_that_of_json(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ("9223372036854775808", "has 19 digits, want at most 63 bits"),
        ("7" * 6000, "has 6000 digits, want at most 63 bits"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_what_python_would_overlook_or_fail_at_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_numbers_of_any_size_are_for_data():
    assert parse_json("9223372036854775808", any_size=True) == 2**63
    with pytest.raises(ValueError):
        parse_json("7" * 6000, any_size=True)
