"""TrimCallback in a Trainer of one's own: what it trims, what it refuses, what it goes on from."""

import copy

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

import sensibert
from sensibert import allocate, analyze
from sensibert.callback import TrimCallback
from sensibert.core import cost
from sensibert.core.config import TrimConfig
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.core.schedule import Schedule
from sensibert.data.files import load_examples
from sensibert.data.task_data import TaskData
from sensibert.models import base_of, embeddings_of, layout_of
from sensibert.models.masks import masks_of
from sensibert.optim import optimizer_cls_and_kwargs
from sensibert.sensitivity import ranking
from sensibert.training.finetune import finetune
from sensibert.training.trainer import TrimTrainer
from tests import runs
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("callback"))


def config(budget="50%params", **settings) -> TrimConfig:
    return TrimConfig(budget, width_multiple=4, **settings)


def own_trainer(here, output, callback, kind=Trainer, model=None, data=None, **arguments):
    """A Trainer as its owner would build it."""
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    built = TaskData.build(None, load_examples(str(here / "train.csv")), None, tokenizer)
    model = model or AutoModelForSequenceClassification.from_pretrained(here / "model", num_labels=2)
    usual = {"max_steps": 12, "learning_rate": 3e-3, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(output), **(usual | arguments))
    return kind(model, arguments, built.collator, train_dataset=data or built.train, callbacks=[callback])


def test_the_callback_trims_inside_somebody_elses_trainer(here, tmp_path):
    callback = TrimCallback(config("40%params", method="taylor"))
    trainer = own_trainer(here, tmp_path, callback)
    model = trainer.model
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}  # the trap: trimmed tensors that no optimizer holds
    layout = layout_of(model)
    assert layout.encoder_params <= 0.4 * callback.layout.encoder_params
    assert cost.params(callback.layout, cost.counts_of(callback.layout, callback.whole_plan(model).keep)) == (
        layout.encoder_params
    )
    sensibert.export(model, tmp_path / "small")
    assert layout_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")) == layout


class Gradients(TrainerCallback):
    """The ranking of tensors by the weights and gradients of the step before the cut."""

    def __init__(self, step):
        self.step, self.expected = step, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            weights = dict(base_of(kwargs["model"]).named_parameters())
            layout = layout_of(kwargs["model"])
            names = {m.parameter for site in layout.sites for m in site.members if m.parameter.endswith(".weight")}
            self.expected = {n: float((weights[n] * weights[n].grad).abs().mean().detach()) for n in names}


@pytest.mark.parametrize("kind", [Trainer, TrimTrainer, "ours"])
def test_tensors_are_ranked_by_the_gradients_of_the_step_before_the_cut(here, tmp_path, kind, monkeypatch):
    callback = TrimCallback(config(method="magnitude", compensate=False))
    monkeypatch.setattr(ranking, "rank_tensors", None)  # takes passes of its own
    if kind == "ours":
        made = own_trainer(here, tmp_path, callback, max_grad_norm=0, learning_rate=1e-6)
        watch, common = Gradients(min(callback.schedule.cuts(12))), (made.train_dataset, made.data_collator)
        finetune(made.model, *common, made.args, [callback, watch], packing="on")
    else:
        trainer = own_trainer(here, tmp_path, callback, kind, max_grad_norm=0, learning_rate=1e-6)
        watch = Gradients(min(callback.schedule.cuts(12)))
        trainer.add_callback(watch)
        trainer.train()
    actual = callback.sensitivity.tensors
    assert list(actual) == sorted(actual, key=lambda name: -actual[name]) and len(set(actual.values())) > 8
    assert actual == pytest.approx(watch.expected, rel=1e-3)


def test_a_trainer_of_ones_own_resumes_between_two_cuts(here, tmp_path):
    def run(folder, checkpoint=None):
        callback = TrimCallback(config(schedule=Schedule("cubic", milestones=3)))
        trainer = own_trainer(here, folder, callback, TrimTrainer, save_steps=5, save_strategy="steps", seed=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model, callback

    (whole, first), (resumed, again) = run(tmp_path), run(tmp_path, str(tmp_path / "checkpoint-5"))
    assert first.cuts.keys() == {4, 5, 6} and layout_of(whole).encoder_params == layout_of(resumed).encoder_params
    assert first.memory.params_before == again.memory.params_before
    assert again.sensitivity == first.sensitivity and again.whole_plan(resumed) == first.whole_plan(whole)
    assert resumed.config.sensibert == whole.config.sensibert and whole.config.sensibert["method"] == "obs"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_checkpoint_that_counts_is_the_one_that_is_loaded(here, tmp_path):
    """Not one of the same step that lies in the output folder."""

    def train(folder, source=None, method="obs", **arguments):
        callback = TrimCallback(config(method=method))
        trainer = own_trainer(here, folder, callback, TrimTrainer, save_steps=6, save_strategy="steps", **arguments)
        trainer.train(resume_from_checkpoint=source and str(source / "checkpoint-6"))
        return trainer

    train(tmp_path / "a")
    train(tmp_path / "b", seed=9)
    train(tmp_path / "dense", method="baseline")
    for source, message in (
        ("b", "b.checkpoint-6 has seed 9, and this run 42"),
        ("dense", "checkpoint-6 has cuts none"),
    ):
        with pytest.raises(SensibertError, match=message):
            train(tmp_path / "new", tmp_path / source)
    resumed = train(tmp_path / "b", tmp_path / "a")
    assert resumed.train().global_step == 12  # once more from the beginning: what it went on from is forgotten


def test_a_callback_that_is_added_later_resumes_too(here, tmp_path):
    trainer = own_trainer(here, tmp_path, TrimCallback(config()), TrimTrainer, save_steps=6)
    trainer.train()
    other, callback = own_trainer(here, tmp_path, TrainerCallback(), TrimTrainer), TrimCallback(config())
    other.add_callback(callback)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert (
        callback.excess(other.model) is None
        and callback.whole_plan(other.model).params < callback.layout.encoder_params
    )
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True))


