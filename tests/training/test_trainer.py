"""The layer over transformers.Trainer, part by part; whole runs are in tests/test_recipe.py."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sensibert.core.errors import SensibertError
from sensibert.data.batching import Collator
from sensibert.models import base_of, layout_of
from sensibert.models.eval_mode import SHORT, quick_attention
from sensibert.optim import MaskedAdamW, unwrapped
from sensibert.training import TrimTrainer, finetune, predict
from sensibert.training.checkpoints import seal
from sensibert.training.distillation import Distillation, distillation_loss
from sensibert.training.trainer import LengthSampler, padded_further
from sensibert.trimming.trim import trim
from tests.helpers import tiny_model
from tests.plans import random_plan


class Rows(Dataset):
    """Random tokens, 3 to 9 a row, and a label each."""

    def __init__(self, count=20, labels=True):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(3, 10, count).tolist()
        self.rows = [{"input_ids": rng.integers(5, 64, n).tolist(), "attention_mask": [1] * n} for n in self.lengths]
        for place, row in enumerate(self.rows):
            row |= {"labels": place % 2} if labels else {}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


def arguments(folder, **changed):
    usual = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "log_level": "error"}
    return TrainingArguments(str(folder), **(usual | quiet | changed))


def test_the_length_sampler_is_a_permutation_told_by_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()

    def order(seed, epoch):
        sampler = LengthSampler(lengths, 8, seed)
        sampler.set_epoch(epoch)
        torch.rand(1)  # nothing else may matter
        return list(sampler)

    assert len(LengthSampler(lengths, 8, 0)) == 500 and sorted(order(0, 0)) == list(range(500))
    assert order(3, 1) == order(3, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    waste = [max(lengths[i] for i in batch) * 8 for batch in np.reshape(order(0, 0)[:496], (-1, 8))]
    assert sum(waste) < 1.15 * sum(lengths)  # padded tokens; about 1.8 in random order


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_predictions_come_in_the_order_of_the_data(head):
    model, data = tiny_model(head=head).train(), Rows(11, labels=False)
    actual = predict(model, data, Collator(0), batch_size=4)
    assert model.training
    parts = actual if isinstance(actual, tuple) else (actual,)
    assert len(parts) == (2 if head == "QuestionAnswering" else 1)
    model.eval()
    for place, row in enumerate(data):
        outputs = model(**{name: torch.tensor([values]) for name, values in row.items()})
        alone = [
            outputs[name][0].detach().numpy() for name in ("logits", "start_logits", "end_logits") if name in outputs
        ]
        for part, one in zip(parts, alone, strict=True):
            if head != "SequenceClassification":
                part = part[:, : len(one)]  # what follows is padding
            np.testing.assert_allclose(part[place], one, rtol=1e-4, atol=1e-5)


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_the_shape_of_the_rate_reaches_the_optimizer(tmp_path):
    rates = Rates()
    trainer = finetune(
        tiny_model(), Rows(), Collator(0), arguments(tmp_path), [rates], lr_shape=lambda step, total: (step + 1) / total
    )
    assert rates.seen == pytest.approx([1e-2 * (step + 1) / 4 for step in range(4)])
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("max_norm", [0.01, 0.0], ids=["clipped", "not clipped"])
def test_its_optimizer_takes_the_steps_of_the_fused_adamw_bit_for_bit(tmp_path, max_norm):
    """Clipping too, although the gradients are scaled in the step and not in a pass of their own."""
    weights, norms = [], []
    for kind in (TrimTrainer, Trainer):
        settings = arguments(tmp_path, optim="adamw_torch_fused", max_grad_norm=max_norm)
        trainer = kind(tiny_model(), settings, Collator(0), Rows().rows)
        trainer.train()
        assert isinstance(unwrapped(trainer.optimizer), MaskedAdamW) == (kind is TrimTrainer)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    assert torch.equal(*weights) and norms[0] == norms[1] and len(norms[0]) == 4


def test_another_optimizer_is_left_to_the_trainer(tmp_path):
    trainer = TrimTrainer(tiny_model(), arguments(tmp_path, optim="sgd"), Collator(0), Rows())
    trainer.train()
    assert isinstance(unwrapped(trainer.optimizer), torch.optim.SGD)


def test_data_with_lengths_is_read_in_batches_of_similar_length(tmp_path):
    sampler = TrimTrainer(tiny_model(), arguments(tmp_path, seed=3), Collator(0), Rows())._get_train_sampler()
    assert isinstance(sampler, LengthSampler) and (sampler.seed, sampler.batch_size) == (3, 4)
    plain = TrimTrainer(tiny_model(), arguments(tmp_path), Collator(0), Rows().rows)._get_train_sampler()
    assert not isinstance(plain, LengthSampler)


def test_a_teacher_is_mixed_into_the_training_loss_once_there_is_one(tmp_path):
    student, teacher, there = tiny_model(seed=0), tiny_model(seed=1), []
    trainer = TrimTrainer(
        *(student, arguments(tmp_path), Collator(0), Rows()),
        teacher=lambda: there[0] if there else None,
        distil=Distillation(0.75, 2.0),
    )
    batch = Collator(0)([Rows()[place] for place in range(4)])
    outputs = student(**batch)
    student.train()
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), outputs.loss)
    there.append(teacher)
    expected = 0.25 * outputs.loss + 0.75 * distillation_loss(outputs, teacher(**batch), 2.0)
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), expected)
    student.eval()
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), outputs.loss)


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.classifier.bias.data[0] = float("nan")

    with pytest.raises(SensibertError, match="the loss is nan at step 3; try a smaller learning rate"):
        finetune(tiny_model(), Rows(), Collator(0), arguments(tmp_path), [Poison()])


class PoisonedGradients(TrainerCallback):
    """Makes one gradient of step 3 infinite, while the loss of the step is finite."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weight = model.get_input_embeddings().weight
        poisoned = lambda grad: grad * float("inf") if state.global_step == 2 else grad  # noqa: E731
        self.hook = weight.register_hook(poisoned)


