"""What version 0.1.0 wrote is read: an interrupted run resumes, a recipe repeats its run, plans and scores load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensibert.core.artifacts import Plan, Sensitivity
from tests import runs
from tests.runs import command

V0_1 = Path(__file__).parent / "fixtures" / "v0_1"
# As the run of the fixture was started, in the spellings of its version.
RUN = ("--budget", "50%params", "--max-steps", 12, "--batch-size", 8, "--learning-rate", 0.001, "--seed", 3)
RUN += ("--save-steps", 8, "--recovery", "plain", "--policy", "global")

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("earlier"))


def start(here, *more):
    files = ("--train-file", here / "train.csv", "--validation-file", here / "dev.csv")
    return command("finetune", "--model", here / "model", *files, *more, "--json")


def test_an_interrupted_run_resumes_to_the_weights_it_would_have_had(here, tmp_path, caplog):
    shutil.copytree(V0_1 / "run.partial", tmp_path / "run.partial")
    done = start(here, *RUN, "--output", tmp_path / "run", "--resume")
    assert done.code == 0, done.err
    said = [line for line in caplog.messages if "is of an earlier version, without digests" in line]
    assert len(said) == 1 and "checkpoint-8" in said[0]
    written = json.loads((V0_1 / "run.json").read_text())
    assert done.json["metrics_at_cut"] == written["metrics_dense"] and done.json["steps"] == written["steps"]
    ours, theirs = load_file(tmp_path / "run" / "model.safetensors"), load_file(V0_1 / "run.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():  # other processors round in other places
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_still_refuses_other_settings(here, tmp_path):
    shutil.copytree(V0_1 / "run.partial", tmp_path / "run.partial")
    for other, message in (
        (("--recovery", "lifted"), "has recovery continue, and this run rewarm"),
        (("--allocation", "uniform"), "has allocation global, and this run uniform"),
    ):
        done = start(here, *RUN, *other, "--output", tmp_path / "run", "--resume")
        assert done.code == 2 and message in done.err


def test_a_recipe_is_a_config(here, tmp_path):
    done = start(here, "--config", V0_1 / "unit" / "recipe.json", "--output", tmp_path / "again")
    assert done.code == 0, done.err
    written = json.loads((V0_1 / "unit" / "result.json").read_text())
    same = ("method", "budget", "grid", "steps", "encoder_params_before", "total_params_before", "flops_before")
    assert {name: done.json[name] for name in same} == {name: written[name] for name in same}
    assert 0.45 < done.json["encoder_params_after"] / written["encoder_params_before"] <= 0.5


@pytest.mark.parametrize("name", ["unit", "element"])
def test_plans_and_scores_load(name):
    plan = Plan.load(V0_1 / name / "plan.safetensors")
    scores = Sensitivity.load(V0_1 / name / "sensitivity.safetensors")
    result = json.loads((V0_1 / name / "result.json").read_text())
    assert plan.params == result["encoder_params_after"] and plan.layout.sites == scores.layout.sites
    assert str(plan.budget) == result["budget"] and scores.statistic == plan.method == result["method"]


def test_a_folder_is_inspected(here):
    done = command("inspect", V0_1 / "unit", "--json")
    written = json.loads((V0_1 / "unit" / "result.json").read_text())
    assert done.code == 0 and done.json["encoder_params_after"] == written["encoder_params_after"]
    assert done.json["metrics_at_cut"] == written["metrics_dense"]
