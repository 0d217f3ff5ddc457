"""README.md is short, its list of models is the real one, and no link of a page is dead."""

import re
from pathlib import Path

import pytest

from sensibert.models import families

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 130


def test_its_table_has_at_most_ten_rows():
    (table,) = re.findall(r"<!-- table: \w+ -->\n(.*?)<!-- end -->", README, flags=re.DOTALL)
    assert 3 <= len(table.splitlines()) <= 12  # with header and rule


def test_the_list_of_models_is_complete():
    listed = re.search(r"## Models\n(.*?), with any task head", README, flags=re.DOTALL)[1]
    assert sorted(re.split(r",\s+", listed)) == sorted(families())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    dead = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not dead