@pytest.mark.parametrize("changed", [{}, {"max_grad_norm": 0.0}, {"max_steps": 3}])
def test_gradients_that_are_not_finite_stop_at_their_step(tmp_path, changed):
    with pytest.raises(
        SensibertError, match="the norm of the gradients is (nan|inf) at step 3; try a smaller learning"
    ):
        finetune(tiny_model(), Rows(), Collator(0), arguments(tmp_path, **changed), [PoisonedGradients()])


@pytest.mark.parametrize("options", [{"logging_steps": 4}, {"save_strategy": "steps", "save_steps": 3}, {}])
def test_the_loss_is_read_when_something_is_logged_or_saved_and_at_the_end(tmp_path, options):
    class Poison(TrainerCallback):
        last = 0

        def on_step_end(self, args, state, control, model=None, **kwargs):
            Poison.last = state.global_step
            if state.global_step == 1:
                model.classifier.bias.data[0] = float("nan")

    requested = {"max_steps": 5, "logging_steps": 100, "logging_nan_inf_filter": False} | options
    with pytest.raises(SensibertError, match="the loss is nan at step 2; try"):
        finetune(tiny_model(), Rows(), Collator(0), arguments(tmp_path, **requested), [Poison()])
    assert Poison.last == min(options.get("logging_steps", 5), options.get("save_steps", 5))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_finished_checkpoint_takes_no_further_step(tmp_path):
    """5 steps an epoch, so that step 3 ends the run in the midst of one."""
    first = finetune(
        tiny_model(), Rows(), Collator(0), arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    )
    saved = tmp_path / "checkpoint-3"
    seal(saved, first.model, {})
    again = finetune(tiny_model(seed=1), Rows(), Collator(0), arguments(tmp_path, max_steps=3), checkpoint=saved)
    assert again.state.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_a_damaged_checkpoint_is_not_read(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(SensibertError, match="checkpoint-2: not a complete checkpoint"):
        finetune(tiny_model(), Rows(), Collator(0), arguments(tmp_path), checkpoint=tmp_path / "checkpoint-2")


def test_on_a_gpu_batches_are_padded_to_a_multiple():
    collator = Collator(0)
    batch = collator([{"input_ids": [5] * 7, "attention_mask": [1] * 7}])
    actual = {name: padded_further(batch, collator, torch.device(name)) for name in ("cpu", "cuda")}
    assert actual["cpu"] is batch and actual["cuda"]["input_ids"].shape[1] == 8


def test_a_collator_of_somebody_else_is_left_alone(tmp_path):
    model, collator = tiny_model(), Collator(0)
    trim(model, random_plan(layout_of(model)))
    trainer = finetune(model, Rows(), lambda items: collator(items), arguments(tmp_path, bf16=True))
    assert trainer.state.global_step == 4


def test_a_gpu_is_not_asked_for_plans_that_each_new_shape_would_need():
    with quick_attention(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("tokens, bf16, fused", [(SHORT, True, False), (SHORT + 1, True, True), (SHORT, False, True)])
def test_attention_in_a_step_is_fused_but_for_short_rows_in_bf16(tmp_path, tokens, bf16, fused):
    calls, model = [], tiny_model(max_position_embeddings=256)
    base_of(model).register_forward_hook(lambda *_: calls.append(torch.backends.cuda.flash_sdp_enabled()))

    rows = [{"input_ids": [5] * tokens, "attention_mask": [1] * tokens, "labels": 1}] * 4
    finetune(model, rows, Collator(0), arguments(tmp_path, bf16=bf16, max_steps=1))
    assert calls == [fused] and torch.backends.cuda.flash_sdp_enabled()
