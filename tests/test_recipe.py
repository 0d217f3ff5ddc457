"""Whole runs on a tiny model: what the recipe promises about budgets, resuming, teachers and files."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerState

import sensibert
from sensibert import run_output, run_training
from sensibert.callback import TrimCallback
from sensibert.core.artifacts import Plan, Sensitivity, UnitPlan
from sensibert.core.config import TrimConfig
from sensibert.core.errors import SensibertError
from sensibert.core.schedule import Schedule
from sensibert.models import layout_of
from sensibert.recipe import finetune_and_trim
from sensibert.report.history import read_history
from sensibert.run_options import Options
from tests import runs
from tests.helpers import tiny_model
from tests.runs import RESULT_KEYS

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("recipe"))


def options(here, output, **changed) -> Options:
    usual = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "width_multiple": 4, "quiet": True}
    files = {"train_file": str(here / "train.csv"), "validation_file": str(here / "dev.csv")}
    return Options.from_settings({"model": str(here / "model"), "output": str(output), **files, **usual, **changed})


def test_a_run_keeps_the_budget_learns_and_writes_what_it_says(here, tmp_path, report):
    result = finetune_and_trim(options(here, tmp_path / "out", epochs=4))
    assert set(result) == RESULT_KEYS
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert 0.4 < result["encoder_params_after"] / result["encoder_params_before"] <= 0.5
    assert result["metrics"]["accuracy"] > 0.8  # the telling word is found, also by half an encoder
    assert result["steps"] == 40
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert layout_of(reloaded).encoder_params == result["encoder_params_after"]
    assert sum(p.numel() for p in reloaded.parameters()) == result["total_params_after"]
    plan = Plan.load(tmp_path / "out" / "plan.safetensors")
    assert plan.params == result["encoder_params_after"]
    ranking = Sensitivity.load(tmp_path / "out" / "sensitivity.safetensors").tensors
    assert len(ranking) == 12 and list(ranking.values()) == sorted(ranking.values(), reverse=True)
    pictures = {p.name for p in (tmp_path / "out" / "report").iterdir()}
    drawn = {f"{name}.png" for name in ("kept", "sensitivity", "curves", "run")}
    assert pictures == drawn | {"summary.txt", "ranking.csv", "curves.csv", "run.csv"}
    moments = read_history(tmp_path / "out" / "report" / "run.csv")
    (cut,) = (moment.step for moment in moments if moment.event == "cut")
    sizes = {m.encoder_params for m in moments if m.event == "log" and m.step < cut}
    assert sizes == {result["encoder_params_before"]} and len(moments) == 43
    assert {m.encoder_params for m in moments if m.step >= cut} >= {result["encoder_params_after"]}
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("method", ["taylor", "saliency", "magnitude", "random", "soft_gates", "baseline"])
def test_every_method_takes_the_same_steps_and_meets_the_same_budget(here, tmp_path, method):
    result = finetune_and_trim(options(here, tmp_path / "out", method=method, max_steps=4))
    assert result["steps"] == 4
    share = result["encoder_params_after"] / result["encoder_params_before"]
    assert share == 1 if method == "baseline" else 0.4 < share <= 0.5
    assert (result["metrics_at_cut"] is None) == (method == "baseline")


@pytest.mark.parametrize("budget", ["30%flops", "9Kparams", "70%params"])
def test_other_budgets_are_met_from_below(here, tmp_path, budget):
    result = finetune_and_trim(options(here, tmp_path / "out", budget=budget, max_steps=3))
    flops = result["flops_after"] / result["flops_before"]
    params = result["encoder_params_after"]
    wanted = {"30%flops": flops <= 0.3, "9Kparams": params <= 9000, "70%params": params <= 0.7 * 17088}
    assert wanted[budget]


def test_the_cubic_schedule_cuts_in_steps_and_ends_at_the_budget(here, tmp_path):
    seen = []

    class Watch(TrimCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            super().on_step_end(args, state, control, model=model, **kwargs)
            seen.append(layout_of(model).encoder_params)

    original, run_training.TrimCallback = run_training.TrimCallback, Watch
    try:
        result = finetune_and_trim(options(here, tmp_path / "out", schedule="cubic", milestones=3, epochs=1))
    finally:
        run_training.TrimCallback = original
    assert len(set(seen)) == 4 and seen == sorted(seen, reverse=True)  # dense and three cuts
    assert seen[-1] == result["encoder_params_after"] <= 0.5 * result["encoder_params_before"]
    plan = Plan.load(tmp_path / "out" / "plan.safetensors")
    assert plan.layout.encoder_params == result["encoder_params_before"]  # in units of the untrimmed model
    assert plan.params == result["encoder_params_after"]


def test_a_plan_may_come_from_elsewhere(here, tmp_path):
    requested = []

    def first_units(model, batches, budget) -> Plan:
        layout = layout_of(model)
        requested.append((len(next(iter(batches))["input_ids"]), budget.value <= layout.encoder_params / 2))
        keep = {site.name: torch.arange(site.units) < site.units // 4 for site in layout.sites}
        return UnitPlan(layout, keep, budget, "first")

    finetune_and_trim(options(here, tmp_path / "out", max_steps=3), first_units)
    assert requested == [(4, True)]
    plan = Plan.load(tmp_path / "out" / "plan.safetensors")
    assert all(plan.kept(site.name).tolist() == list(range(site.units // 4)) for site in plan.layout.sites)


def test_a_trimmed_model_is_trimmed_again_and_counted_in_its_own_units(here, tmp_path):
    first = finetune_and_trim(options(here, tmp_path / "first", max_steps=3))
    again = options(here, tmp_path / "again", max_steps=3, budget="60%params", teacher="snapshot")
    result = finetune_and_trim(replace(again, model=str(tmp_path / "first")))
    plan, model = Plan.load(tmp_path / "again" / "plan.safetensors"), sensibert.load(tmp_path / "again")[0]
    assert plan.layout.encoder_params == first["encoder_params_after"] == result["encoder_params_before"]
    assert plan.params == result["encoder_params_after"]
    assert {site.name: len(plan.kept(site.name)) for site in plan.layout.sites} == {
        site.name: site.units for site in layout_of(model).sites
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_kept_in_half_precision_is_trained_in_fp32(here, tmp_path, dtype):
    shutil.copytree(here / "model", tmp_path / "half")
    AutoModelForSequenceClassification.from_pretrained(here / "model", dtype=dtype).save_pretrained(tmp_path / "half")
    finetune_and_trim(replace(options(here, tmp_path / "out", max_steps=3), model=str(tmp_path / "half")))
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_what_a_grid_has_masked_is_no_model_to_start_from(here, tmp_path):
    finetune_and_trim(options(here, tmp_path / "masked", max_steps=3, grid="element", width_multiple=None))
    with pytest.raises(SensibertError, match="masked is masked by a grid, want a model that is not trimmed"):
        finetune_and_trim(replace(options(here, tmp_path / "out"), model=str(tmp_path / "masked")))


def test_rows_longer_than_the_model_are_refused(here, tmp_path):
    folder = runs.model_folder(tmp_path / "short", max_position_embeddings=8)
    requested = replace(options(here, tmp_path / "out"), model=folder)
    with pytest.raises(
        SensibertError, match="max_length: a row has 10 tokens, want at most 8, the positions of the model"
    ):
        finetune_and_trim(requested)
    assert finetune_and_trim(replace(requested, max_length=8, max_steps=3))["steps"] == 3


def test_few_samples_still_give_one_to_every_cut(here, tmp_path):
    requested = options(here, tmp_path / "out", samples=2, schedule="cubic", milestones=3, max_steps=9)
    finetune_and_trim(requested)
    assert Sensitivity.load(tmp_path / "out" / "sensitivity.safetensors").samples == 1


def test_the_samples_that_the_analysis_read_are_in_the_result(here, tmp_path):
    result = finetune_and_trim(options(here, tmp_path / "out", samples=800, max_steps=6))
    assert result["samples"] == 64 == Sensitivity.load(tmp_path / "out" / "sensitivity.safetensors").samples
    (text,) = [text for text in result["warnings"] if text.startswith("samples")]
    assert text.startswith("samples is 800, and the analysis reads 64: at most 1/64 of the rows that the run trains on")
    unasked = finetune_and_trim(options(here, tmp_path / "unasked", max_steps=6))
    assert unasked["samples"] == 64 and not any(text.startswith("samples") for text in unasked["warnings"])


def test_a_run_that_learned_nothing_says_so_at_the_cut_and_at_the_end(here, tmp_path, caplog):
    done = runs.command(
        *("finetune", "--model", here / "model", "--train-file", here / "train.csv", "--max-steps", 8),
        *("--validation-file", here / "dev.csv", "--learning-rate", 1, "--budget", "50%params"),
        *("--output", tmp_path / "out", "--json"),
    )
    assert [record.message for record in caplog.records if record.message.startswith("before the cut, accuracy is 0.")]
    (text,) = done.json["warnings"]
    assert re.fullmatch(r"accuracy is 0\.\d{4}, and the same answer for every row would score 0\.\d{4}: .+", text)
    assert f"Warning: {text}." in done.out


@pytest.mark.parametrize(
    "score, at_cut, said",
    [(0.9, 0.91, []), (0.74, 0.9, ["fell"]), (0.5, None, ["same"]), (0.4, 0.9, ["same", "fell"]), (0.62, 0.6, [])],
)
def test_scores_at_chance_or_far_below_those_at_the_cut_are_worth_a_warning(score, at_cut, said):
    data = SimpleNamespace(main_metric="accuracy", constant_score=lambda: 0.6)
    found = run_output.score_warnings(data, {"accuracy": score}, None if at_cut is None else {"accuracy": at_cut})
    assert [next(word for word in ("fell", "same") if word in text) for text in found] == said
    assert run_output.score_warnings(data, None, None) == []


@pytest.mark.parametrize("recovery, after", [(None, 0.0), ("rewarm", 0.0), ("continue", 0.25)])
def test_recovery_changes_the_dropout_and_restores_it(recovery, after):
    model = tiny_model(hidden_dropout_prob=0.25)
    callback = TrimCallback(TrimConfig(schedule=Schedule(recovery=recovery)))
    callback.prepare(model)
    callback.cuts = {1: 1.0}
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    callback.recovery.begin(model, torch.optim.AdamW(model.parameters()), callback.schedule, callback.left())
    assert dropouts and {module.p for module in dropouts} == {after}
    callback.on_train_end(None, TrainerState(global_step=1), None)
    assert {module.p for module in dropouts} == {0.25}


@pytest.mark.parametrize(
    "budget, scope, peak",
    [
        ("40%params", "encoder", 0.85),
        ("{third}params", "encoder", 0.98),
        ("75%params", "encoder", 0.67),
        ("75%params", "model", 0.79),  # 43 % of the encoder, since the rest of the model stays
    ],
)
def test_how_far_the_rate_of_a_continued_schedule_rises_follows_from_the_budget(
    here, tmp_path, budget, scope, peak, monkeypatch
):
    rates = []

    def stop(*_, lr_shape, **__):
        rates.append(lr_shape)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_training, "finetune", stop)
    third = layout_of(AutoModelForSequenceClassification.from_pretrained(here / "model")).encoder_params // 3
    requested = {"budget": budget.format(third=third), "scope": scope, "recovery": "continue"}
    with pytest.raises(KeyboardInterrupt):
        finetune_and_trim(options(here, tmp_path / "out", **requested))
    assert max(rates[0](step, 300) for step in range(100, 300)) == pytest.approx(peak, abs=0.01)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_no_result(here, tmp_path):
    with pytest.raises(SensibertError, match=r"the loss is (nan|inf) at step \d+; try a smaller learning rate"):
        finetune_and_trim(options(here, tmp_path / "out", learning_rate=1e30, method="baseline"))
    assert not (tmp_path / "out").exists()


def test_gradient_accumulation_and_bf16_run(here, tmp_path):
    requested = {"gradient_accumulation": 2, "precision": "bf16", "epochs": 1}
    result = finetune_and_trim(options(here, tmp_path / "out", **requested))
    assert result["steps"] == 5 and result["encoder_params_after"] < result["encoder_params_before"]
