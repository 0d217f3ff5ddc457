"""A floor of the score in place of a budget: what is tried, what is chosen, what is checked, and what is refused."""

import json

import numpy as np
import pytest

from sensibert import floor as module
from sensibert.core.errors import SensibertError
from sensibert.floor import CLOSE, Search, wanted_rows
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import Options
from tests import runs
from tests.runs import command
from tests.test_recipe import options
from tests.test_resume import Killed, same_weights

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = runs.workplace(tmp_path_factory.mktemp("floor"))
    runs.sentence_file(folder / "dev.csv", 200, seed=2)
    return folder


@pytest.fixture
def two_are_tried(monkeypatch):
    """Without a search: a fraction of the time."""
    monkeypatch.setattr(Search, "_candidates", lambda self, *_: iter(self.sought))
    monkeypatch.setattr(Search, "sought", [50, 75], raising=False)


def test_the_smallest_model_that_holds_is_that_of_a_run_of_its_own(here, tmp_path, analyses):
    result = finetune_and_trim(options(here, tmp_path / "out", keep="90%", epochs=3))
    kept, tried = result["keep"], result["keep"]["tried"]
    assert len(analyses) == 1
    searched = {int(row["budget"][:-7]): row["holds"] for row in tried if row["rows"] == "choosing"}
    held = [percent for percent, holds in searched.items() if holds]
    below = [percent for percent, holds in searched.items() if not holds]
    largest = max(below, default=min(held) - 1)
    assert 3 <= len(searched) <= 8 and largest < min(held) <= CLOSE * largest + 1
    checked = [row for row in tried if row["rows"] == "checking"]
    assert checked[0]["budget"] == f"{min(held)}%params" and [row["holds"] for row in checked][-1]
    assert result["budget"] == checked[-1]["budget"] and kept["of_baseline"] >= 0.9
    finetune_and_trim(options(here, tmp_path / "alone", budget=result["budget"], epochs=3))
    assert same_weights(tmp_path / "out", tmp_path / "alone")
    dense = finetune_and_trim(options(here, tmp_path / "dense", method="baseline", epochs=3))
    assert result["metrics_baseline"] == dense["metrics"]
    assert kept["rows"] == 100
    for name in ("score", "baseline", "difference", "of_baseline"):
        low, high = kept[f"{name}_interval"]
        assert low <= kept[name] <= high
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["keep"] == "90%"


def test_the_halves_are_those_of_the_seed_and_have_no_row_in_common():
    class Rows:
        task = type("Task", (), {"name": "text-classification"})
        validation = range(201)

    def halves(seed):
        of = type("Of", (), {"options": Options(model="m", output="o", keep="90%", seed=seed)})
        search = Search(of, Rows, None)
        return search.choosing, search.checking

    choosing, checking = halves(3)
    assert sorted([*choosing, *checking]) == list(range(201))
    assert np.array_equal(halves(3)[0], choosing) and not np.array_equal(halves(4)[0], choosing)


def test_a_whole_recovery_below_the_floor_gives_way_to_the_next_larger_budget(
    here, tmp_path, monkeypatch, two_are_tried
):
    check, found = Search._check, iter([{"of_baseline": 0.1}, {}])
    monkeypatch.setattr(Search, "_check", lambda *args: check(*args) | next(found))
    done = command(
        *("finetune", "--model", here / "model", "--train-file", here / "train.csv", "--keep", "50%", "--json"),
        *("--validation-file", here / "dev.csv", "--output", tmp_path / "out", "--max-steps", 9, "--width-multiple", 4),
    )
    assert done.code == 0, done.err
    assert done.json["budget"] == "75%params"
    assert [(row["budget"], row["holds"]) for row in done.json["keep"]["tried"]] == [
        ("50%params", False),
        ("75%params", True),
    ]
    assert "On the 100 rows that did not choose the budget" in done.out and "50%params  checking" in done.out


