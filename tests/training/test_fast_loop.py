"""The loop on packed batches: the same weights as the loop on padded ones, with far less beside the passes."""

import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import ParallelMode

from sensibert.callback import TrimCallback
from sensibert.core.config import TrimConfig
from sensibert.core.errors import SensibertError
from sensibert.data.batching import Collator
from sensibert.models import layout_of
from sensibert.nn.packed_attention import Packing
from sensibert.optim import MaskedAdamW, unwrapped
from sensibert.training import finetune
from sensibert.training.distillation import Distillation
from sensibert.training.fast_loop import FastTrainer, ShuffledSampler
from sensibert.training.finetune import why_not_packed
from sensibert.training.lean_step import LeanStep
from sensibert.training.manifest import MEMORY, write_manifest
from sensibert.training.op_count import OpCount
from sensibert.training.trainer import TrimTrainer
from sensibert.trimming.trim import trim
from tests.data.test_packing import features
from tests.helpers import tiny_model
from tests.plans import random_plan

MINILM = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 96}


def rows(count=40, kind="classes", seed=0):
    lengths = np.random.default_rng(seed).integers(3, 10, count)
    if kind == "classes":
        return features(lengths, labels=np.arange(count) % 2)
    if kind == "labels":
        return features(lengths, labels=np.random.default_rng(1).integers(0, 2, (count, 2)).astype(np.float64))
    if kind == "answers":
        return features(lengths, start_positions=np.arange(count) % 3, end_positions=np.arange(count) % 3)
    data = features(lengths)
    data.per_token["labels"] = np.random.default_rng(1).integers(0, 2, lengths.sum())
    return data


def arguments(folder, **changed):
    usual = {"output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-3}
    usual |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "optim": "adamw_torch"}
    return TrainingArguments(**(usual | {"remove_unused_columns": False, "logging_steps": 3} | changed))


def train(folder, model, data, packing, callbacks=(), checkpoint=None, **changed):
    options = {name: changed.pop(name) for name in ("teacher", "distil") if name in changed}
    return finetune(
        model, data, Collator(0), arguments(folder, **changed), callbacks, checkpoint, packing=packing, **options
    )


@pytest.fixture
def same_order(monkeypatch):
    """Padded batches in the order of packed ones."""
    monkeypatch.setattr(
        TrimTrainer, "_get_train_sampler", lambda self, data=None: ShuffledSampler(len(self.train_dataset), 42)
    )


def assert_same_weights(one, other, tolerance=1e-9) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=tolerance, rtol=0), name


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("changed", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 0.0}], ids=str)
@pytest.mark.parametrize(
    "kind, head",
    [("classes", "SequenceClassification"), ("labels", "SequenceClassification"), ("tokens", "TokenClassification")],
)
def test_weights_logs_and_state_are_those_of_padded_batches(tmp_path, same_order, kind, head, changed):
    trainers = []
    for packing in ("off", "on"):
        model = tiny_model(head=head).double()
        trainers.append(train(tmp_path / packing, model, rows(42, kind), packing, **changed))
    padded, packed = trainers
    assert isinstance(packed, FastTrainer) and not isinstance(padded, FastTrainer)
    if kind != "tokens" or not changed.get("gradient_accumulation_steps"):  # Trainer weighs batches, not tokens
        assert_same_weights(padded.model, packed.model)
        assert losses(padded) == pytest.approx(losses(packed))
    for name in ("global_step", "epoch", "num_input_tokens_seen", "max_steps"):
        assert getattr(padded.state, name) == getattr(packed.state, name), name
    logged = [[entry.keys() for entry in trainer.state.log_history] for trainer in trainers]
    assert logged[0] == logged[1]


def trimming():
    return TrimCallback(TrimConfig("50%params", samples=16, width_multiple=4))


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_weights_are_the_same_through_a_cut_and_with_a_teacher(tmp_path, same_order, kind):
    models, teacher = [tiny_model().double() for _ in range(2)], tiny_model(seed=5).double()
    for packing, model in zip(("off", "on"), models, strict=True):
        train(tmp_path / packing, model, rows(kind=kind), packing, [trimming()], teacher=lambda: teacher)
        assert model.config.problem_type == f"{'multi' if kind == 'labels' else 'single'}_label_classification"
    assert layout_of(models[0]).encoder_params < layout_of(tiny_model()).encoder_params
    assert_same_weights(*models, tolerance=1e-7)


