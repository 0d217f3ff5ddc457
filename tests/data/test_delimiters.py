"""The delimiter of a csv file is that of its header; where there are two, the rows decide or the file is refused."""

import csv
import io

import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.delimiters import csv_rows
from sensibert.data.files import load_examples

ROWS = [
    ("text", "label"),
    ("a plain one", "0"),
    ("a, b; c\td | e", "1"),
    ('"quoted"', "1"),
    ("two\nlines", "0"),
    ("", "1"),
]


def written(delimiter: str, rows=ROWS) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_every_delimiter_gives_the_same_columns(delimiter, tmp_path):
    (tmp_path / "x.csv").write_text(written(delimiter), newline="")
    columns = load_examples(str(tmp_path / "x.csv")).columns
    assert columns == {"text": [row[0] for row in ROWS[1:]], "label": [row[1] for row in ROWS[1:]]}


@pytest.mark.parametrize("texts", [["hello, world", "no comma"], ["a;b", "c;d"], ["a, b, c"], ["x | y", "\ttab"]])
def test_a_single_column_of_texts_is_not_split(texts):
    assert csv_rows("\n".join(["text", *texts]), "x.csv") == [
        (1, ["text"]),
        *((i, [t]) for i, t in enumerate(texts, 2)),
    ]


def test_quotes_around_the_texts_of_a_single_column_are_quotes():
    assert csv_rows('text\n"a ""b"", c"\n', "x.csv")[1] == (2, ['a "b", c'])


@pytest.mark.parametrize(
    "text, row",
    [
        ("text, raw;label\nx;1\ny, z;0\n", ["y, z", "0"]),
        ("id,a|b,label\n1,x,0\n2,y|z,1\n", ["2", "y|z", "1"]),
        ('"a;b",label\nx;y,1\nz,0\n', ["z", "0"]),
        ('a|b,label\n"x|y",1\n"z|",0\n', ["z|", "0"]),
    ],
)
def test_where_the_header_holds_two_delimiters_the_rows_decide(text, row):
    assert csv_rows(text, "x.csv")[-1][1] == row


REFUSED = {
    "both": (
        "id,a|b\n1,2|3\n2,5|6\n",
        "the delimiter is not clear: by a comma, all rows have 2 fields; by a vertical bar, all rows have 2 fields;",
    ),
    "neither": (
        "id,a|b\n1,2\n2;3\n",
        "the delimiter is not clear: by a comma, the header has 2 fields and line 3 has 1; by a vertical bar, the "
        "header has 2 fields and line 2 has 1; want one delimiter, and quotes around fields that hold another",
    ),
    "not csv": (
        'a;b,c\n"x"y;1,2\n',
        "by a comma, line 2: not csv (',' expected after '\"'); by a semicolon, line 2: not csv (';' expected after",
    ),
    "one column": ('text\n"never" closed\n', "x.csv: line 2: not csv (the end of the line expected after '\"')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_clear_is_refused_with_what_was_seen(case):
    text, message = REFUSED[case]
    with pytest.raises(SensibertError) as caught:
        csv_rows(text, "x.csv")
    assert str(caught.value).startswith("x.csv: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_of_another_length_is_named_as_with_commas(tmp_path):
    (tmp_path / "x.csv").write_text("text;label\na;1\nb;2;3\n")
    with pytest.raises(SensibertError, match=r"x.csv: line 3: 3 fields, want 2 \(text, label\)"):
        load_examples(str(tmp_path / "x.csv"))