def test_it_says_so_if_no_budget_holds_the_floor(here, tmp_path, monkeypatch, two_are_tried):
    check, candidates = Search._check, Search._candidates

    def after_one_that_held(self, *args):  # on the rows that choose: not the score that is told
        self._note(50, "choosing", 1.0, 1.0, 1.0)
        return candidates(self, *args)

    monkeypatch.setattr(Search, "_candidates", after_one_that_held)
    monkeypatch.setattr(Search, "_check", lambda *args: check(*args) | {"of_baseline": 0.5})
    message = (
        "no budget below 100 % keeps 90 % of the accuracy of the baseline; the best of 2 was 50%params with 50.0 %"
    )
    with pytest.raises(SensibertError, match=message):
        finetune_and_trim(options(here, tmp_path / "out", keep="90%", max_steps=9))
    assert not (tmp_path / "out").exists()


def test_a_broken_search_resumes_without_what_is_done(here, tmp_path, monkeypatch, steps):
    whole = finetune_and_trim(options(here, tmp_path / "whole", keep="50%", max_steps=9))
    note, died = Search._note, []

    def dies(self, *args):
        if len(self.tried) == 2 and not died:
            died.append(True)
            raise Killed
        return note(self, *args)

    monkeypatch.setattr(Search, "_note", dies)
    steps.clear()
    with pytest.raises(Killed):
        finetune_and_trim(options(here, tmp_path / "broken", keep="50%", max_steps=9))
    first = len(steps)
    with pytest.raises(SensibertError, match="has width_multiple 4, and this run 8: want the same"):
        finetune_and_trim(options(here, tmp_path / "broken", keep="50%", max_steps=9, width_multiple=8, resume=True))
    again = finetune_and_trim(options(here, tmp_path / "broken", keep="50%", max_steps=9, resume=True))
    searched = [row for row in whole["keep"]["tried"] if row["rows"] == "choosing"]
    assert steps[first:].count(3) <= len(searched) - 2
    assert again["budget"] == whole["budget"] and again["keep"]["score"] == whole["keep"]["score"]
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


def test_the_rows_that_are_wanted_grow_with_the_floor():
    assert (wanted_rows(0.99), wanted_rows(0.98), wanted_rows(0.5)) == (1000, 250, module.LEAST_ROWS)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"keep": "101%"}, "keep is '101%', want for example 99%, at least 0% and below 100%"),
        ({"keep": "100%"}, "below 100%"),
        ({"keep": "0%"}, "keep is '0%', want more than 0%"),
        ({"keep": "much"}, "keep is 'much', want for example 99%"),
        ({"budgets": "50,30%params"}, "keep and budgets are both given"),
        ({"method": "baseline"}, "keep is '90%', but method baseline does not trim"),
        ({"task": "embedding"}, "the scores of task embedding are no shares"),
        ({"validation_file": None}, "validation_file is missing, want one: the score is measured on it"),
        ({"keep": "99%"}, "validation_file: it has 200 rows, want at least 1,000 for keep 99%"),
        ({"validation_file": "numbers.csv", "train_file": "numbers.csv"}, "a correlation, of which a percentage means"),
    ],
)
def test_a_floor_that_cannot_be_checked_is_refused_before_anything_is_trained(
    here,
    tmp_path,
    steps,
    changed,
    message,
):
    runs.number_file(here / "numbers.csv", 200)
    changed = {name: str(here / value) if value == "numbers.csv" else value for name, value in changed.items()}
    with pytest.raises(SensibertError, match=message):
        finetune_and_trim(options(here, tmp_path / "out", **{"keep": "90%", "max_steps": 6, **changed}))
    assert steps == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "holds_from, wanted",
    [
        (43, [43, 57, 79, 90, 95, 98]),
        (25, [28, 32, 66, 83]),
        (99, [94, 97, 99]),
        (100, [94, 97, 99]),
        (1, [2, 3, 10, 55]),
    ],
)
def test_larger_budgets_follow_those_that_held(monkeypatch, holds_from, wanted):
    search = Search.__new__(Search)
    monkeypatch.setattr(Search, "_smallest", lambda self: 1)
    monkeypatch.setattr(Search, "_holds", lambda self, percent, baseline: percent >= holds_from)
    assert list(search._candidates({}))[: len(wanted)] == wanted
