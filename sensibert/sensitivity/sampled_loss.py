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
    Equal generator states give equal labels, in whatever batches the rows are, and however padded: each row draws for
    itself. For a model that is trained with binary cross entropy (`loss_of`) the labels are 0 and 1. SensibertError for
    outputs without any of these."""
    if not isinstance(outputs, Mapping):
        raise SensibertError(
            f"analyze: the model returns a {type(outputs).__name__}, want a mapping with logits "
            "(config.return_dict=True), or another loss"
        )
    if "start_logits" in outputs:
        ends = torch.stack([outputs["start_logits"], outputs["end_logits"]], -1).float()  # [B, S, 2]
        tokens = batch.get("attention_mask", torch.ones(()))  # without one, nothing is padded
        real, race = tokens.expand(ends.shape[:2]).to(ends.device) != 0, torch.ones_like(ends)
        race[real] = _draw(ends[real], generator, torch.Tensor.exponential_, real.sum(1).tolist())
        ends = ends.masked_fill(~real[..., None], -torch.inf)
        start, end = (_race(logits, times) for logits, times in zip(ends.unbind(-1), race.unbind(-1), strict=True))
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
        counted = _counted(logits, batch)
        return _drawn_cross_entropy(logits[counted], generator, counted.sum(1).tolist())
    if logits.shape[-1] == 1 or (labels is not None and labels.is_floating_point()):
        noise = _draw(logits, generator, torch.Tensor.normal_)
        return 0.5 * (logits - (logits.detach() + noise)).square().sum(-1).mean()
    return _drawn_cross_entropy(logits, generator)


def terms(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor | int:
    """How many terms `sampled_loss` and the model's own loss are the mean of: tokens of logits [B, S, C], else rows."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(logits, Tensor) and logits.dim() == 3:
        return _counted(logits, batch).sum()
    return len(next(iter(batch.values())))


def _counted(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """bool [B, S]: tokens whose labels are drawn, of logits [B, S, C]."""
    labels = batch.get("labels")
    if labels is not None:
        return labels != -100
    return batch.get("attention_mask", torch.ones(())).expand(logits.shape[:2]) != 0


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


def _drawn_cross_entropy(logits: Tensor, generator: torch.Generator | None, rows: list[int] | None = None) -> Tensor:
    """logits [M, C]. rows: as for `_draw`."""
    return _race(logits, _draw(logits, generator, torch.Tensor.exponential_, rows))


def _race(logits: Tensor, times: Tensor) -> Tensor:
    """Cross entropy of logits [M, C] with labels drawn from their softmax, given exponential random numbers [M, C].

    Labels are drawn by an exponential race: multinomial raises on NaN, but here the loss becomes NaN, which the caller
    reports."""
    labels = (logits.detach().softmax(-1) / times).argmax(-1)
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def _draw(
    like: Tensor, generator: torch.Generator | None, fill: Callable[..., Tensor], rows: list[int] | None = None
) -> Tensor:
    """Random numbers in the shape of `like`. rows: how many entries of its first dimension each row of the batch has,
    by default one. A call for each row, since one call for several draws other numbers."""
    drawn = torch.empty(like.shape, device=like.device if generator is None else generator.device)
    for part in drawn.split(1 if rows is None else rows):
        fill(part, generator=generator)
    return drawn.to(like.device)