def test_a_teacher_is_the_same_for_packed_batches(tmp_path, same_order):
    models, teacher = (
        [tiny_model(head="QuestionAnswering").double() for _ in range(2)],
        tiny_model(seed=5, head="QuestionAnswering").double(),
    )
    distil = Distillation(1.0, 2.0)
    for packing, model in zip(("off", "on"), models, strict=True):
        data = rows(32, "answers")
        data.ends = np.arange(33) * 6  # rows of one length: a padded softmax has padding in it
        for name, values in data.per_token.items():
            data.per_token[name] = np.resize(values, 32 * 6)
        train(tmp_path / packing, model, data, packing, teacher=lambda: teacher, distil=distil)
    assert_same_weights(*models)


def test_a_resumed_run_ends_in_the_same_weights_in_both_loops(tmp_path, same_order):
    whole = tiny_model().double()
    train(tmp_path / "whole", whole, rows(), "on", [trimming()], save_strategy="steps", save_steps=3)
    for packing in ("on", "off"):
        for step in (3, 6):  # before and after the cut
            model = tiny_model(seed=3).double()
            train(tmp_path / packing, model, rows(), packing, [trimming()], tmp_path / "whole" / f"checkpoint-{step}")
            assert_same_weights(model, whole, tolerance=1e-7)


def test_a_resumed_run_goes_on_with_the_batches_that_it_began_with(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    for packing in ("off", "on"):
        train(tmp_path / packing, tiny_model(), rows(), packing, [trimming()], **saved)
        for step, begun, name in ((2, packing, "second"), (4, "second", "third")):
            checkpoint = tmp_path / begun / f"checkpoint-{step}"
            trainer = train(tmp_path / name, tiny_model(), rows(), "auto", [trimming()], checkpoint, **saved)
            assert isinstance(trainer, FastTrainer) == (packing == "on")


def test_a_run_of_an_earlier_version_goes_on_with_padded_batches_if_it_had_several_processes(tmp_path):
    train(tmp_path / "run", tiny_model(), rows(), "on", [trimming()], save_strategy="steps", save_steps=2, max_steps=4)
    folder = tmp_path / "run/checkpoint-2"
    memory = json.loads((folder / MEMORY).read_text())
    assert memory.pop("packed") is True
    (folder / MEMORY).write_text(json.dumps(memory))
    for several in (False, True):
        if several:
            (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
            shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
        write_manifest(folder)
        trainer = train(tmp_path / "on", tiny_model(), rows(), "auto", [trimming()], folder, max_steps=4)
        assert isinstance(trainer, FastTrainer) == (not several)


def test_a_run_with_dropout_resumes_bit_for_bit_before_and_after_the_cut(tmp_path):
    def model(seed):
        return tiny_model(seed=seed, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)

    whole = model(0)
    torch.manual_seed(0)
    train(tmp_path / "whole", whole, rows(), "on", [trimming()], save_strategy="steps", save_steps=2)
    for step in (2, 4, 6):
        other = model(7)
        train(tmp_path / "other", other, rows(), "on", [trimming()], tmp_path / "whole" / f"checkpoint-{step}")
        assert_same_weights(other, whole, tolerance=0)


def test_every_row_comes_once_an_epoch_in_an_order_told_by_seed_and_epoch():
    sampler = ShuffledSampler(50, 3)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first != list(ShuffledSampler(50, 4))


def test_working_copies_follow_the_weights_and_are_seen_in_passes_only(tmp_path):
    model, seen = tiny_model(**MINILM), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            seen.append({p.dtype for p in model.parameters()})
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
            copies = [(p, unwrapped(optimizer).working_copy(p)) for p in model.parameters()]
            for p, copy in ((p, copy) for p, copy in copies if copy is not None):
                assert torch.equal(copy, p.to(torch.bfloat16))
            assert sum(copy is not None for _, copy in copies) == 6 * 16  # all weights of all layers

    train(tmp_path, model, rows(), "on", [Look()], bf16=True)
    assert seen == [{torch.float32}] * 10
    assert "forward" not in vars(model.bert.encoder.layer[0].attention.self.query)


def test_in_bf16_the_loss_falls_as_with_autocast(tmp_path, same_order):
    trainers = []
    for packing in ("off", "on"):
        model, data = tiny_model(**MINILM | {"num_hidden_layers": 2}), rows(64)
        data.per_token["input_ids"][data.ends[:-1]] = 5 + data.per_item["labels"]  # the first token tells
        trainers.append(train(tmp_path / packing, model, data, packing, bf16=True, num_train_epochs=10))
    padded, packed = map(losses, trainers)
    assert packed[-1] < 0.3 * packed[0] and packed[-1] == pytest.approx(padded[-1], abs=0.05)


@pytest.mark.parametrize("change", ["dropout", "frozen"])
def test_what_a_callback_changes_in_the_model_counts_from_the_next_step(tmp_path, change):
    model = tiny_model(hidden_dropout_prob=0.5)
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    made = []

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                for module in model.modules():
                    if change == "dropout" and isinstance(module, torch.nn.Dropout):
                        module.p = 0.0
                if change == "frozen":
                    model.bert.requires_grad_(False)
            if state.global_step > 2:
                made.append(model.bert.encoder.layer[0].output.dense.weight.detach().clone())

    train(tmp_path, model, rows(), "on", [Change()], bf16=True)
    frozen = all(torch.equal(weight, made[0]) for weight in made)
    assert frozen == (change == "frozen") and not torch.equal(made[0], before)


class Ops(OpCount):
    """Also counts casts and scalar reads, and keeps the shapes of matrix products."""

    def __init__(self):
        super().__init__()
        self.casts = self.reads = 0
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, out = function._schema.name.partition("::")[2], super().__torch_dispatch__(function, types, args, kwargs)
        self.reads += name == "_local_scalar_dense"
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            self.casts += out.dtype != (args[1] if name == "copy_" else args[0]).dtype
        if name in ("mm", "addmm"):
            self.shapes.add(tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor)))
        return out


