"""The loop of `finetune`: packed batches and lean steps between the same events as in transformers.Trainer.

Logging, evaluation, checkpoints, callbacks and the schedule are Trainer's. Either loop resumes the other's checkpoints,
then with its own order of the rows. A step is the same number of rows. Nothing is read from the device but at the steps
that log or save.

Several processes share the rows of every batch. Gradients and loss are those of the whole batch in each of them: the
loss of a share counts by its fraction of the terms, and `GradientSum` adds up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import partial
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..models.packed import PackedModel, pooling_of
from ..nn.packed_attention import Packing
from ..optim import MaskedAdamW, unwrapped
from .gradient_sum import GradientSum
from .lean_step import LeanStep
from .op_count import OpCount
from .processes import Processes
from .run_memory import PACKED
from .step_graphs import StepGraphs, cuda_capture
from .trainer import LABELS, TrimTrainer


class Pack(Protocol):
    """Numbers of rows -> (batch, lengths of its rows)."""

    longest: int  # row of the data

    def tokens(self, rows: list[int], /) -> tuple[int, int]: ...  # without and with padding
    def shares(self, rows: list[int], count: int, /) -> list[tuple[list[int], float]]: ...  # rows, fraction of the loss
    def __call__(self, rows: list[int], /) -> tuple[dict[str, Tensor], list[int]]: ...


class ShuffledSampler(Sampler[int]):
    """A random order of the rows, which depends on seed and epoch alone."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())


