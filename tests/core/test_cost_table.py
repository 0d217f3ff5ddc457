"""Tables of measured costs: interpolation, files, and models that they are not of."""

import json
from dataclasses import replace

import pytest

from sensibert.core.cost_table import CostTable
from sensibert.core.errors import SensibertError
from tests.core import small

HEADS, FFN = ((0, 0), (2, 100), (4, 180)), ((0, 0), (6, 60))
TABLE = CostTable("latency", "onnx", 500, HEADS, FFN, "bert", 32, "a device", 2, 1, 64)


@pytest.mark.parametrize(
    "kind, count, cost", [("head", 0, 0), ("head", 1, 50), ("head", 3, 140), ("head", 4, 180), ("ffn", 5, 50)]
)
def test_costs_are_interpolated_between_points(kind, count, cost):
    assert TABLE.cost(kind, count) == cost


def test_more_units_than_were_measured_are_refused():
    with pytest.raises(SensibertError, match="a layer has 5 units, and the table ends at 4"):
        TABLE.cost("head", 5)


def test_a_table_survives_its_file(tmp_path):
    TABLE.save(tmp_path / "table.json")
    assert CostTable.load(tmp_path / "table.json") == TABLE


def test_a_correction_is_of_trimmed_models_alone():
    table = TABLE.corrected(100, 130).corrected(100, 90)
    assert table == replace(TABLE, offset=20)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "watts"}, "kind is 'watts', want one of latency, size"),
        ({"runtime": "tflite"}, "runtime is 'tflite', want one of torch"),
        ({"heads": ()}, "heads is .*, want points"),
        ({"heads": ((0, 0), (2, 5), (1, 6))}, "heads is .*, want points"),
        ({"ffn": ((0, 0), (2, 5), (3, 4))}, "ffn is .*, want points"),
        ({"ffn": ((1, 1),)}, "ffn is .*, want points"),
        ({"rest": -1}, "rest is -1, want"),
        ({"threads": 0}, "threads is 0, want"),
        ({"hidden": "32"}, "hidden is '32', want a whole number"),
    ],
)
def test_fields_that_do_not_fit_are_named(change, message):
    with pytest.raises(SensibertError, match=f"^CostTable: {message}"):
        replace(TABLE, **change)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 50_000, "cannot be read .it is not JSON: it is nested too deeply"),
        ('{"rest": 1, "rest": 2}', "cannot be read .it is not JSON: 'rest' is given twice"),
        ("[]", "is no table of costs, want a file of sensibert latency"),
        ("{}", "is no table of costs"),
        ({"rest": "much"}, "rest is 'much'"),
        ({"heads": 3}, "not a table of costs"),
        ({"more": 3}, "not a table of costs"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content, message):
    file = tmp_path / "table.json"
    if isinstance(content, dict):
        content = json.dumps({"format": "sensibert.costs", **TABLE.to_dict(), **content})
    if content is not None:
        file.write_text(content)
    with pytest.raises(SensibertError, match=message):
        CostTable.load(file)


def test_a_table_of_another_model_is_refused():
    layout = small.layout()
    replace(TABLE, ffn=((0, 0), (6, 60))).want_fit(layout)
    for other in (replace(TABLE, family="electra"), replace(TABLE, hidden=64), replace(TABLE, heads=((0, 0), (2, 1)))):
        with pytest.raises(
            SensibertError, match="^latency_table: it is of a .*; the model is a bert with hidden size 32"
        ):
            other.want_fit(layout)
