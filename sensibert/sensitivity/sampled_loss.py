"""The loss with labels drawn from the model's prediction: its squared gradients estimate the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import checked, want
from ..core.errors import SensibertError

BINARY = "multi_label_classification"  # transformers' problem_type of binary cross entropy, with one logit too


@checked
def sampled_loss(outputs: Any, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Scalar loss of a model output with labels drawn from it. Its kind depends on the shapes:

    start_logits, end_logits [B, S]: both ends drawn among the tokens of attention_mask; mean of the two losses.
    logits [B, C], integer labels: a class.   logits [B, 1], or float labels: a unit Gaussian around the prediction.
    logits [B, S, C]: a class at every position whose label is not -100, or without labels, of attention_mask.
    Equal generator states give equal labels. For a model that is trained with binary cross entropy (`loss_of`) the
    labels are 0 and 1. SensibertError for outputs without any of these."""
    if not isinstance(outputs, Mapping):
        raise SensibertError(
            f"analyze: the model returns a {type(outputs).__name__}, want a mapping with logits "
            "(config.return_dict=True), or another loss"
        )
    tokens = batch.get("attention_mask", torch.ones(()))  # without one, nothing is padded
    if "start_logits" in outputs:
        padding = tokens.to(outputs["start_logits"].device) == 0
        ends = [outputs[key].float().masked_fill(padding, -torch.inf) for key in ("start_logits", "end_logits")]
        start, end = (_drawn_cross_entropy(logits, generator) for logits in ends)
        return (start + end) / 2
    if "logits" not in outputs:
        raise SensibertError(
            f"analyze: the model returns {', '.join(outputs)} and no logits; want a model with a task head, or another "
            "loss"
        )
    want("sampled_loss: logits", outputs["logits"], Tensor)
    logits, labels = outputs["logits"].float(), batch.get("labels")
    if logits.dim() not in (2, 3):
        raise SensibertError(f"sampled_loss: logits are {tuple(logits.shape)}, want [B, C] or [B, S, C]")
    if logits.dim() == 3:
        counted = tokens.expand(logits.shape[:2]) != 0 if labels is None else labels != -100
        return _drawn_cross_entropy(logits[counted], generator)
    if logits.shape[-1] == 1 or (labels is not None and labels.is_floating_point()):
        noise = _draw(logits, generator, torch.Tensor.normal_)
        return 0.5 * (logits - (logits.detach() + noise)).square().sum(-1).mean()
    return _drawn_cross_entropy(logits, generator)


def loss_of(model: nn.Module, loss: Any) -> Any:
    """`sampled_loss` with labels 0 and 1, where the model is trained with binary cross entropy; any other loss itself.

    The model is asked at every call: transformers notes its `problem_type` in the first pass with labels."""
    if loss is not sampled_loss:
        return loss

    def drawn(outputs: Any, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        binary = getattr(getattr(model, "config", None), "problem_type", None) == BINARY
        return (_drawn_binary_loss if binary else sampled_loss)(outputs, batch, generator)

    return drawn


def _drawn_binary_loss(outputs: Any, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Each label of logits [B, C] is 1 with the probability that the model gives it.

    The training loss is a mean over labels. The squares of gradients estimate its curvature if the sum over labels is
    divided by sqrt(C): labels are independent, so their squares add up."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return sampled_loss(outputs, batch, generator)
    logits = logits.float()
    labels = (_draw(logits, generator, torch.Tensor.uniform_) < logits.detach().sigmoid()).to(logits.dtype)
    rows, classes = logits.shape
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / (rows * classes**0.5)


def _drawn_cross_entropy(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """logits [M, C]. Labels are drawn by an exponential race: multinomial raises on NaN, but here the loss becomes NaN,
    which the caller reports."""
    race = _draw(logits, generator, torch.Tensor.exponential_)
    labels = (logits.detach().softmax(-1) / race).argmax(-1)
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def _draw(like: Tensor, generator: torch.Generator | None, fill: Callable[..., Tensor]) -> Tensor:
    device = like.device if generator is None else generator.device
    return fill(torch.empty(like.shape, device=device), generator=generator).to(like.device)
