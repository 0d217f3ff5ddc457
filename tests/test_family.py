"""Several budgets in one run: the bits of separate runs from one warm-up and one analysis."""

import json

import pytest

from sensibert import recipe
from sensibert.core.errors import SensibertError
from sensibert.recipe import finetune_and_trim
from tests import runs
from tests.runs import command
from tests.test_recipe import options
from tests.test_resume import Killed, same_weights

pytestmark = pytest.mark.usefixtures("no_pictures")
BUDGETS = "70,50%params"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("more", [{}, {"teacher": "snapshot"}, {"schedule": "cubic", "milestones": 2}])
def test_every_model_is_that_of_a_run_of_its_own(here, tmp_path, steps, analyses, more):
    usual = {"max_steps": 9, **more}
    family = finetune_and_trim(options(here, tmp_path / "family", budgets=BUDGETS, **usual))
    assert steps == [1, 2, *range(3, 10), *range(3, 10)]
    assert len(analyses) == (3 if "schedule" in more else 1)  # the second cut of each is another
    assert [row["folder"] for row in family["rows"]] == ["70-params", "50-params"]
    for row in family["rows"]:
        alone = finetune_and_trim(options(here, tmp_path / row["folder"], budget=row["budget"], **usual))
        assert same_weights(tmp_path / "family" / row["folder"], tmp_path / row["folder"])
        own = json.loads((tmp_path / "family" / row["folder"] / "result.json").read_text())
        recipe_file = json.loads((tmp_path / "family" / row["folder"] / "recipe.json").read_text())
        assert recipe_file["budget"] == own["budget"] == row["budget"] and recipe_file["budgets"] is None
        assert own["output"] == recipe_file["output"] == str(tmp_path / "family" / row["folder"])
        assert own["metrics"] == row["metrics"] == alone["metrics"]
        assert own["metrics_at_cut"] == alone["metrics_at_cut"] == family["metrics_at_cut"]
        assert row["encoder_params_after"] == alone["encoder_params_after"]
    assert json.loads((tmp_path / "family" / "result.json").read_text()) == family
    assert not (tmp_path / "family.partial").exists()


def test_the_folder_has_a_picture_and_a_table_with_the_baseline(here, tmp_path, report):
    done = command(
        *("finetune", "--model", here / "model", "--train-file", here / "train.csv", "--baseline", "--json"),
        *("--validation-file", here / "dev.csv", "--output", tmp_path / "f", "--budgets", BUDGETS, "--max-steps", 6),
        *("--width-multiple", 4),
    )
    assert done.code == 0, done.err
    baseline = done.json["metrics_baseline"]["accuracy"]
    lines = [line.split() for line in done.out.splitlines()]
    (whole,) = (line for line in lines if line[:1] == ["baseline"])
    assert whole[1:4] == [f"{done.json['encoder_params_before']:,}", "100.0", "%"]
    assert float(whole[4]) > 0 and whole[5] == f"{baseline:.4f}"  # megabytes, then scores
    assert {line[0] for line in lines if line} >= {"70%params", "50%params"}
    assert (tmp_path / "f" / "report" / "front.png").stat().st_size > 0
    assert (tmp_path / "f" / "report" / "summary.txt").read_text().strip() in done.out
    seconds = done.json["seconds"]
    rows = sum(row["seconds"] for row in done.json["rows"])
    assert seconds["total"] == pytest.approx(seconds["warm_up_and_analysis"] + seconds["baseline"] + rows, abs=0.01)
    own = json.loads((tmp_path / "f" / "70-params" / "result.json").read_text())
    assert own["metrics_baseline"] == done.json["metrics_baseline"]
    timed = command("bench", here / "model", tmp_path / "f", "--rounds", 1, "--length", 8, "--json")
    assert [row["folder"] for row in timed.json["rows"]] == [
        str(folder) for folder in (here / "model", tmp_path / "f/70-params", tmp_path / "f/50-params")
    ]


def test_without_validation_data_there_are_models_and_no_scores(here, tmp_path):
    family = finetune_and_trim(
        options(here, tmp_path / "f", budgets=BUDGETS, max_steps=6, validation_file=None, epochs=1)
    )
    assert [row["metrics"] for row in family["rows"]] == [None, None]
    assert (tmp_path / "f" / "50-params" / "model.safetensors").exists()


