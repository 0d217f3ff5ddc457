"""One TrimCallback in several Trainers and trainings, in any order: each training measures its own model."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from sensibert import Schedule, SensibertError, TrimCallback, TrimTrainer, layout_of, load
from sensibert.core.config import TrimConfig
from tests.helpers import tiny_model
from tests.test_plain_trainer import arguments, rows

CUBIC = {"shape": "cubic", "milestones": 3, "trim_duration": 0.4}  # of 12 steps after 4, 6 and 9
WHOLE = {size: layout_of(tiny_model(intermediate_size=size)).encoder_params for size in (64, 256)}
SAVE = {"save_strategy": "steps", "save_steps": 5}


def a_callback(**settings) -> TrimCallback:
    return TrimCallback(TrimConfig(method="magnitude", width_multiple=4, **settings))


def a_trainer(folder, callback, size=64, kind=Trainer, model=None, **more) -> Trainer:
    model = model or tiny_model(intermediate_size=size)
    return kind(model, arguments(folder, **more), train_dataset=rows(), callbacks=[callback])


def size_of(trainer) -> int:
    return layout_of(trainer.model).encoder_params


def is_half(trainer, size) -> bool:
    return 0.45 * WHOLE[size] < size_of(trainer) <= 0.5 * WHOLE[size]


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 1, 0)])
@pytest.mark.parametrize("made_first", [True, False])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(**CUBIC)], ids=["oneshot", "cubic"])
def test_every_order_of_trainings_halves_each_model_once(tmp_path, order, made_first, schedule):
    callback, trainers = a_callback(schedule=schedule), {}
    if made_first:
        trainers = {number: a_trainer(tmp_path, callback, (64, 256)[number]) for number in (0, 1)}
    for number in order:
        if number not in trainers:
            trainers[number] = a_trainer(tmp_path, callback, (64, 256)[number])
        trainers[number].train()
        assert is_half(trainers[number], (64, 256)[number]) and callback.warnings == []
        assert callback.whole_plan(trainers[number].model).params == size_of(trainers[number])


def test_a_second_trainer_of_the_same_model_trims_no_further_and_another_callback_does(tmp_path):
    callback, first = a_callback(), None
    for _ in range(3):
        first = a_trainer(tmp_path, callback, model=first and first.model)
        first.train()
        assert is_half(first, 64)
    left = size_of(first)
    other = a_trainer(tmp_path, a_callback(), model=first.model)
    other.train()
    assert size_of(other) <= 0.5 * left


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(**CUBIC)], ids=["oneshot", "cubic"])
@pytest.mark.parametrize("from_init", [False, True])
def test_interleaved_trainings_resume_with_their_own_models(tmp_path, schedule, from_init):
    callback, sizes, first = a_callback(schedule=schedule), (64, 256), []
    folders = [tmp_path / "a", tmp_path / "b"]

    def trainer(number):
        if not from_init:
            return a_trainer(folders[number], callback, sizes[number], TrimTrainer, **SAVE)
        return TrimTrainer(
            args=arguments(folders[number], **SAVE),
            train_dataset=rows(),
            callbacks=[callback],
            model_init=lambda: tiny_model(intermediate_size=sizes[number]),
        )

    for number in (0, 1):
        made = trainer(number)
        made.train()
        first.append(made.model.state_dict())
    resumed = [trainer(number) for number in (0, 1)]
    for number in (0, 1):
        resumed[number].train(resume_from_checkpoint=str(folders[number] / "checkpoint-5"))
        assert is_half(resumed[number], sizes[number]) and callback.warnings == []
        weights = resumed[number].model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in first[number].items())


def test_a_model_made_for_each_training_is_halved_each_time(tmp_path):
    callback = a_callback()
    trainer = Trainer(
        args=arguments(tmp_path), train_dataset=rows(), callbacks=[callback], model_init=lambda: tiny_model()
    )
    for _ in range(3):
        trainer.train()
        assert is_half(trainer, 64)


def test_the_trials_of_a_hyperparameter_search_save_in_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # as with optuna
    trainer = Trainer(
        args=arguments(tmp_path, **SAVE),
        train_dataset=rows(),
        callbacks=[a_callback()],
        model_init=lambda: tiny_model(),
    )
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, rate in enumerate((1e-3, 3e-3)):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
        assert is_half(trainer, 64)
        for step in (5, 10):
            assert (tmp_path / f"run-{number}" / f"checkpoint-{step}" / "sensibert_manifest.json").exists()


@pytest.mark.parametrize("twice", [True, False])
def test_two_callbacks_in_one_trainer_are_refused(tmp_path, twice):
    callback = a_callback()
    trainer = a_trainer(tmp_path, callback)
    trainer.add_callback(callback if twice else a_callback())
    with pytest.raises(SensibertError, match="TrimCallback: the Trainer has two, want one"):
        trainer.train()
    assert trainer.state.global_step == 0


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("new_trainer", [True, False])
def test_a_training_after_an_interrupted_one_begins_with_dropout_and_all_weights(tmp_path, new_trainer):
    callback = TrimCallback(TrimConfig("40%params", method="magnitude", width_multiple=4))
    model = tiny_model(hidden_dropout_prob=0.25)
    trainer, seen = a_trainer(tmp_path, callback, model=model), []
    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    table, dropout = model.bert.embeddings.word_embeddings.weight, model.bert.embeddings.dropout
    assert not table.requires_grad and dropout.p == 0  # as the recovery wants it
    if new_trainer:
        trainer = a_trainer(tmp_path, callback, model=model)
    trainer.remove_callback(Break)

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            seen.append((table.requires_grad, dropout.p, id(table) in held))

    trainer.add_callback(Look())
    trainer.train()
    assert seen[0] == (True, 0.25, True) and (table.requires_grad, dropout.p) == (True, 0.25)


def test_a_checkpoint_of_the_untrimmed_model_does_not_go_into_a_trimmed_one(tmp_path):
    callback = a_callback(schedule=Schedule(**CUBIC))
    trainer = a_trainer(tmp_path, callback, kind=TrimTrainer, save_steps=3, save_strategy="steps")
    trainer.train()
    with pytest.raises(SensibertError, match="checkpoint-3 is of an untrimmed model, and this one is trimmed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(SensibertError, match="does not fit this bert model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_trimmed_checkpoint_loaded_as_the_model_cannot_say_how_large_it_was(tmp_path):
    trainer = a_trainer(tmp_path, a_callback(), kind=TrimTrainer, **SAVE)
    trainer.train()
    again = a_trainer(tmp_path, a_callback(), kind=TrimTrainer, model=load(tmp_path / "checkpoint-5")[0], **SAVE)
    with pytest.raises(SensibertError, match="trimmed before the callback saw it.*the model that the run began with"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
