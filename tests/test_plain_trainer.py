"""A plain transformers.Trainer with a TrimCallback: what it saves loads again, and the best checkpoint is found."""

import logging
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from sensibert import TrimCallback, TrimConfig
from sensibert.models import layout_of
from tests import fresh
from tests.helpers import tiny_batch, tiny_model


def rows(count: int = 48, seed: int = 0) -> list[dict]:
    """The label is whether the second token is a high one."""
    batch = tiny_batch(count, seed=seed)
    labels = (batch["input_ids"][:, 1] > 32).long()
    return [{name: value[i] for name, value in (batch | {"labels": labels}).items()} for i in range(count)]


def arguments(folder, **changes) -> TrainingArguments:
    usual = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "use_cpu": True}
    usual |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **(usual | changes))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**tiny_batch()).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The five lines of the README, with a checkpoint every three steps: (folder, model)."""
    here = tmp_path_factory.mktemp("plain")
    model, args, data = tiny_model(), arguments(here / "run", save_strategy="steps", save_steps=3), rows()
    trainer = Trainer(model, args, train_dataset=data, callbacks=[TrimCallback("50%params")])
    trainer.train()
    trainer.save_model(str(here / "small"))
    return here, model


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_what_it_saves_reloads_bit_for_bit_in_a_fresh_process(trained, trust_remote_code, tmp_path):
    here, model = trained
    assert layout_of(model).encoder_params <= 0.5 * layout_of(tiny_model()).encoder_params
    auto, folders = "AutoModelForSequenceClassification", {"small": here / "small", "last": here / "run/checkpoint-12"}
    given = {name: (auto, folder, tiny_batch()) for name, folder in folders.items()}
    actual = fresh.outputs_of(given, trust_remote_code, tmp_path)
    assert actual.keys() == folders.keys() and all(torch.equal(value, logits(model)) for value in actual.values())


def test_checkpoints_from_before_the_cut_are_stock_models_and_later_ones_trimmed(trained):
    here, model = trained
    before, after = (AutoModelForSequenceClassification.from_pretrained(here / f"run/checkpoint-{n}") for n in (3, 6))
    assert type(before) is type(tiny_model()) and layout_of(before).sites == layout_of(tiny_model()).sites
    assert type(after) is type(model) and layout_of(after).sites == layout_of(model).sites


def test_training_continues_from_the_folder_and_the_model_can_be_trimmed_again(trained, tmp_path):
    here, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(here / "small")
    first, before = layout_of(model), logits(model)
    Trainer(model, arguments(tmp_path / "on"), train_dataset=rows()).train()
    assert not torch.equal(logits(model), before) and layout_of(model).sites == first.sites
    trainer = Trainer(model, arguments(tmp_path / "again"), train_dataset=rows(), callbacks=[TrimCallback("70%params")])
    trainer.train()
    trainer.save_model(str(tmp_path / "smaller"))
    assert layout_of(model).encoder_params <= 0.7 * first.encoder_params
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "smaller")
    assert torch.equal(logits(again), logits(model)) and layout_of(again) == layout_of(model)


@pytest.mark.parametrize("grid", ["unit", "block8"])
def test_one_line_about_the_cut_is_visible_without_configured_logging(tmp_path, capsys, monkeypatch, grid):
    args = arguments(tmp_path, logging_steps=2, max_steps=6)
    callback = TrimCallback(TrimConfig(grid=grid, method="magnitude", compensate=False))
    trainer = Trainer(tiny_model(), args, train_dataset=rows(), callbacks=[callback])
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # those of pytest; by default none
        trainer.train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cut at" in line]
    left = r"8 -> \d heads, FFN 128 -> \d+ neurons" if grid == "unit" else r"\d+ of 256 blocks left"
    assert re.fullmatch(rf"\[sensibert\] cut at step 2 of 6: encoder 17\.1K -> \d\.\dK parameters, {left}", line), line


def test_progress_is_told_step_by_step_and_micro_batch_by_micro_batch(tmp_path):
    told = []
    callback = TrimCallback(TrimConfig(samples=16), progress=lambda *now: told.append(now))
    Trainer(tiny_model(), arguments(tmp_path, max_steps=6), train_dataset=rows(), callbacks=[callback]).train()
    warm = [("warm", step, 2) for step in range(3)]
    analysis = [("analyze", 0, None), *(("analyze", read, 2) for read in range(3))]
    assert told == [*warm, *analysis, ("cut", 0, None), *(("recover", step, 6) for step in range(2, 7))]


@pytest.mark.parametrize("scores, best", [((9, 8, 1, 3, 2, 2), 4), ((9, 1, 2, 3, 2, 2), 8), ((9, 1, 5, 2, 3, 8), 12)])
def test_the_best_model_is_the_best_from_after_the_cut(scores, best, tmp_path):
    """The cut is after step 4. The score of step 2 is higher, but its checkpoint would not fit."""
    model = tiny_model()
    args = arguments(
        tmp_path / "run",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        save_total_limit=2,
    )
    given = iter(scores)  # at steps 2, 4, ... 12
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda _: {"score": next(given)},
        callbacks=[TrimCallback("50%params")],
    )
    trainer.train()
    assert layout_of(model).encoder_params < layout_of(tiny_model()).encoder_params
    expected = tmp_path / f"run/checkpoint-{best}"
    assert trainer.state.best_model_checkpoint == str(expected) and trainer.state.best_metric == max(scores[1:])
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(expected)), logits(model))
    trainer.save_model(str(tmp_path / "small"))
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")), logits(model))
