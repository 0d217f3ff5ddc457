"""--best: a run ends with the best evaluated checkpoint after the cut, also if it was interrupted."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from sensibert import SensibertError
from sensibert.callback import TrimCallback
from sensibert.data.embedding_data import EmbeddingData
from sensibert.data.task_data import TaskData
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import Options
from tests import runs

pytestmark = pytest.mark.usefixtures("no_pictures")
# Scores after steps 2, 4 (just before the cut, then just after it), 6, 8, 10 and 12.
SCORES = (0.9, 0.8, 0.1, 0.3, 0.2, 0.2, 0.2)
BEST = 6


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("best"))


@pytest.fixture
def scores(monkeypatch):
    """Replaces the accuracies of a run, in turn."""

    def of_run(*values):
        given = iter(values)
        monkeypatch.setattr(TaskData, "compute_metrics", lambda self, logits: {"accuracy": next(given)})

    return of_run


def options(here, output, **changed) -> Options:
    usual = {"max_steps": 12, "learning_rate": 3e-3, "batch_size": 16, "width_multiple": 4, "quiet": True}
    usual |= {"train_file": str(here / "train.csv"), "validation_file": str(here / "dev.csv")}
    usual |= {"eval_steps": 2, "best": True, "keep_checkpoints": True}
    return Options.from_settings({"model": str(here / "model"), "output": str(output), **usual, **changed})


def assert_is_checkpoint(output, step) -> None:
    ours, theirs = load_file(output / "model.safetensors"), load_file(checkpoint(output, step) / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def checkpoint(output, step):
    return output.with_name(output.name + ".partial") / f"checkpoint-{step}"


@pytest.mark.parametrize("packing", ["on", "off"])
def test_nothing_from_before_the_cut_wins(here, tmp_path, scores, packing):
    scores(*SCORES)
    result = finetune_and_trim(options(here, tmp_path / "out", packing=packing))
    assert (result["best_step"], result["metrics"], result["steps"]) == (BEST, {"accuracy": 0.3}, 12)
    assert [each["accuracy"] for each in result["evaluations"]] == [SCORES[0], *SCORES[2:]]
    assert result["metrics_at_cut"] == {"accuracy": 0.8}
    assert result["encoder_params_after"] <= 0.5 * result["encoder_params_before"]
    assert_is_checkpoint(tmp_path / "out", BEST)


def test_between_the_cuts_of_a_cubic_schedule_nothing_wins_either(here, tmp_path, scores):
    scores(0.1, 0.2, 0.9, 0.1, 0.1, 0.3, 0.2)  # after 2, 4 (before and after the first cut of 4, 5 and 6), 6, ...
    result = finetune_and_trim(options(here, tmp_path / "out", schedule="cubic", milestones=3))
    assert (result["best_step"], result["metrics"]) == (10, {"accuracy": 0.3})
    assert_is_checkpoint(tmp_path / "out", 10)


@pytest.mark.parametrize("step, before", [(3, 1), (9, 5)])
def test_an_interrupted_run_resumes_to_the_same_model(here, tmp_path, scores, monkeypatch, step, before):
    """before: the scores until the checkpoint that the run resumes from."""
    step_end = TrimCallback.on_step_end

    def dies(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrimCallback, "on_step_end", dies)
        scores(*SCORES)
        with pytest.raises(KeyboardInterrupt):
            finetune_and_trim(options(here, tmp_path / "out"))
    scores(*SCORES[before:])
    result = finetune_and_trim(options(here, tmp_path / "out", resume=True))
    assert (result["best_step"], result["metrics"]) == (BEST, {"accuracy": 0.3})
    assert [each["step"] for each in result["evaluations"]] == [2, 4, 6, 8, 10, 12]
    assert_is_checkpoint(tmp_path / "out", BEST)


def test_a_best_checkpoint_that_is_gone_is_named(here, tmp_path, scores):
    scores(*SCORES)
    finetune_and_trim(options(here, tmp_path / "out"))
    shutil.rmtree(checkpoint(tmp_path / "out", BEST))
    with pytest.raises(SensibertError, match=f"checkpoint-{BEST}: not a complete checkpoint"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True))


def test_an_embedding_model_ends_with_its_best_checkpoint_too(here, tmp_path, monkeypatch):
    given = iter(SCORES)
    monkeypatch.setattr(EmbeddingData, "compute_metrics", lambda self, logits: {self.main_metric: next(given)})
    files = {"train_file": runs.text_file(tmp_path / "texts.txt", 64), "model": runs.embedding_folder(tmp_path / "m")}
    result = finetune_and_trim(
        options(here, tmp_path / "out", task="embedding", validation_file=None, trim_start=1 / 3, **files)
    )
    assert result["best_step"] == BEST and list(result["metrics"].values()) == [0.3]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(checkpoint(tmp_path / "out", BEST) / "model.safetensors")
    assert all(torch.equal(value, theirs[f"base_model.{name}"]) for name, value in ours.items())


def test_with_a_grid_the_best_checkpoint_keeps_its_masks(here, tmp_path, scores):
    scores(*SCORES)
    result = finetune_and_trim(options(here, tmp_path / "out", grid="block8", width_multiple=None))
    assert result["best_step"] == BEST and result["encoder_params_after"] <= 0.5 * result["encoder_params_before"]


def test_a_run_that_was_moved_finds_its_best_checkpoint(here, tmp_path, scores):
    scores(*SCORES)
    finetune_and_trim(options(here, tmp_path / "out"))
    shutil.move(tmp_path / "out.partial", tmp_path / "moved.partial")
    result = finetune_and_trim(options(here, tmp_path / "moved", resume=True))
    assert (result["best_step"], result["metrics"]) == (BEST, {"accuracy": 0.3})
    assert_is_checkpoint(tmp_path / "moved", BEST)


def test_scores_of_another_validation_file_do_not_mix(here, tmp_path, scores, monkeypatch):
    scores(*SCORES)
    monkeypatch.setattr(TrimCallback, "on_step_begin", stop_before(4))  # before the cut
    with pytest.raises(KeyboardInterrupt):
        finetune_and_trim(options(here, tmp_path / "out"))
    monkeypatch.undo()
    other = {"validation_file": str(here / "train.csv"), "resume": True}
    with pytest.raises(SensibertError, match="has validation_file 40 rows with digest .*, and this run 160 rows"):
        finetune_and_trim(options(here, tmp_path / "out", **other))


def stop_before(step):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            raise KeyboardInterrupt

    return on_step_begin


def test_the_baseline_ends_with_its_best_checkpoint(here, tmp_path, scores):
    scores(0.1, 0.9, 0.2, 0.2, 0.2, 0.2)
    result = finetune_and_trim(options(here, tmp_path / "out", method="baseline"))
    assert (result["best_step"], result["metrics"]) == (4, {"accuracy": 0.9})
    assert_is_checkpoint(tmp_path / "out", 4)
