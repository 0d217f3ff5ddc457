"""Distillation: the loss against a teacher, which is a given model or the run's snapshot at the cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Reordered(nn.Module):
    """A classifier with its classes in another order: its class i is class order[i] of the model. All else is the
    model's."""

    def __init__(self, model: nn.Module, order: list[int]):
        super().__init__()
        self.model, self.order = model, order

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        outputs["logits"] = outputs["logits"][..., self.order]
        return outputs


def distillation_loss(
    logits: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    temperature: float,
    counted: Tensor | None = None,
    per_label: bool = False,
) -> Tensor:
    """T^2 * KL(teacher || student) of softened predictions, mean over samples (Hinton et al., arXiv 1503.02531).

    Every key that ends in `logits` counts; a single regression output [B, 1] takes the squared error instead. counted:
    bool [B, S], the tokens whose logits [B, S, C] count; None: all. per_label: logits [B, C] of independent labels,
    with the divergence of the prediction of each, mean over samples and labels."""
    losses = []
    for name, target in teacher.items():
        if not name.endswith("logits"):
            continue
        student, target = logits[name].float(), target.float()
        if target.shape[-1] == 1:
            losses.append(F.mse_loss(student, target))
            continue
        if per_label:
            losses.append(_binary_divergence(student / temperature, target / temperature) * temperature**2)
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


def _binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all logits of KL(teacher || student) of the predictions sigmoid(logit) and sigmoid(-logit)."""
    p = teacher.sigmoid()
    yes = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return (yes + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))).mean()


@dataclass(frozen=True)
class Distillation:
    """loss = (1 - weight) * loss + weight * distillation_loss."""

    weight: float = 0.5
    temperature: float = 2.0

    def mix(self, loss: Tensor, outputs: Mapping, target: Mapping, inputs: Mapping) -> Tensor:
        """The mixed loss. inputs: the batch; in token tasks only tokens with a label count. Labels that are floats are
        independent of one another."""
        labels = inputs.get("labels")
        counted = None if labels is None else labels != -100
        per_label = labels is not None and labels.is_floating_point()
        taught = distillation_loss(outputs, target, self.temperature, counted, per_label)
        return (1 - self.weight) * loss + self.weight * taught