def test_a_callback_without_a_model_says_so():
    with pytest.raises(SensibertError, match="has seen no model yet, want it among the callbacks of a Trainer"):
        TrimCallback().left()


def test_two_trainers_that_share_a_callback_each_meet_the_budget_of_their_own_model(here, tmp_path):
    callback = TrimCallback(config(method="magnitude"))
    models = [tiny_model(vocab_size=200, intermediate_size=size) for size in (64, 256)]
    before = [layout_of(model).encoder_params for model in models]
    trainers = [own_trainer(here, tmp_path / "run", callback, model=model) for model in models]
    for trainer, whole in zip(trainers, before, strict=True):
        trainer.train()
        assert 0.4 * whole < layout_of(trainer.model).encoder_params <= 0.5 * whole
    left = layout_of(models[1]).encoder_params
    trainers[1].train()  # the same model once more: it meets its budget already
    assert layout_of(models[1]).encoder_params == left


@pytest.mark.parametrize(
    "schedule, message",
    [
        (Schedule(trim_start=0.8), "ended at step 6, before the last cut at step 10: the model is not trimmed"),
        (
            Schedule("cubic", milestones=2, trim_duration=0.4),
            "the last cut at step 9: the model is larger than 50%params",
        ),
        (Schedule(), None),
    ],
)
def test_training_that_stops_before_the_last_cut_says_what_became_of_the_model(
    here, tmp_path, caplog, schedule, message
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    trainer = own_trainer(here, tmp_path, TrimCallback(config(method="magnitude", schedule=schedule)))
    trainer.add_callback(Stop())
    trainer.train()
    assert [message in record.message for record in caplog.records if record.name == "sensibert"] == [True] * bool(
        message
    )


def test_a_plain_trainer_says_why_it_cannot_load_the_checkpoint_of_a_trimmed_model(here, tmp_path):
    first = own_trainer(here, tmp_path, TrimCallback(config()), save_steps=3, save_strategy="steps")
    first.train()
    kept = {name: value.clone() for name, value in first.model.state_dict().items()}
    again = own_trainer(here, tmp_path, TrimCallback(config()))
    with pytest.raises(SensibertError, match=r"in the checkpoint of a trimmed model, .*: want TrimTrainer in place of"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # from before the cut, at step 4
    assert all(torch.equal(kept[name], value) for name, value in again.model.state_dict().items())
    assert not again.model._load_state_dict_pre_hooks  # the hook is gone


@pytest.mark.parametrize("optimizer", ["adamw_torch", "masked"])
def test_a_plain_trainer_that_resumes_a_run_on_a_grid_gets_its_masks_back(here, tmp_path, optimizer):
    def run(checkpoint=None):
        callback = TrimCallback(TrimConfig(grid="block8", method="magnitude"))
        trainer = own_trainer(here, tmp_path, callback, save_steps=6, save_strategy="steps")
        if optimizer == "masked":
            trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs(trainer.args)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model, callback.whole_plan(trainer.model)

    (whole, plan), (resumed, again) = run(), run(str(tmp_path / "checkpoint-6"))
    assert plan == again and plan.params < plan.layout.encoder_params
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_trainers_in_which_trimming_cannot_work_are_refused_before_the_first_step(here, tmp_path, monkeypatch):
    frozen = AutoModelForSequenceClassification.from_pretrained(here / "model", num_labels=2)
    frozen.bert.encoder.requires_grad_(False)
    for message, more in (
        ("every trimmable parameter has requires_grad=False", {"model": frozen}),
        ("train_dataset is an IterableDataset, want one with a length", {"data": Stream()}),
        ("TheirHead is not a class of transformers", {"model": TheirHead(frozen.config)}),
    ):
        trainer = own_trainer(here, tmp_path, TrimCallback(config()), **more)
        with pytest.raises(SensibertError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
    trainer = own_trainer(here, tmp_path, TrimCallback(config()))
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(SensibertError, match="world_size is 2 without torch.distributed"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


class TheirHead(BertForSequenceClassification):
    pass


@pytest.mark.parametrize(
    "requested, message",
    [
        ({"method": "fischer"}, "method is 'fischer', want one of"),
        ({"allocation": "globl"}, "allocation is 'globl', want one of"),
        ({"samples": 0}, "samples is 0, want more than 0"),
        ({"grid": "element", "method": "paper"}, "method is 'soft_gates', which needs whole units"),
        (
            {"grid": "block64", "width_multiple": 8},
            "width_multiple is 8, which needs whole units, and grid is 'block64'",
        ),
    ],
)
def test_a_callback_that_could_only_fail_at_the_cut_fails_when_it_is_made(requested, message):
    with pytest.raises(SensibertError, match=message):
        TrimCallback(TrimConfig(**requested))


def test_a_callback_takes_a_grid_by_its_name(here, tmp_path):
    callback = TrimCallback(TrimConfig(grid="block8", schedule=Schedule(trim_start=0.2)))
    assert (callback.config.grid, callback.config.method) == ("block8", "fisher")
    trainer = own_trainer(here, tmp_path, callback, TrimTrainer)
    trainer.train()
    plan = callback.whole_plan(trainer.model)
    assert plan.grid == Grid.block(8, 8) and plan.params <= 0.5 * callback.layout.encoder_params


def test_accumulated_gradients_are_those_of_one_large_batch(here, tmp_path):
    """BERT takes any keyword, so a stock Trainer takes it to divide by the number of items itself: N times too much."""
    norms, whole = [], tiny_model(vocab_size=64)  # without dropout
    for size, steps in ((8, 1), (2, 4)):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_grad_norm": 1e9}
        arguments |= {"max_steps": 1, "logging_steps": 1, "model": copy.deepcopy(whole)}
        trainer = own_trainer(here, tmp_path, TrainerCallback(), TrimTrainer, **arguments)
        trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, range(8))
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_recovery_finds_the_dropout_that_is_only_a_number():
    model = tiny_model("modernbert", attention_dropout=0.3)
    callback = TrimCallback(TrimConfig(schedule=Schedule(recovery="rewarm")))
    rates = [module for module in model.modules() if hasattr(module, "attention_dropout")]
    callback.prepare(model)
    callback.cuts = {1: 1.0}
    callback.recovery.begin(model, torch.optim.AdamW(model.parameters()), callback.schedule, callback.left())
    assert rates and {module.attention_dropout for module in rates} == {0.0}
    callback.on_train_end(None, TrainerState(global_step=1), None)
    assert {module.attention_dropout for module in rates} == {0.3}


@pytest.mark.parametrize(
    "budget, requested, frozen",
    [("50%params", None, True), ("60%params", None, False), ("60%params", True, True), ("40%params", False, False)],
)
def test_after_a_deep_cut_the_embeddings_are_frozen(here, tmp_path, budget, requested, frozen):
    tables, schedule = [], Schedule(freeze_embeddings=requested)
    callback = TrimCallback(config(budget, method="magnitude", schedule=schedule))
    trainer = own_trainer(here, tmp_path, callback, max_steps=6)
    table = embeddings_of(trainer.model).word_embeddings.weight

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            tables.append(table.detach().clone())

    trainer.add_callback(Look())
    trainer.train()
    assert not torch.equal(tables[0], tables[1])  # the cut comes after the second step
    assert torch.equal(tables[1], tables[2]) is torch.equal(tables[1], tables[-1]) is frozen
    assert (table in trainer.optimizer.state) is not frozen  # nor are their moments kept
    assert all(weight.requires_grad for weight in trainer.model.parameters())


@pytest.mark.parametrize("learns", [True, False])
def test_embeddings_are_as_they_were_once_the_training_ends(learns):
    model = tiny_model("eurobert")  # all it has of embeddings is a table of words
    table, callback = model.get_input_embeddings().weight, TrimCallback("40%params")
    table.requires_grad_(learns)
    callback.prepare(model)
    callback.cuts = {1: 1.0}
    callback.recovery.begin(model, torch.optim.AdamW(model.parameters()), callback.schedule, callback.left())
    assert not table.requires_grad
    callback.on_train_end(None, TrainerState(global_step=1), None)
    assert table.requires_grad is learns


def test_a_chosen_plan_of_blocks_is_not_compensated(here, tmp_path):
    def choose(model, batches, budget):
        return allocate(analyze(model, (), "magnitude", grid=Grid.element()), "50%params")

    trainer = own_trainer(here, tmp_path, TrimCallback(config(), choose=choose))
    with pytest.raises(SensibertError, match="choose: returned a plan of blocks, and compensate is True"):
        trainer.train()
    masked = own_trainer(here, tmp_path, TrimCallback(config(compensate=False), choose=choose))
    masked.train()
    assert masks_of(masked.model) is not None


def test_a_checkpoint_that_is_none_is_refused_in_our_words(tmp_path):
    message = "is not of a run with a TrimCallback .sensibert_run.json is missing or unreadable"
    (tmp_path / "sensibert_run.json").write_text("[]")
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SensibertError, match=message):
            TrimCallback().prepare(tiny_model(), folder)
