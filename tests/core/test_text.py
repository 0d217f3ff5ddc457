"""Tables that people read: aligned, with separators and shares."""

from sensibert.core.text import share, table


def test_a_table_aligns_the_first_column_to_the_left_and_the_others_to_the_right():
    assert table(("", "a", "long head"), [("x", 1234567, "b"), ("longer", 2, 0.5)]).splitlines() == [
        "                a  long head",
        "------  ---------  ---------",
        "x       1,234,567          b",
        "longer          2        0.5",
    ]


def test_the_columns_on_the_left_can_be_chosen():
    assert table(("n", "name"), [(1, "a")], left=(1,)).splitlines()[2] == "1  a"


def test_a_table_without_rows_is_its_header():
    assert table(("name", "n"), []).splitlines() == ["name  n", "----  -"]


def test_a_share_of_nothing_is_a_dash():
    assert (share(1, 4), share(0, 3), share(1, 0)) == ("25.0 %", "0.0 %", "-")
