"""What is quoted of a library's error, and the argument that an error of ours names."""

import pytest

from sensibert.core.errors import SensibertError, described, first_line, naming


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("  wrong\nline 2"), "wrong"),
        (ValueError("Error in a file:\n  size mismatch\nmore"), "Error in a file: size mismatch"),
        (ValueError("one line:"), "one line:"),
        (ValueError(""), "ValueError"),
        (KeyError("name"), "KeyError('name')"),
        (OSError("x" * 300), "x" * 200),
        (ValueError("set trust_remote_code=True"), "it needs code of its own, which sensibert does not run"),
        (RuntimeError("pass weights_only=False"), "its pytorch_model.bin is damaged, or holds more than weights"),
        (
            RuntimeError("use ignore_mismatched_sizes=True"),
            "its weights have other shapes than its config.json says",
        ),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


def test_an_error_is_described_by_its_class_once():
    assert described(OSError("no\nsecond")) == "OSError: no"
    assert described(KeyError("name")) == "KeyError('name')"


def test_an_error_names_the_argument_and_others_pass():
    with pytest.raises(SensibertError, match="^teacher: its file is empty$"), naming("teacher"):
        raise SensibertError("its file is empty")
    with pytest.raises(KeyError), naming("teacher"):
        raise KeyError("teacher")
