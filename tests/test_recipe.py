"""Whole runs on a tiny model: what the recipe promises about budgets, resuming, teachers and files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import sensibert
from sensibert import cost, recipe
from sensibert.artifacts import Plan, Sensitivity
from sensibert.errors import SensibertError
from sensibert.models import describe
from sensibert.options import Options
from sensibert.recipe import TrimCallback, finetune_and_trim
from sensibert.schedule import Schedule
from sensibert.tasks import TaskData, load_examples
from tests import runs


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    runs.model_folder(folder / "model")
    runs.sentence_file(folder / "train.csv", 160, seed=1)
    runs.sentence_file(folder / "dev.csv", 40, seed=2)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than a tiny run; the tests that look at what is drawn are marked so."""
    if "report" not in request.fixturenames:
        monkeypatch.setattr(recipe, "write_report", lambda *args: [])


@pytest.fixture
def report():
    """Asked for by a test that wants the pictures drawn."""


def options(here, output, **changed) -> Options:
    usual = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "step": 4, "quiet": True}
    return Options(
        model=str(here / "model"),
        output=str(output),
        train_file=str(here / "train.csv"),
        validation_file=str(here / "dev.csv"),
        **(usual | changed),
    )


RESULT_KEYS = {
    *("task", "model", "method", "budget", "scope", "seed", "steps", "metrics", "metrics_dense", "seconds", "output"),
    *("encoder_params_before", "encoder_params_after", "total_params_before", "total_params_after"),
    *("flops_before", "flops_after", "flops_length"),
}


def test_a_run_keeps_the_budget_learns_and_writes_what_it_says(here, tmp_path, report):
    result = finetune_and_trim(options(here, tmp_path / "out", epochs=4))
    assert set(result) == RESULT_KEYS
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert 0.4 < result["encoder_params_after"] / result["encoder_params_before"] <= 0.5
    assert result["metrics"]["accuracy"] > 0.8  # the telling word is found, also by half an encoder
    assert result["steps"] == 40
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert describe(reloaded).encoder_params == result["encoder_params_after"]
    assert sum(p.numel() for p in reloaded.parameters()) == result["total_params_after"]
    plan = Plan.load(tmp_path / "out" / "plan.safetensors")
    assert plan.params == result["encoder_params_after"]
    ranking = Sensitivity.load(tmp_path / "out" / "sensitivity.safetensors").tensors
    assert len(ranking) == 12 and list(ranking.values()) == sorted(ranking.values(), reverse=True)
    pictures = {p.name for p in (tmp_path / "out" / "report").iterdir()}
    assert pictures == {"summary.txt", "ranking.csv", "kept.png", "sensitivity.png"}
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("method", ["taylor", "saliency", "magnitude", "random", "paper", "dense"])
def test_every_method_takes_the_same_steps_and_meets_the_same_budget(here, tmp_path, method):
    result = finetune_and_trim(options(here, tmp_path / "out", method=method, epochs=1))
    assert result["steps"] == 10
    share = result["encoder_params_after"] / result["encoder_params_before"]
    assert share == 1 if method == "dense" else 0.4 < share <= 0.5
    assert (result["metrics_dense"] is None) == (method == "dense")


@pytest.mark.parametrize("budget", ["30%flops", "9Kparams", "70%params"])
def test_other_budgets_are_met_from_below(here, tmp_path, budget):
    result = finetune_and_trim(options(here, tmp_path / "out", budget=budget, epochs=1, scope="encoder"))
    flops = result["flops_after"] / result["flops_before"]
    params = result["encoder_params_after"]
    wanted = {"30%flops": flops <= 0.3, "9Kparams": params <= 9000, "70%params": params <= 0.7 * 17088}
    assert wanted[budget]


def test_the_cubic_schedule_cuts_in_steps_and_ends_at_the_budget(here, tmp_path):
    seen = []
    cubic = Schedule("cubic", milestones=3)

    class Watch(TrimCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, model=model, **kwargs)
            seen.append(describe(model).encoder_params)

    original, recipe.TrimCallback = recipe.TrimCallback, Watch
    try:
        result = finetune_and_trim(options(here, tmp_path / "out", schedule=cubic, epochs=2))
    finally:
        recipe.TrimCallback = original
    assert len(set(seen)) == 4 and seen == sorted(seen, reverse=True)  # dense and three cuts
    assert seen[-1] == result["encoder_params_after"] <= 0.5 * result["encoder_params_before"]
    plan = Plan.load(tmp_path / "out" / "plan.safetensors")
    assert plan.layout.encoder_params == result["encoder_params_before"]  # told in units of the dense model
    assert plan.params == result["encoder_params_after"]


def same_weights(a, b) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Killed(BaseException):
    """Not an Exception: nothing on the way may swallow it."""