def lean(model, bf16=True) -> LeanStep:
    return LeanStep(model.train(), "first", MaskedAdamW(model.parameters(), lr=1e-3), bf16)


def step(lean, lengths=(9, 7, 5, 3), total=24) -> Ops:
    batch = {"input_ids": torch.arange(total)[None] + 6, "labels": torch.tensor([0, 1, 1, 0])}
    places = torch.cat([torch.arange(n) for n in (*lengths, total - sum(lengths))])[None]
    packing = Packing.of(list(lengths), total)
    with Ops() as ops:
        lean.passes({**batch, "position_ids": places}, packing, lambda outputs: outputs["loss"])
        norm = lean.total_norm()
        reads = ops.reads
    lean.optimizer.clip_grad_norm(1.0, norm)  # on a CPU it reads whether there is anything to clip
    with ops:
        lean.optimizer.step()
        lean.zero_grad()
    assert reads == 0
    return ops


def test_a_step_casts_little_and_reads_nothing():
    model = tiny_model(**MINILM, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    work = lean(model)
    step(work)
    assert step(work).casts <= 20


def test_a_cut_changes_the_number_of_ops_by_few():
    model = tiny_model(**MINILM)
    work = lean(model)
    step(work)
    before = step(work)
    work.end()
    trim(model, random_plan(layout_of(model)))
    work = lean(model)
    step(work)
    after = step(work)
    assert abs(before.total - after.total) <= 3
    assert len(after.shapes) > len(before.shapes)


def test_a_run_has_few_matrix_shapes(tmp_path):
    model, data = tiny_model(**MINILM), rows(200)
    with Ops() as ops:
        train(tmp_path, model, data, "on", [trimming()], bf16=True)
    totals = len(Collator(0).packer(data, 8).totals)
    assert len(ops.shapes) <= totals * (3 * 5 + 3 * 6 * 5) + 100  # and those of the analysis and the head


def test_buffers_keep_their_addresses_within_a_phase():
    model = tiny_model(**MINILM)
    work = lean(model)

    def addresses():
        return [copy.leaf.data_ptr() for copy in work._copies] + [copy.grad.data_ptr() for copy in work._copies]

    before = addresses()
    for _ in range(3):
        step(work)
        assert addresses() == before and work.fits()


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_gradients_of_tables_are_complete(padding_idx):
    model = tiny_model(pad_token_id=padding_idx)
    work = lean(model, bf16=False)
    for number in range(2):
        batch = {"input_ids": torch.tensor([[5, 4, 5, 9, 4 + number]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        batch["labels"] = torch.tensor([0, 1])
        packing = Packing.of([3, 2], 5)
        work.passes(batch, packing, lambda outputs: outputs["loss"])
        ours, norm = {name: p.grad.clone() for name, p in model.named_parameters()}, work.total_norm()
        work.zero_grad()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        loss = work.packed(batch, packing)["loss"]
        theirs = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for (name, p), grad in zip(model.named_parameters(), theirs, strict=True):
            assert torch.allclose(ours[name], torch.zeros_like(p) if grad is None else grad, atol=1e-6), name
        assert norm == pytest.approx(float(torch.nn.utils.get_total_norm([g for g in theirs if g is not None])))


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    model = tiny_model()

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                torch.nn.init.constant_(model.classifier.weight, torch.nan)

    with pytest.raises(SensibertError, match="the loss is nan at step 4"):
        train(tmp_path, model, rows(), "on", [Break()])


def test_gradients_that_are_not_finite_are_named_with_their_step(tmp_path):
    class Poison(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            weight = model.bert.encoder.layer[0].output.dense.weight
            weight.register_hook(lambda grad: grad * torch.inf if state.global_step == 3 else grad)

    with pytest.raises(SensibertError, match="the norm of the gradients is (nan|inf) at step 4"):
        train(tmp_path, tiny_model(), rows(), "on", [Poison()])


def test_a_family_that_cannot_pack_pads_and_says_so_once(tmp_path, caplog):
    model = tiny_model("mpnet")
    with caplog.at_level(logging.WARNING, "sensibert"):
        trainer = train(tmp_path, model, rows(), "auto")
    assert not isinstance(trainer, FastTrainer)
    assert [r.message for r in caplog.records if "packing" in r.message] == [
        "packing: MPNetForSequenceClassification cannot run on packed rows (its logits of packed rows are not those of "
        "padded ones), want packing 'off': batches are padded"
    ]
    with pytest.raises(SensibertError, match="MPNetForSequenceClassification cannot run on packed rows"):
        train(tmp_path, tiny_model("mpnet"), rows(), "on")


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"optim": "adafactor"}, "optim is adafactor"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    ],
)
def test_arguments_that_the_loop_does_not_read_leave_it_to_the_trainer(tmp_path, caplog, changed, reason):
    assert not isinstance(train(tmp_path, tiny_model(), rows(), "auto", **changed), FastTrainer)
    assert not caplog.records
    with pytest.raises(SensibertError, match=f"packing is 'on', but .*{reason}"):
        train(tmp_path, tiny_model(), rows(), "on", **changed)


def test_data_of_somebody_else_is_padded(tmp_path):
    data = [{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": i % 2} for i in range(8)]
    assert not isinstance(train(tmp_path, tiny_model(), data, "auto"), FastTrainer)
    with pytest.raises(SensibertError, match="packing is 'on', but the data are not those of a TaskData"):
        train(tmp_path, tiny_model(), data, "on")
    with pytest.raises(SensibertError, match="packing is 'yes', want one of auto, on, off"):
        train(tmp_path, tiny_model(), data, "yes")


def test_a_gpu_without_enough_memory_is_named_with_what_to_try(tmp_path, monkeypatch):
    def passes(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LeanStep, "passes", passes)
    message = "out of memory in step 1 with batches of 8 rows; try --batch-size 4 --gradient-accumulation 4"
    with pytest.raises(SensibertError, match=message):
        train(tmp_path, tiny_model(), rows(), "on", gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"device": torch.device("cuda")}, "the precision is fp32 on a GPU"),
        ({"device": torch.device("cuda"), "bf16": True}, None),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type is greedy"),
        ({"n_gpu": 2}, "n_gpu is 2"),
        ({"world_size": 2}, None),
        ({"accelerator_config": AcceleratorConfig(even_batches=False)}, None),
        ({"accelerator_config": AcceleratorConfig(even_batches=False), "world_size": 2}, "even_batches of accelerator"),
        ({"fsdp": "full_shard", "world_size": 2}, "training uses fsdp"),
        ({"parallel_mode": ParallelMode.TPU, "world_size": 2}, "parallel_mode is tpu"),
    ],
)
def test_packing_needs_bf16_on_a_gpu_of_its_own_and_a_schedule_that_steps_with_the_optimizer(tmp_path, changed, reason):
    usual = {**vars(arguments(tmp_path)), "n_gpu": 1, "world_size": 1, "device": torch.device("cpu")}
    usual |= {"parallel_mode": ParallelMode.DISTRIBUTED}
    found = why_not_packed(SimpleNamespace(**(usual | changed)))
    assert found == reason if reason is None else found.startswith(reason)


def test_a_tied_table_has_its_whole_gradient():
    """The word table is also a layer of the head, which has gradients in rows that the batch does not read."""
    model = tiny_model(head="MaskedLM")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    work = LeanStep(model.train(), None, MaskedAdamW(model.parameters(), lr=1e-3), False)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0]])}
    batch["labels"] = torch.tensor([[9, 10, 11, 12]])
    for _ in range(2):
        work.passes(batch, Packing.of([3, 1], 4), lambda outputs: outputs["loss"])
        ours, norm = model.bert.embeddings.word_embeddings.weight.grad.clone(), work.total_norm()
        work.zero_grad()
    loss = work.packed(batch, Packing.of([3, 1], 4))["loss"]
    grads = dict(zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    assert torch.allclose(ours, grads[model.bert.embeddings.word_embeddings.weight], atol=1e-6)
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(grads.values())))
