"""A run that ends before its cut, or between two: what it says, what its config notes, and what is not exported."""

import json
import logging
import pickle

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from sensibert import (
    Schedule,
    SensibertError,
    TrimCallback,
    TrimTrainer,
    allocate,
    analyze,
    export,
    layout_of,
    load,
    run_training,
    trim,
)
from sensibert.core.config import TrimConfig
from sensibert.models.unfinished import unfinished
from sensibert.recipe import finetune_and_trim
from sensibert.report import summary
from tests import runs
from tests.helpers import tiny_model
from tests.test_plain_trainer import arguments, rows
from tests.test_recipe import options

pytestmark = pytest.mark.usefixtures("no_pictures")
CUBIC = {"shape": "cubic", "milestones": 3, "trim_duration": 0.4}  # of 12 steps after 4, 6 and 9
SHORT = {"schedule": "cubic", "milestones": 3, "trim_duration": 0.5}  # the same for `Options`
SIZES = 17088, 8544  # parameters of the encoder before, and allowed at 50 %


class Stop(TrainerCallback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            if self.error is not None:
                raise self.error


def stopped(folder, step, kind=Trainer, error=None, config=None, **more) -> tuple[Trainer, TrimCallback]:
    callback = TrimCallback(config or TrimConfig(method="magnitude", schedule=Schedule(**CUBIC), width_multiple=4))
    trainer = kind(tiny_model(), arguments(folder, **more), train_dataset=rows(), callbacks=[callback])
    trainer.add_callback(Stop(step, error))
    return trainer, callback


def note(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["sensibert"]


def test_a_cubic_that_was_stopped_notes_what_it_reached_and_is_not_exported_as_finished(tmp_path):
    trainer, callback = stopped(tmp_path / "run", 6)
    trainer.train()
    model, size = trainer.model, layout_of(trainer.model).encoder_params
    assert SIZES[1] < size < SIZES[0]
    (warning,) = callback.warnings
    assert f"is larger than 50%params: it has {size:,} params of 17,088, want at most 8,544" in warning
    trainer.save_model(str(tmp_path / "saved"))
    for found in (note(tmp_path / "saved"), load(tmp_path / "saved")[0].config.sensibert):
        assert (found["budget"], found["unfinished"]) == (f"{size / 1e3:.12g}Kparams", "50%params")
    for partial in (model, load(tmp_path / "saved")[0]):
        with pytest.raises(
            SensibertError, match=r"export: the model reached .*Kparams on the way to 50%params.*trim\("
        ):
            export(partial, tmp_path / "small")
        assert not (tmp_path / "small").exists()
    export(model, tmp_path / "small", accept_unfinished=True)
    assert note(tmp_path / "small")["unfinished"] == "50%params"
    assert "Kparams, on the way to 50%params." in (tmp_path / "small" / "README.md").read_text()
    trim(model, allocate(analyze(model, method="magnitude"), "8544params"))
    export(model, tmp_path / "done")
    assert note(tmp_path / "done")["budget"] == "8.544Kparams" and "unfinished" not in note(tmp_path / "done")


def test_a_finished_cubic_notes_its_budget_alone(tmp_path):
    trainer, callback = stopped(tmp_path / "run", 10, save_strategy="steps", save_steps=5)
    trainer.train()
    export(trainer.model, tmp_path / "small")
    found = note(tmp_path / "small")
    assert found["budget"] == "50%params" and "unfinished" not in found and not callback.warnings
    assert note(tmp_path / "run" / "checkpoint-5")["unfinished"] == "50%params"


@pytest.mark.parametrize("step, size", [(2, None), (5, "unfinished")])
def test_an_interruption_leaves_a_model_that_says_how_far_it_came(tmp_path, step, size):
    trainer, _ = stopped(tmp_path / "run", step, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if size is None:
        assert layout_of(trainer.model).encoder_params == SIZES[0]
        export(trainer.model, tmp_path / "whole")  # it claims nothing
        assert "sensibert" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    else:
        with pytest.raises(SensibertError, match="on the way to 50%params"):
            export(trainer.model, tmp_path / "small")


def test_a_masked_model_between_two_cuts_is_not_exported_either(tmp_path):
    config = TrimConfig(grid="block8", method="magnitude", schedule=Schedule(**CUBIC))
    trainer, callback = stopped(tmp_path / "run", 6, config=config)
    trainer.train()
    assert len(callback.warnings) == 1
    with pytest.raises(SensibertError, match=r"reached .*Kparams on the way to 50%params"):
        export(trainer.model, tmp_path / "small")
    export(trainer.model, tmp_path / "small", accept_unfinished=True)
    trim(trainer.model, allocate(analyze(trainer.model, method="magnitude", grid=config.parsed_grid()), "50%params"))
    export(trainer.model, tmp_path / "done")


@pytest.mark.parametrize("grid", ["unit", "block8"])
def test_a_run_that_was_stopped_between_two_cuts_resumes_to_its_budget(tmp_path, grid):
    config = TrimConfig(grid=grid, method="magnitude", schedule=Schedule(**CUBIC))
    save = {"config": config, "kind": TrimTrainer, "save_strategy": "steps", "save_steps": 5}
    trainer, _ = stopped(tmp_path / "run", 7, **save)
    trainer.train()
    again, callback = stopped(tmp_path / "run", 8, **save)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert unfinished(again.model) is not None and len(callback.warnings) == 1
    for checkpoint in (5, 10):
        last, callback = stopped(tmp_path / "run", 12, **save)
        last.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
        assert unfinished(last.model) is None and callback.warnings == []
        export(last.model, tmp_path / f"small-{checkpoint}")
        if grid == "unit":
            assert note(tmp_path / f"small-{checkpoint}")["budget"] == "50%params"


def test_early_stopping_before_the_cut_is_said_in_the_log_that_everybody_sees(tmp_path, capsys):
    callback = TrimCallback(TrimConfig(method="magnitude", schedule=Schedule(trim_start=0.8)))
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    trainer = Trainer(
        tiny_model(),
        arguments(tmp_path, **best),
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda _: {"score": 0},
        callbacks=[callback, EarlyStoppingCallback(1)],
    )
    handlers, logging.getLogger().handlers = logging.getLogger().handlers, []  # those of pytest; by default none
    try:
        trainer.train()
    finally:
        logging.getLogger().handlers = handlers
    assert "TrimCallback: training ended at step 4, before the last cut at step 10" in capsys.readouterr().err


def test_a_chosen_plan_above_the_budget_is_not_called_by_it(tmp_path):
    def choose(model, batches, budget):
        return allocate(analyze(model, method="magnitude"), "80%params", width_multiple=4)

    callback = TrimCallback(TrimConfig(compensate=False), choose=choose)
    trainer = Trainer(tiny_model(), arguments(tmp_path / "run"), train_dataset=rows(), callbacks=[callback])
    trainer.train()
    (warning,) = callback.warnings
    assert warning.startswith("training ended at step 12: the model is larger than 50%params: it has ")
    with pytest.raises(SensibertError, match="on the way to 50%params"):
        export(trainer.model, tmp_path / "small")


@pytest.mark.parametrize(
    "steps, schedule, found",
    [
        (1, {}, ["the last cut is after step 1, the last one"]),
        (3, {"shape": "cubic"}, ["3 steps have room for 2 of 6 cuts"]),
        (12, {"shape": "cubic", "milestones": 3}, []),
        (12, {}, []),
    ],
)
def test_fewer_steps_than_cuts_reach_the_budget_and_are_said(tmp_path, steps, schedule, found):
    callback = TrimCallback(TrimConfig(method="magnitude", schedule=Schedule(**schedule), width_multiple=4))
    trainer = Trainer(tiny_model(), arguments(tmp_path, max_steps=steps), train_dataset=rows(), callbacks=[callback])
    trainer.train()
    assert [text.startswith(start) for text, start in zip(callback.warnings, found, strict=True)] == [True] * len(found)
    assert layout_of(trainer.model).encoder_params <= SIZES[1]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("unfinished"))


def about_the_cut(result):
    """Its warnings, without those about scores: these runs are too short to learn."""
    return [text for text in result["warnings"] if not text.startswith("accuracy")]


class Stopping(TrimCallback):
    """Ends the training after its fifth step."""

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        control.should_training_stop |= state.global_step == 5


@pytest.mark.parametrize("schedule", [{"trim_start": 0.9}, SHORT, SHORT | {"grid": "element", "width_multiple": None}])
def test_a_run_publishes_nothing_larger_than_its_budget_and_resumes(here, tmp_path, monkeypatch, schedule):
    requested = {"batch_size": 32, "save_steps": 2, **schedule}  # ten steps
    monkeypatch.setattr(run_training, "TrimCallback", Stopping)
    with pytest.raises(
        SensibertError, match=r"finetune: the run ended at step 5 of 10 with [\d,]+ params of 17,088, want"
    ):
        finetune_and_trim(options(here, tmp_path / "out", **requested))
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "checkpoint-4").exists()
    monkeypatch.undo()
    result = finetune_and_trim(options(here, tmp_path / "out", resume=True, **requested))
    assert result["encoder_params_after"] <= SIZES[1] and about_the_cut(result) == []


def test_a_run_with_a_chosen_plan_above_the_budget_publishes_nothing(here, tmp_path):
    def choose(model, batches, budget):
        return allocate(analyze(model, method="magnitude"), "80%params", width_multiple=4)

    with pytest.raises(SensibertError, match=r"with 13,\d+ params of 17,088, want at most 8,544 \(50%params\)"):
        finetune_and_trim(options(here, tmp_path / "out", max_steps=3, compensate=False), choose)
    assert not (tmp_path / "out").exists()
    requested = options(here, tmp_path / "out", max_steps=3, compensate=False, resume=True)
    result = finetune_and_trim(requested, choose, accept_unfinished=True)
    assert len(about_the_cut(result)) == 1 and note(tmp_path / "out")["unfinished"] == "50%params"
    assert note(tmp_path / "out")["budget"] == f"{result['encoder_params_after'] / 1e3:.12g}Kparams"


def test_the_result_and_the_summary_have_the_warnings(here, tmp_path):
    result = finetune_and_trim(options(here, tmp_path / "out", max_steps=1))
    (text,) = about_the_cut(json.loads((tmp_path / "out" / "result.json").read_text()))
    assert text.startswith("the last cut is after step 1") and f"Warning: {text}." in summary(result)
    assert "Warning" not in summary({name: value for name, value in result.items() if name != "warnings"})


def test_an_accepted_partial_model_is_a_model_to_start_from(here, tmp_path):
    trainer, _ = stopped(tmp_path / "run", 6)
    trainer.model = AutoModelForSequenceClassification.from_pretrained(here / "model")
    trainer.train()
    tokenizer = load(here / "model")[1]
    export(trainer.model, tmp_path / "partial", tokenizer, accept_unfinished=True)
    for method in ("magnitude", "baseline"):
        more = {"teacher": "snapshot"} if method != "baseline" else {}
        requested = options(
            here, tmp_path / method, model=str(tmp_path / "partial"), method=method, max_steps=3, **more
        )
        finetune_and_trim(requested)
        assert ("unfinished" in note(tmp_path / method)) is (method == "baseline")


def test_a_callback_can_be_pickled_after_a_training(tmp_path):
    trainer, callback = stopped(tmp_path, 6)
    trainer.train()
    assert pickle.loads(pickle.dumps(callback)).warnings == callback.warnings
    assert torch.is_tensor(next(iter(callback.whole_plan(trainer.model).keep.values())))


def test_a_masked_partial_model_is_unfinished_after_a_reload_too(tmp_path):
    settings = TrimConfig(method="magnitude", schedule=Schedule(**CUBIC), grid="element")
    trainer, _ = stopped(tmp_path / "run", 6, config=settings)
    trainer.train()
    partial = unfinished(trainer.model)
    assert partial is not None
    export(trainer.model, tmp_path / "m", accept_unfinished=True)
    again = load(tmp_path / "m")[0]
    assert unfinished(again) == partial
    with pytest.raises(SensibertError, match="50%params"):
        export(again, tmp_path / "again")
