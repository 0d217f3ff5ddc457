"""Runs that branch from one warm-up: the bits of separate runs, one analysis, and a run that is killed and resumed."""

import json

import pytest

from sensibert import branches, recipe, run_training
from sensibert.callback import TrimCallback
from sensibert.core.errors import SensibertError
from sensibert.recipe import finetune_and_trim
from tests import runs
from tests.runs import command
from tests.test_recipe import options
from tests.test_resume import Killed, same_weights

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("branches"))


@pytest.fixture(scope="module")
def dense(here, tmp_path_factory):
    """The score of a run of 9 steps that trims nothing."""
    folder = tmp_path_factory.mktemp("dense")
    return finetune_and_trim(options(here, folder / "out", method="baseline", max_steps=9))["metrics"]


WITH_BASELINE = {"baseline": True, "max_steps": 9, "save_steps": 1}


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """The folder of an unbroken run with a baseline, and its result."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, finetune_and_trim(options(here, folder, **WITH_BASELINE))


def dies_at(monkeypatch, step, method):
    step_end = TrimCallback.on_step_end

    def dies(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == step and self.config.method == method:
            raise Killed

    monkeypatch.setattr(TrimCallback, "on_step_end", dies)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_baseline_adds_the_score_of_a_dense_run_of_equal_length(here, tmp_path, steps, packing):
    usual = {"max_steps": 9, "packing": packing}
    with_both = finetune_and_trim(options(here, tmp_path / "both", baseline=True, **usual))
    assert steps == [1, 2, *range(3, 10), *range(3, 10)]  # one warm-up, of two steps
    alone = finetune_and_trim(options(here, tmp_path / "alone", **usual))
    dense = finetune_and_trim(options(here, tmp_path / "dense", method="baseline", **usual))
    assert with_both["metrics_baseline"] == dense["metrics"] and alone["metrics_baseline"] is None
    assert with_both["metrics"] == alone["metrics"] and with_both["metrics_at_cut"] == alone["metrics_at_cut"]
    assert same_weights(tmp_path / "both", tmp_path / "alone")
    seconds = with_both["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.01)
    assert seconds["baseline"] > 0 and not (tmp_path / "both.partial").exists()
    shown = (tmp_path / "both" / "README.md").read_text()
    score = dense["metrics"]["accuracy"]
    assert f"| accuracy | {alone['metrics']['accuracy']:.4f} | {score:.4f} |" in shown
    assert json.loads((tmp_path / "both" / "result.json").read_text()) == with_both


def test_baseline_without_a_warm_up_is_a_whole_run(here, tmp_path, steps):
    result = finetune_and_trim(options(here, tmp_path / "both", baseline=True, max_steps=3))  # cut after the first
    assert steps == [1, 2, 3, 1, 2, 3] and result["cut_step"] == 1
    dense = finetune_and_trim(options(here, tmp_path / "dense", method="baseline", max_steps=3))
    assert result["metrics_baseline"] == dense["metrics"]


def test_the_run_s_snapshot_does_not_teach_its_baseline(here, tmp_path, dense):
    result = finetune_and_trim(options(here, tmp_path / "both", baseline=True, teacher="snapshot", max_steps=9))
    assert result["metrics_baseline"] == dense


@pytest.mark.parametrize("step, method", [(2, "obs"), (6, "baseline"), (6, "obs")])
def test_a_broken_run_with_a_baseline_resumes(here, tmp_path, monkeypatch, whole, step, method):
    with monkeypatch.context() as patch:
        dies_at(patch, step, method)
        if step == 2:  # in the warm-up, whose callback is another
            patch.setattr(run_training.WarmUp, "on_save", lambda *args, **kwargs: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            finetune_and_trim(options(here, tmp_path / "broken", **WITH_BASELINE))
    result = finetune_and_trim(options(here, tmp_path / "broken", resume=True, **WITH_BASELINE))
    assert same_weights(whole[0], tmp_path / "broken")
    assert result["metrics_baseline"] == whole[1]["metrics_baseline"]


def test_a_run_that_is_past_its_cut_has_no_warm_up_to_branch_from(here, tmp_path, monkeypatch):
    usual = {"max_steps": 9, "save_steps": 1}
    with monkeypatch.context() as patch:
        dies_at(patch, 6, "obs")
        with pytest.raises(Killed):
            finetune_and_trim(options(here, tmp_path / "out", **usual))
    with pytest.raises(SensibertError, match="beyond the cut at step 3.*want --resume without baseline"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, baseline=True, **usual))
    assert finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual))["steps"] == 9


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "baseline"}, "baseline is True, but method baseline does not trim"),
        ({"task": "embedding"}, "task embedding learns the embeddings of the original model"),
    ],
)
def test_a_baseline_without_meaning_is_refused(here, tmp_path, changed, message):
    with pytest.raises(SensibertError, match=message):
        options(here, tmp_path / "out", baseline=True, **changed)


def test_the_command_line_prints_the_baseline(here, tmp_path):
    files = ("--train-file", here / "train.csv", "--validation-file", here / "dev.csv", "--output", tmp_path / "out")
    done = command("finetune", "--model", here / "model", *files, "--max-steps", 6, "--baseline", "--json")
    assert done.code == 0, done.err
    assert "baseline" in done.out and "At the cut: after 2 of 6 steps" in done.out
    assert done.json["metrics_baseline"]["accuracy"] >= 0


def test_finished_branches_of_other_data_or_settings_are_not_taken(here, tmp_path, monkeypatch):
    usual = {"budgets": "70,50%params", "max_steps": 6}
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write_family", lambda *args, **kwargs: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            finetune_and_trim(options(here, tmp_path / "out", **usual))
    other = runs.sentence_file(tmp_path / "other.csv", 30, seed=5)
    for changed, name in (({"validation_file": other}, "validation_file"), ({"allocation": "uniform"}, "allocation")):
        with pytest.raises(SensibertError, match=f"branches has {name} .*, and this run .*: want the same"):
            finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual, **changed))
    moved = runs.sentence_file(tmp_path / "moved.csv", 40, seed=2)  # the same rows
    result = finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual, validation_file=moved))
    assert len(result["rows"]) == 2


@pytest.mark.parametrize("content", ["", "[" * 50_000, "{}", "[1]", '{"sha256": 1, "content": {}}', None])
def test_a_damaged_note_of_a_branch_is_found(tmp_path, content):
    file = tmp_path / "outcome.json"
    noted = {"metrics": {"accuracy": 0.75, "loss": float("nan")}, "steps": 9, "warnings": ["ünd"]}
    branches._write(file, noted)
    assert branches._read(file)["steps"] == 9 and branches._read(file)["warnings"] == ["ünd"]
    file.write_text(file.read_text().replace("0.75", "0.95") if content is None else content)
    with pytest.raises(SensibertError, match="^resume: .*outcome.json is damaged: delete it"):
        branches._read(file)
