"""Folders side by side on one file."""

import shutil

import pytest

from sensibert.recipe import finetune_and_trim
from tests import runs
from tests.runs import command
from tests.test_recipe import options

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """`whole` and `half`, fine-tuned on the same rows."""
    folder = runs.workplace(tmp_path_factory.mktemp("compare"))
    finetune_and_trim(options(folder, folder / "whole", method="baseline"))
    finetune_and_trim(options(folder, folder / "half"))
    return folder


def compared(here, *more):
    return command("compare", *more, "--length", 16, "--rounds", 2, "--json")


def test_scores_sizes_and_times_of_every_folder(here):
    done = compared(here, here / "whole", here / "half", "--validation-file", here / "dev.csv")
    assert done.code == 0, done.err
    whole, half = done.json["rows"]
    assert done.json["validation_rows"] == 40 and "paired bootstrap" in done.json["test"]
    scored = command("eval", here / "half", "--validation-file", here / "dev.csv", "--json").json
    assert half["score"] == pytest.approx(scored["metrics"]["accuracy"]) and half["metrics"] == scored["metrics"]
    assert half["encoder_params"] == scored["encoder_params_after"] < whole["encoder_params"]
    assert half["total_params"] < whole["total_params"] and half["mb"] < whole["mb"]
    assert whole["difference"] is None
    gap = half["difference"]
    assert gap["value"] == pytest.approx(half["score"] - whole["score"])
    assert gap["low"] <= gap["value"] <= gap["high"] and 0 < gap["p_value"] <= 1
    assert all(row[name]["median"] > 0 for row in (whole, half) for name in ("batch_1_ms", "batch_32_ms"))
    assert "paired bootstrap" in done.out and str(here / "half") in done.out


def test_a_model_and_its_copy_do_not_differ(here):
    shutil.copytree(here / "half", here / "copy")
    done = compared(here, here / "half", here / "copy", "--validation-file", here / "dev.csv")
    gap = done.json["rows"][1]["difference"]
    assert (gap["value"], gap["low"], gap["high"], gap["p_value"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "folders, more, message",
    [
        (["whole"], ["--validation-file", "dev.csv"], "want two or more different ones"),
        (["whole", "whole"], ["--validation-file", "dev.csv"], "want two or more different ones"),
        (["whole", "half"], [], "validation_file is missing"),
        (["whole", "model"], ["--validation-file", "dev.csv"], "has no task head"),
        (["whole", "nowhere"], ["--validation-file", "dev.csv"], "nowhere"),
    ],
)
def test_wrong_input_is_named(here, folders, more, message):
    done = compared(here, *(here / name for name in folders), *(here / m if m == "dev.csv" else m for m in more))
    assert done.code == 2 and message in done.err and len(done.err.strip().splitlines()) == 1


def test_folders_of_two_tasks_are_refused(here, tmp_path):
    numbers = runs.number_file(tmp_path / "numbers.csv")
    finetune_and_trim(options(here, tmp_path / "number", train_file=numbers, validation_file=numbers, max_steps=3))
    done = compared(here, here / "half", tmp_path / "number", "--validation-file", here / "dev.csv")
    assert done.code == 2 and "is scored by accuracy" in done.err and "want one task" in done.err
