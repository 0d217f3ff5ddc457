"""Text that people read: aligned tables with separators and shares, and nothing that commands a terminal."""

import pytest

from sensibert.core.text import printable, share, short, table


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


def test_a_count_in_short():
    counts = (0, 999, 1000, 999_949, 1_000_000, 10_600_000, 2.5e9)
    assert [short(count) for count in counts] == ["0", "999", "1.0K", "999.9K", "1.0M", "10.6M", "2.5G"]


def test_a_share_of_nothing_is_a_dash():
    assert (share(1, 4), share(0, 3), share(1, 0)) == ("25.0 %", "0.0 %", "-")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain text\twith a tab\nand a line", "plain text\twith a tab\nand a line"),
        ("naïve 漢字 👍", "naïve 漢字 👍"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\u202eb\ud800\x9b", r"a\u202eb\ud800\x9b"),
    ],
)
def test_characters_that_command_a_terminal_are_escapes(text, shown):
    assert printable(text) == shown