@pytest.mark.parametrize("step", [3, 7, 12, 17])
@pytest.mark.parametrize("kind", ["oneshot", "cubic"])
def test_a_broken_run_resumes_to_the_same_weights(here, tmp_path, step, kind, monkeypatch):
    asked = {"save_steps": 2, "schedule": Schedule(kind, milestones=2), "teacher": "snapshot"}
    whole = tmp_path / "whole"
    finetune_and_trim(options(here, whole, **asked))
    step_end = TrimCallback.on_step_end

    def dies(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(TrimCallback, "on_step_end", dies)
    with pytest.raises(Killed):
        finetune_and_trim(options(here, tmp_path / "broken", **asked))
    monkeypatch.undo()
    assert not (tmp_path / "broken").exists()
    with pytest.raises(SensibertError, match="unfinished run, want --resume or --overwrite"):
        finetune_and_trim(options(here, tmp_path / "broken", **asked))
    result = finetune_and_trim(options(here, tmp_path / "broken", resume=True, **asked))
    assert result["metrics_dense"] is not None
    assert same_weights(whole, tmp_path / "broken")


def test_a_run_killed_by_the_system_resumes_to_the_same_weights(here, tmp_path):
    program = (
        "import sys; from tests.test_recipe import options; from pathlib import Path\n"
        "from sensibert.recipe import finetune_and_trim\n"
        "finetune_and_trim(options(Path(sys.argv[1]), sys.argv[2], save_steps=1, resume=len(sys.argv) > 3))"
    )
    command = [sys.executable, "-c", program, str(here)]
    victim = subprocess.Popen(
        [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / "killed.partial"
    deadline = time.monotonic() + 120
    while not any(partial.glob("checkpoint-[6-9]")) and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    finetune_and_trim(options(here, tmp_path / "whole", save_steps=1))
    finetune_and_trim(options(here, tmp_path / "killed", save_steps=1, resume=True))
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


def test_runs_can_branch_from_the_last_dense_step(here, tmp_path):
    asked = {"save_before_cut": True, "keep_checkpoints": True, "save_steps": 100}
    finetune_and_trim(options(here, tmp_path / "first", **asked))
    (saved,) = (tmp_path / "first.partial").glob("checkpoint-6")
    finetune_and_trim(options(here, tmp_path / "alone", budget="30%params", method="magnitude"))
    (tmp_path / "branch.partial").mkdir()
    shutil.copytree(saved, tmp_path / "branch.partial" / saved.name)
    branch = options(here, tmp_path / "branch", budget="30%params", method="magnitude", resume=True)
    finetune_and_trim(branch)
    assert same_weights(tmp_path / "alone", tmp_path / "branch")


def test_a_damaged_checkpoint_is_skipped_and_if_all_are_it_is_said(here, tmp_path):
    asked = {"save_steps": 5, "keep_checkpoints": True}
    finetune_and_trim(options(here, tmp_path / "out", **asked))
    newest, older = (tmp_path / "out.partial" / f"checkpoint-{n}" for n in (20, 15))
    os.truncate(newest / "model.safetensors", 100)
    finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True, **asked))
    for checkpoint in (tmp_path / "out.partial").glob("checkpoint-*"):
        os.truncate(checkpoint / "optimizer.pt", 10)
    with pytest.raises(SensibertError, match="truncated checkpoint, optimizer.pt has 10 bytes, want"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True, **asked))


@pytest.mark.parametrize("teacher", ["snapshot", "folder"])
def test_distillation_changes_the_result_and_the_snapshot_is_the_dense_model(here, tmp_path, teacher):
    plain = finetune_and_trim(options(here, tmp_path / "plain"))
    if teacher == "folder":
        finetune_and_trim(options(here, tmp_path / "teacher", method="dense"))
        teacher = str(tmp_path / "teacher")
    taught = finetune_and_trim(options(here, tmp_path / "taught", teacher=teacher, distil=0.9))
    assert plain["encoder_params_after"] == taught["encoder_params_after"] or teacher != "snapshot"
    assert not same_weights(tmp_path / "plain", tmp_path / "taught")


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_no_result(here, tmp_path):
    with pytest.raises(SensibertError, match=r"the loss is (nan|inf) at step \d+; try a smaller learning rate"):
        finetune_and_trim(options(here, tmp_path / "out", learning_rate=1e30, method="dense"))
    assert not (tmp_path / "out").exists()


def test_gradient_accumulation_and_bf16_run(here, tmp_path):
    result = finetune_and_trim(options(here, tmp_path / "out", gradient_accumulation=2, precision="bf16"))
    assert result["steps"] == 10 and result["encoder_params_after"] < result["encoder_params_before"]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"method": "best"}, "method is 'best', want one of fisher"),
        ({"budget": "0%params"}, "outside"),
        ({"budget": "120%params"}, "outside"),
        ({"budget": "abc"}, "not a budget"),
        ({"budget": "1%params"}, "smallest reachable budget is"),
        ({"budget": "8ms"}, "measured table"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"train_file": None}, "train_file is missing"),
        ({"train_file": "/nowhere.csv"}, "nowhere.csv"),
        ({"model": "/nowhere"}, "model: no tokenizer in /nowhere|cannot read /nowhere"),
        ({"label_column": "stars"}, "'stars'"),
        ({"policy": "fair"}, "policy is 'fair'"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(here, tmp_path, changed, said):
    with pytest.raises(SensibertError, match=said):
        finetune_and_trim(replace(options(here, tmp_path / "out"), **changed))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_kept(here, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(SensibertError, match="not empty, want a new folder or --overwrite"):
        finetune_and_trim(options(here, tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_callback_trims_inside_somebody_elses_trainer(here, tmp_path):
    from transformers import AutoTokenizer

    data = TaskData.build(
        None, load_examples(str(here / "train.csv")), None, AutoTokenizer.from_pretrained(here / "model")
    )
    model = AutoModelForSequenceClassification.from_pretrained(here / "model", num_labels=2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=3e-3, use_cpu=True, report_to="none", disable_tqdm=True
    )
    callback = TrimCallback("40%params", "taylor", step=4)
    trainer = Trainer(model, arguments, data.collator, train_dataset=data.train, callbacks=[callback])
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}  # the trap: trimmed tensors that no optimizer holds
    layout = describe(model)
    assert layout.encoder_params <= 0.4 * callback.layout.encoder_params
    assert cost.params(callback.layout, cost.counts_of(callback.layout, callback.whole_plan(model).keep)) == (
        layout.encoder_params
    )
    sensibert.export(model, tmp_path / "small")
    assert describe(AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")) == layout