SAVED = {"budgets": BUDGETS, "max_steps": 9, "save_steps": 1}


@pytest.fixture(scope="module")
def whole(here):
    """A family that was not broken."""
    finetune_and_trim(options(here, here / "whole", **SAVED))
    return here / "whole"


@pytest.mark.parametrize("first", ["70%params", "50%params"])
def test_a_broken_family_resumes_and_trains_no_model_twice(here, whole, tmp_path, monkeypatch, steps, first):
    write, written = recipe.write_model, []

    def dies(folder, own, trained):
        if own.trim.budget == first:
            raise Killed
        written.append(own.trim.budget)
        write(folder, own, trained)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write_model", dies)
        with pytest.raises(Killed):
            finetune_and_trim(options(here, tmp_path / "broken", **SAVED))
    steps.clear()
    family = finetune_and_trim(options(here, tmp_path / "broken", resume=True, **SAVED))
    assert steps == ([] if first == "50%params" else [*range(3, 10)])
    assert len(family["rows"]) == 2
    for name in ("70-params", "50-params"):
        assert same_weights(whole / name, tmp_path / "broken" / name)


def test_another_family_in_its_place_leaves_no_model_of_the_old_one(here, tmp_path):
    finetune_and_trim(options(here, tmp_path / "f", budgets=BUDGETS, max_steps=3))
    (tmp_path / "f" / "notes.txt").write_text("mine")
    with pytest.raises(SensibertError, match="want a new folder or --overwrite"):
        finetune_and_trim(options(here, tmp_path / "f", budgets="60,50%params", max_steps=3))
    finetune_and_trim(options(here, tmp_path / "f", budgets="60,50%params", max_steps=3, overwrite=True))
    folders = {path.name for path in (tmp_path / "f").iterdir() if path.is_dir()}
    assert folders == {"60-params", "50-params", "report"} and (tmp_path / "f" / "notes.txt").exists()


def test_embedding_models_share_the_embeddings_of_the_original(tmp_path, steps):
    model, texts = runs.embedding_folder(tmp_path / "model"), runs.text_file(tmp_path / "texts.txt")
    usual = {"task": "embedding", "validation_file": runs.scored_file(tmp_path / "pairs.csv"), "max_steps": 4}
    usual |= {"model": model, "train_file": texts, "save_steps": None}
    family = finetune_and_trim(options(tmp_path, tmp_path / "f", budgets=BUDGETS, **usual))
    alone = finetune_and_trim(options(tmp_path, tmp_path / "alone", budget="50%params", **usual))
    assert steps.count(1) == 3 and family["metric"] == "spearman"
    assert same_weights(tmp_path / "f" / "50-params", tmp_path / "alone")
    assert family["rows"][1]["metrics"] == alone["metrics"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"budgets": "50,150%params"}, "budgets: '50,150%params': '150%params' is outside"),
        ({"method": "baseline"}, "budgets is '70,50%params', but method baseline does not trim"),
        ({"grid": "element", "width_multiple": None, "budgets": "50,30%flops"}, "no kernel skips single elements"),
        ({"budgets": "50%params,100params"}, "cannot be trimmed; the smallest reachable budget"),
        ({"budgets": "50%params,1Gparams"}, "nothing would be trimmed"),
    ],
)
def test_wrong_budgets_are_refused_before_anything_is_trained(here, tmp_path, steps, changed, message):
    with pytest.raises(SensibertError, match=message):
        finetune_and_trim(options(here, tmp_path / "f", **{"budgets": BUDGETS, "max_steps": 6, **changed}))
    assert steps == [] and list(tmp_path.iterdir()) == []


def test_budget_and_budgets_on_one_command_line_are_refused(here, tmp_path):
    given = ("--model", here / "model", "--train-file", here / "train.csv", "--output", tmp_path / "f")
    done = command("finetune", *given, "--budget", "50%params", "--budgets", BUDGETS)
    assert done.code == 2 and "budget and budgets are both given, want one of them" in done.err
