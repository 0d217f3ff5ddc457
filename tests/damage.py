"""Files as nobody wrote them: values of other types in JSON, and bytes of any kind (`from tests.damage import ...`)."""

import copy
import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

HUGE = "7" * 6000  # more digits than Python converts
DEEP = "[" * 50_000


class Text(str):
    """A text that is short in a report of hypothesis."""

    def __repr__(self) -> str:
        return str.__repr__(self) if len(self) < 3000 else f"{self[:500]!s} ... {self[-500:]!s}"


# Texts of JSON in place of a value.
VALUES = tuple(
    map(
        Text,
        (
            *(
                "null",
                "true",
                "-1",
                "0",
                "1.5",
                "1e999",
                "NaN",
                "-Infinity",
                "2147483648",
                "10000000000000000000",
                HUGE,
            ),
            *(
                '""',
                '"x"',
                '"\\u001b[31m"',
                '"\\ud800"',
                "[]",
                "[[]]",
                '[1, "x"]',
                "{}",
                '{"x": 1}',
                '{"x": 1, "x": 2}',
                DEEP,
            ),
        ),
    )
)


FEW = settings(deadline=None, max_examples=40, derandomize=True, database=None)
SLOW = settings(FEW, max_examples=12)


@st.composite
def damaged_json(draw: st.DrawFn, content: Any) -> str:
    """The text of a JSON value of which one part, at any depth, is another, is gone, or is there twice."""
    whole = {"": copy.deepcopy(content)}
    parent, key = whole, ""
    while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 4)):
        parent = parent[key]
        key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
    if parent is not whole and draw(st.integers(0, 5)) == 0:
        del parent[key]
        return Text(json.dumps(whole[""]))
    if isinstance(parent, dict) and parent is not whole and draw(st.integers(0, 5)) == 0:
        parent[draw(st.sampled_from(["", "x", "__class__", f"{key} "]))] = parent[key]
    parent[key] = "HERE"
    return Text(json.dumps(whole[""]).replace('"HERE"', draw(st.sampled_from(VALUES)), 1))


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one part cut out or replaced."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, min(len(content), begin + 64)))
    return content[:begin] + draw(st.binary(max_size=8)) + content[end:]
