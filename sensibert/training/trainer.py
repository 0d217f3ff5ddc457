"""Model and data -> fine-tuned model: a thin layer over transformers.Trainer.

It adds a learning rate that is re-warmed after the cut, batches of similar length, MaskedAdamW, distillation, an error
that names the first step whose loss or gradient is not finite, and checkpoints with a manifest and the model's
structure. A callback trims the model between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from ..core.arguments import checked, show, want
from ..core.errors import SensibertError
from ..models.eval_mode import quick_attention
from ..models.structure import STRUCTURE, is_trimmed, read_structure
from ..models.wrapped import inner_model
from ..optim import MaskedAdamW, optimizer_cls_and_kwargs, unwrapped
from .checkpoints import check_checkpoint
from .distillation import Distillation
from .first_non_finite import FirstNonFinite

# On a GPU batches are padded to a multiple of this many tokens: layers of a trimmed model have different widths, so
# every new length brings many new matrix shapes, and cuBLAS takes longer to prepare those than the padding costs. squad
# has 178 lengths in 331 batches of 32 rows, but only 38 multiples of 8. On a CPU oneDNN keeps them (`library_caches`).
MULTIPLE = 8
LABELS = ("labels", "start_positions", "end_positions")
ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)  # MaskedAdamW is used in their place


class LengthSampler(Sampler[int]):
    """Batches of similar length. The order depends on seed and epoch alone, so a resumed run has the same."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class TrimTrainer(Trainer):
    """transformers.Trainer for a model whose tensors shrink during training.

    lr_shape: (step, total steps) -> factor on the peak learning rate. teacher: called at every step; once it returns a
    model, the loss is mixed with the distillation loss (`distil`). Before a checkpoint is loaded, callbacks with a
    `resume_from` receive its path, and if it is of a trimmed model, a callback with a `restructure` trims the model
    (`TrimCallback` has both). score: (model) -> metrics, in place of the predictions and compute_metrics of an
    evaluation. A training set with `.lengths` is read in batches of similar length; batches of a
    collator with `.extended` are padded to multiples where that is faster. AdamW is MaskedAdamW."""

    @checked
    def __init__(
        self,
        *args: Any,
        lr_shape: Callable[[int, int], float] | None = None,
        teacher: Callable[[], nn.Module | None] | None = None,
        distil: Distillation | None = None,
        score: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        want("TrimTrainer: model", kwargs.get("model", args[0] if args else None), nn.Module | None)
        if isinstance(teacher, nn.Module):
            raise SensibertError(f"TrimTrainer: teacher is {show(teacher)}, want a function that returns the model")
        super().__init__(*args, **kwargs)
        # Some heads divide by the number of items if they get it, others do not. Here Trainer divides by the steps.
        self.model_accepts_loss_kwargs = False
        self.lr_shape = lr_shape
        self.teacher, self.distil, self.score = teacher, distil or Distillation(), score
        self._losses, self._norms = FirstNonFinite(), FirstNonFinite()  # norms: of all gradients of a step
        self._best: str | None = None  # best checkpoint before the training was resumed
        self._tokens: Tensor | int = 0  # without padding, since they were last added to the state

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer_cls_and_kwargs is not None or self.args.optim not in ADAMW:
            return super().create_optimizer(model)
        kind, settings = optimizer_cls_and_kwargs(self.args)
        trained: Any = self.model if model is None else model
        usual = self.get_optimizer_cls_and_kwargs(self.args, trained)[1]
        if "optimizer_dict" in usual:  # of sentence-transformers: the weights of its losses are among the parameters
            settings["optimizer_dict"] = usual["optimizer_dict"]
        self.optimizer_cls_and_kwargs = kind, settings
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None  # another model has other parameters

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        assert self.optimizer is not None  # there are gradients to clip
        optimizer = unwrapped(self.optimizer)
        if not isinstance(optimizer, MaskedAdamW) or self.args.fp16:  # fp16: gradients are not unscaled yet
            return super()._clip_grad_norm(model)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return optimizer.clip_grad_norm(self.args.max_grad_norm, norm)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_shape is None:
            return super().create_scheduler(num_training_steps, optimizer)
        shape, optimizer = self.lr_shape, optimizer or self.optimizer
        assert optimizer is not None  # the Trainer makes it first
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step, num_training_steps))
        self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        lengths = getattr(self.train_dataset if train_dataset is None else train_dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.world_size  # several processes divide each of these batches
        return LengthSampler(lengths, size, self.args.data_seed or self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        teacher = self.teacher() if self.teacher is not None and model.training else None
        if teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            target = teacher(**{name: value for name, value in inputs.items() if name not in LABELS})
        loss = self.distil.mix(loss, outputs, target, inputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        inputs = padded_further(inputs, self.data_collator, self.args.device)
        ids = inputs.get("input_ids")
        with quick_attention(self.args.device, self.args.bf16, None if ids is None else ids.shape[-1]):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if ids is not None:
            mask = inputs.get("attention_mask")
            self._tokens = self._tokens + (ids.numel() if mask is None else mask.sum())
            if ids.is_cpu and self.args.world_size == 1:
                self._count_tokens()
        self._note(self._losses, loss)
        return loss

    def _note(self, seen: FirstNonFinite, value: Tensor) -> None:
        """Remember the first value that is not finite, without reading it, and raise for one before a cut."""
        step = self.state.global_step + 1
        seen.note(step, value)
        if any(step in getattr(callback, "cuts", ()) for callback in self.callback_handler.callbacks):
            self._want_finite()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, Tensor) and not self.args.fp16:  # fp16: its scaler skips such steps
            self._note(self._norms, norm)
        return norm

    def _count_tokens(self) -> None:
        tokens = self._tokens
        if self.args.world_size > 1:  # all processes are at the same place
            tokens = self.accelerator.reduce(torch.as_tensor(tokens, device=self.args.device), "sum")
        self.state.num_input_tokens_seen += int(tokens)
        self._tokens = 0

    def _want_finite(self) -> None:
        """SensibertError if a loss or gradient was not finite. This reads from the device: not at every step."""
        self._count_tokens()
        noted = [(*self._losses.read(), "loss is"), (*self._norms.read(), "norm of the gradients is")]
        if bad := sorted((entry for entry in noted if entry[0]), key=lambda entry: entry[0]):
            step, value, what = bad[0]
            raise SensibertError(
                f"finetune: the {what} {value} at step {step}; "
                "try a smaller learning rate, more warm-up, or --precision fp32"
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._want_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._losses, self._norms, self._tokens, self._best = FirstNonFinite(), FirstNonFinite(), 0, None
        output = super().train(*args, **kwargs)
        self._want_finite()
        known = self.state.best_model_checkpoint  # of one that was moved the old place, or None (transformers 5.23)
        if self._best is not None and (known is None or not Path(known).is_dir()):
            if Path(self._best).name == f"checkpoint-{self.state.best_global_step}":
                self.state.best_model_checkpoint = self._best
                self._load_best_model()
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # From a checkpoint of the last step, within an epoch, Trainer would take one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        elif not self.control.should_training_stop:  # a callback may stop it before the first step
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.score is None:
            return super().evaluate(*args, **kwargs)
        assert self.model is not None  # a Trainer has one
        metrics = {f"eval_{name}": value for name, value in self.score(self.model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _best_beside(self, checkpoint: str) -> str | None:
        """The best checkpoint that a checkpoint names, in the folder where both are now; None if it is not needed.

        SensibertError if it is gone: Trainer would keep the last weights."""
        known = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
        if not self.args.load_best_model_at_end or known is None:
            return None
        best = Path(checkpoint).parent / Path(known).name
        check_checkpoint(best)
        return str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not check_checkpoint(resume_from_checkpoint):
            message = "resume: %s is of an earlier version, without digests: only sizes and weights were checked"
            logging.getLogger("sensibert").warning(message, resume_from_checkpoint)
        self._best = self._best_beside(resume_from_checkpoint)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "resume_from"):
                callback.resume_from(resume_from_checkpoint)
        structure, trained = Path(resume_from_checkpoint) / STRUCTURE, self.model if model is None else model
        assert trained is not None  # a Trainer has one
        if not structure.exists() and is_trimmed(inner_model(trained)):
            raise SensibertError(
                f"resume: {resume_from_checkpoint} is of an untrimmed model, and this one is trimmed, want the model "
                "that the run began with"
            )
        if structure.exists():
            restructure = [c.restructure for c in self.callback_handler.callbacks if hasattr(c, "restructure")]
            if not restructure:
                raise SensibertError(
                    f"{resume_from_checkpoint} is of a trimmed model, want a TrimCallback among callbacks= to "
                    "trim this one"
                )
            restructure[0](trained, read_structure(structure))
        # The trainers of sentence-transformers take the checkpoint alone.
        super()._load_from_checkpoint(resume_from_checkpoint, *(() if model is None else (model,)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, OSError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SensibertError(f"{checkpoint}: its optimizer or schedule cannot be loaded ({reason})") from None


def padded_further(batch: dict, collator: Callable, device: torch.device) -> dict:
    return collator.extended(batch, MULTIPLE) if device.type == "cuda" and hasattr(collator, "extended") else batch
