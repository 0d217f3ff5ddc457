"""Who teaches, and what that adds to the loss: a model of somebody else's, or the student itself, as a snapshot of the
moment before the cut or as an average of its weights since then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from ..core.errors import SensibertError
from ..models import bare_copy

AVERAGE_FILE = "average.safetensors"


class Reordered(nn.Module):
    """A classifier whose classes stand in another order: class i of it is class order[i] of the model."""

    def __init__(self, model: nn.Module, order: list[int]):
        super().__init__()
        self.model, self.order = model, order

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs["logits"] = outputs["logits"][..., self.order]
        return outputs


def distillation_loss(
    logits: Mapping[str, Tensor], teacher: Mapping[str, Tensor], temperature: float, counted: Tensor | None = None
) -> Tensor:
    """T^2 * KL(teacher || student) of softened predictions, mean over samples (Hinton et al., arXiv 1503.02531).

    Every key that ends in `logits` counts; a single regression output [B, 1] takes the squared error instead. counted:
    bool [B, S], the tokens whose logits [B, S, C] count; None: all."""
    losses = []
    for name, target in teacher.items():
        if not name.endswith("logits"):
            continue
        student, target = logits[name].float(), target.float()
        if target.shape[-1] == 1:
            losses.append(F.mse_loss(student, target))
            continue
        if target.dim() == 3 and counted is not None:
            student, target = student[counted], target[counted]
        classes = target.shape[-1]
        losses.append(
            F.kl_div(
                F.log_softmax(student.reshape(-1, classes) / temperature, -1),
                F.log_softmax(target.reshape(-1, classes) / temperature, -1),
                reduction="batchmean",
                log_target=True,
            )
            * temperature**2
        )
    return torch.stack(losses).mean()


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Squared distance of the hidden states behind every layer, each token's brought to mean 0 and variance 1.

    Mean over layers, tokens and channels (as in TinyBERT, arXiv 1909.10351, without its projection: trimming leaves the
    hidden size alone). student, teacher: hidden states [B, S, H], the embeddings first, which do not count. mask
    [B, S]: 1 for the tokens that do. SensibertError where the two do not match."""
    shapes = [(len(states), states[-1].shape[-1]) for states in (student, teacher)]
    if shapes[0] != shapes[1]:
        said = " and ".join(f"{layers - 1} of {width}" for layers, width in shapes)
        raise SensibertError(f"distil_hidden: student and teacher have layers {said}, want the same number and width")
    losses = []
    for mine, other in zip(student[1:], teacher[1:], strict=True):
        width = mine.shape[-1:]
        distance = (F.layer_norm(mine.float(), width) - F.layer_norm(other.float(), width)).square().mean(-1)
        losses.append(distance.mean() if mask is None else (distance * mask).sum() / mask.sum())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Distillation:
    """loss = (1 - w) * loss + w * distillation_loss + h * hidden_loss, with w = weight and h = hidden.

    fade: (step, total steps) -> factor on w and h; a teacher whose factor is 0 is not asked."""

    weight: float = 0.5
    temperature: float = 2.0
    hidden: float = 0.0
    fade: Callable[[int, int], float] = lambda step, total: 1.0

    def mix(self, loss: Tensor, outputs: Mapping, target: Mapping, inputs: Mapping, factor: float) -> Tensor:
        """inputs: the batch. Logits of tokens count where there is a label, hidden states where there is no padding."""
        weight, labels, mask = factor * self.weight, inputs.get("labels"), inputs.get("attention_mask")
        counted = None if labels is None else labels != -100
        loss = (1 - weight) * loss + weight * distillation_loss(outputs, target, self.temperature, counted)
        if self.hidden:
            loss = loss + factor * self.hidden * hidden_loss(outputs["hidden_states"], target["hidden_states"], mask)
        return loss


class Average(TrainerCallback):
    """Keeps an exponential moving average of the student's weights from step `begin(total steps)` on, as its teacher.

    "Mean teacher" (Tarvainen & Valpola, arXiv 1703.01780): after n steps the average takes up 1 / (n + 1) of the new
    weights, and never less than 1 - decay. Put it before whatever seals a checkpoint: it is written into each one."""

    def __init__(self, begin: Callable[[int], int], decay: float = 0.99):
        self.begin, self.decay, self.average = begin, decay, None

    @staticmethod
    def _file(args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGE_FILE

    def teacher(self) -> nn.Module | None:
        return None if self.average is None else self.average.module

    def _start(self, model: nn.Module) -> None:
        @torch.no_grad()
        def mean(averages: list[Tensor], news: list[Tensor], _: Tensor) -> None:
            number = int(self.average.n_averaged)  # stays on the CPU
            torch._foreach_lerp_(averages, news, max(1 - self.decay, 1 / (number + 1)))

        self.average = AveragedModel(bare_copy(model).requires_grad_(False), multi_avg_fn=mean)
        self.average.eval()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        file = self._file(args, state)
        if state.global_step >= self.begin(state.max_steps) and file.exists():
            self._start(model)
            safetensors.load_model(self.average, file)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step < self.begin(state.max_steps):
            return
        if self.average is None:
            self._start(model)
        self.average.update_parameters(model)

    def on_save(self, args, state, control, **kwargs):
        if self.average is not None:
            safetensors.save_model(self.average, self._file(args, state))
