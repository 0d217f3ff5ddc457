"""The API pages name every public object, and show docstrings as they are meant."""

import importlib.util
import re
from pathlib import Path

import pytest

import sensibert

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def docstrings():
    spec = importlib.util.spec_from_file_location("api_docstrings", DOCS / "api_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_its_entry():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE)}
    assert set(sensibert.__all__) - shown - {"__version__"} == set()


def test_every_entry_is_a_name_of_the_package():
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_shapes_and_products_are_not_markup_and_code_is_unchanged(docstrings):
    text = docstrings.markdown("x [N, K] [M] times w*g, sum |w*g|; see `a[0]_b` or a_b.", set())
    assert text == r"x \[N, K\] \[M\] times w\*g, sum \|w\*g\|; see `a[0]_b` or a\_b."


def test_arguments_become_a_list_and_exceptions_a_paragraph(docstrings):
    text = docstrings.markdown(
        "Do it. keep_it: x;\nNone: all. a, b:\nsizes; not c: y. ValueError if not.", {"keep_it", "a", "b"}
    )
    assert text == "Do it. \n\n- **keep\\_it**: x;\nNone: all. \n\n- **a, b**:\nsizes; not c: y. \n\nValueError if not."