class FastTrainer(TrimTrainer):
    """TrimTrainer on packed batches.

    pooling: of the model's `PackedModel`. graphs: whether steps run as CUDA graphs on a GPU."""

    def __init__(self, pooling: str | None, pack: Pack, graphs: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.pooling, self.pack, self.graphs = pooling, pack, graphs
        # Of a step of every phase: its ops, and on a GPU its largest memory.
        self.ops_per_step: list[int] = []
        self.peak_memory_gb: list[float] = []
        self._lean: LeanStep | None = None
        self._graphs: StepGraphs | None = None
        self.padded_tokens = 0  # of all batches, with their padding
        self._processes = Processes.of(self.args)
        self._sum: GradientSum | None = None  # in several processes
        self._counted = False
        self._parameters = 0  # that take part in a pass
        self._packed_teacher: PackedModel | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> ShuffledSampler:
        rows = cast(Sized, self.train_dataset)  # the data of a TaskData
        return ShuffledSampler(len(rows), self.args.data_seed or self.args.seed)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_phase()
            if self._processes.count > 1:
                vars(self.model).pop("_is_accelerate_prepared", None)  # another Trainer may have to wrap it

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None  # a Trainer has one
        # evaluation_mode: without DistributedDataParallel, whose work is done here
        vars(self.accelerator)["prepare_model"] = partial(self.accelerator.prepare_model, evaluation_mode=True)
        try:
            prepared = super()._prepare_for_training(*args, **kwargs)
        finally:
            del vars(self.accelerator)["prepare_model"]
        self._processes.copy_from_first(self.model.parameters())
        setattr(self.state, PACKED, True)
        return prepared

    def _run_epoch(self, **run: Any) -> None:  # type: ignore[override]  # Trainer passes everything by name
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # a callback may stop it before the first step
            return
        args, epoch, checkpoint = self.args, run["epoch"], run["resume_from_checkpoint"]
        in_epoch = run["steps_in_epoch"]  # batches
        resumed = epoch == run["epochs_trained"] and checkpoint is not None
        done = run["steps_trained_in_current_epoch"] if resumed else 0  # batches
        batches = self._batches(epoch, done)
        if resumed:
            self._load_rng_state(checkpoint)
        norm: Tensor | None = None
        rate: Any = None
        assert self.lr_scheduler is not None  # a training has begun

        def tell() -> None:
            told = self.control.should_log and rate is not None
            self._maybe_log_save_evaluate(
                self._tr_loss, norm, run["model"], run["trial"], epoch, run["ignore_keys_for_eval"], run["start_time"],
                learning_rate=float(rate) if told else None,
            )  # fmt: skip

        while done < in_epoch and not (self.control.should_epoch_stop or self.control.should_training_stop):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            rate = self.lr_scheduler.get_last_lr()[0]
            some = list(islice(batches, args.gradient_accumulation_steps))
            with self._counting():
                norm = self._optimizer_step(some)
            self.lr_scheduler.step()
            done += len(some)
            self.state.global_step += 1
            self.state.epoch = epoch + done / in_epoch
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            tell()
        self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
        tell()

    def _batches(self, epoch: int, skip: int) -> Iterator[list[int]]:
        """The rows of each batch of an epoch, of all processes together."""
        sampler, size = self._get_train_sampler(), self.args.train_batch_size * self._processes.count
        sampler.set_epoch(epoch)
        order = list(sampler)
        return (order[i : i + size] for i in range(skip * size, len(order), size))

    def _optimizer_step(self, batches: list[list[int]]) -> Tensor:
        """Returns the norm of the gradients."""
        lean, packed = self._phase(), [part for rows in batches for part in self._share(rows, 1 / len(batches))]
        if self._graphs is not None and len(packed) == 1 and not lean.optimizer.tracks:
            loss, norm = self._graphs(*packed[0][:2])
        else:
            loss, norm = self._eager_step(*packed)
        self._note(self._losses, loss)
        self._note(self._norms, norm)
        self._tr_loss += loss
        lean.zero_grad()
        return norm

    def _eager_step(self, *batches: tuple[dict[str, Tensor], Packing, float]) -> tuple[Tensor, Tensor]:
        """Loss and norm of the gradients. batches: with the weight of the loss of each. In one process, nothing here
        reads from the device, so it can be captured."""
        assert self.optimizer is not None and self._lean is not None  # `_phase` has made it
        lean, losses = self._lean, []
        for batch, packing, weight in batches:
            losses.append(lean.passes(batch, packing, partial(self._loss, batch, packing, weight)))
        loss = torch.stack(losses or [torch.zeros((), device=self.args.device)]).sum()
        if self._sum is not None:
            loss = self._sum(loss)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        norm = lean.total_norm()
        if self.args.max_grad_norm > 0:
            lean.optimizer.clip_grad_norm(self.args.max_grad_norm, norm)
        self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        return loss, norm

    def _phase(self) -> LeanStep:
        """The passes of the model as it is now."""
        assert self.model is not None and self.optimizer is not None  # a training has begun
        if not self.model.training:  # after an evaluation
            self.model.train()
        if self._lean is None or not self._lean.fits():
            self._end_phase()
            optimizer = unwrapped(self.optimizer)
            assert isinstance(optimizer, MaskedAdamW)  # `finetune` sees to it
            alone = self._processes.count == 1
            self._lean = LeanStep(self.model, self.pooling, optimizer, self.args.bf16, by_row=alone)
            self._sum = None if alone else GradientSum(self.model.parameters(), self._processes)
            count = getattr(self.model, "num_parameters", None)  # a module around a model may have none
            self._parameters = 0 if count is None else count(exclude_embeddings=True)
            if self._captures():
                self._set_rates(lambda rate: torch.as_tensor(rate, dtype=torch.float32, device=self.args.device))
                self._graphs = StepGraphs(self._capturable_step, cuda_capture())
        return self._lean

    def _capturable_step(self, batch: dict[str, Tensor], packing: Packing) -> tuple[Tensor, Tensor]:
        assert self._lean is not None
        self._lean.zero_grad()  # gradients belong to the graph
        return self._eager_step((batch, packing, 1.0))

    def _captures(self) -> bool:
        """Whether steps may become CUDA graphs, which do not stop between the passes and the optimizer."""
        watched = any(
            getattr(type(callback), event) is not getattr(TrainerCallback, event)
            for callback in self.callback_handler.callbacks
            for event in ("on_pre_optimizer_step", "on_optimizer_step")
        )
        alone = self._processes.count == 1  # the sum of several processes is not captured
        return self.graphs and self.args.device.type == "cuda" and alone and not watched

    def _set_rates(self, convert: Callable[[Any], Any]) -> None:
        for group in unwrapped(self.optimizer).param_groups if self.optimizer is not None else ():
            group["lr"] = convert(group["lr"])

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Measures the second step of a phase. The first one prepares more."""
        if self._lean is None or self._counted:
            yield
            return
        on_gpu = self.args.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with OpCount() as ops:
            yield
        self._counted = True
        self.ops_per_step.append(ops.total)
        if on_gpu:
            self.peak_memory_gb.append(round(torch.cuda.max_memory_allocated() / 1e9, 2))

    def _end_phase(self) -> None:
        if self._graphs is not None:
            self._set_rates(float)
        if self._lean is not None:
            self._lean.end()
        self._lean, self._graphs, self._sum, self._counted = None, None, None, False

    def _share(self, rows: list[int], weight: float) -> Iterator[tuple[dict[str, Tensor], Packing, float]]:
        """This process's part of a batch and the weight of its loss, if any of the batch's loss is there."""
        shares = self.pack.shares(rows, self._processes.count)
        self.state.num_input_tokens_seen += self.pack.tokens(rows)[0]
        self.padded_tokens += sum(self.pack.tokens(some)[1] for some, part in shares if some and part)
        some, part = shares[self._processes.number]
        if some and part:
            yield *self._batch(some), part * weight

    def _batch(self, rows: list[int]) -> tuple[dict[str, Tensor], Packing]:
        """The batch on the device. It is copied while the device still computes the step before."""
        batch, lengths = self.pack(rows)
        tokens, device = batch["input_ids"].numel(), self.args.device
        self.current_flos += 6 * tokens * self._parameters  # Trainer adds up those of all processes
        if device.type == "cuda":
            batch = {name: value.pin_memory() for name, value in batch.items()}
        packing = Packing.of(lengths, tokens, device, None if device.type == "cpu" else self.pack.longest)
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}, packing

    def _loss(self, batch: Mapping[str, Tensor], packing: Packing, share: float, outputs: Any) -> Tensor:
        loss: Tensor = outputs["loss"]
        teacher = None if self.teacher is None else self.teacher()
        if teacher is None:
            return loss * share
        packed = self._packed_teacher
        if packed is None or packed.model is not teacher:
            packed = self._packed_teacher = PackedModel(teacher, pooling_of(teacher))
        with torch.no_grad(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            target = packed({k: v for k, v in batch.items() if k not in LABELS}, packing)
        return self.distil.mix(loss, outputs, target, batch) * share
