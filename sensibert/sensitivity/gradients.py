"""Scores from gradients: one reduction of weight and gradient over every block, for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import show
from ..core.errors import SensibertError, described
from ..core.grid import Grid
from ..core.layout import Layout
from ..core.statistics import Statistic
from ..models import Losses, base_of, eval_mode, quick_attention
from ..ops import block_sensitivity

ANSWER = ("start_positions", "end_positions")
Batch = Mapping[str, Tensor]
Loss = Callable[[Any, Batch, torch.Generator], Tensor]  # (outputs of the model, batch, generator) -> scalar


def model_loss(outputs: Any, batch: Batch) -> Tensor | None:
    """The loss that the model computed from the labels in the batch; None if it computed none.

    Of answers, that over the tokens of each row: the softmax of the model's own loss counts the padding of the batch.
    """
    loss: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if (
        loss is None
        or "attention_mask" not in batch
        or not set(ANSWER).issubset(batch)
        or "start_logits" not in outputs
    ):
        return loss
    losses = []
    for key, name in zip(("start_logits", "end_logits"), ANSWER, strict=True):
        logits, position = outputs[key], batch[name].flatten()
        outside = logits.shape[-1]  # a position there is no answer, as in the model's own loss
        position = position.clamp(0, outside)
        padding = (batch["attention_mask"] == 0).scatter(1, position.clamp(max=outside - 1)[:, None], False)
        logits = logits.masked_fill(padding, -torch.inf)
        losses.append(F.cross_entropy(logits, position, ignore_index=outside))
    return (losses[0] + losses[1]) / 2


def given_loss(outputs: object, batch: Batch, generator: torch.Generator) -> Tensor:
    """`model_loss`; SensibertError if there is none."""
    loss = model_loss(outputs, batch)
    if loss is None:
        raise SensibertError(f"analyze: the model returned no loss, want labels in the batch (it has {sorted(batch)})")
    return loss


def passes(model: Callable[..., Any], batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Any]]:
    """(batch on the device, outputs of the model) of every batch, computed when it is its turn.

    SensibertError names a batch that is not a dict of tensors, or that the model cannot run on."""
    for number, batch in enumerate(batches):
        place = f"batches[{number}]"
        if not isinstance(batch, Mapping) or not batch:
            came = "empty" if isinstance(batch, Mapping) else show(batch)
            raise SensibertError(f"{place} is {came}, want a dict of tensors, the inputs of the model by name")
        for name, value in batch.items():
            if not isinstance(value, Tensor) or not value.dim():
                came = "a single number" if isinstance(value, Tensor) else show(value)
                raise SensibertError(f"{place}[{show(name)}] is {came}, want a tensor with one row a sample")
        batch = {name: value.to(device) for name, value in batch.items()}
        ids = batch.get("input_ids")
        length = None if ids is None else ids.shape[-1]
        try:
            with quick_attention(device, torch.is_autocast_enabled(device.type), length):
                outputs = model(**batch)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, SensibertError | torch.OutOfMemoryError):
                raise
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
            raise SensibertError(f"{place}: the model cannot run on {shapes} ({described(error)})") from error
        yield batch, outputs


class ScoredBlocks(NamedTuple):
    """A parameter whose blocks are scored. The scores belong to the owner: a site, or the parameter itself."""

    owner: str
    parameter: str
    grid: Grid
    dim: int = 0
    parts: int = 1  # sections along dim, each with one block per unit
    shape: tuple[int, ...] = (-1,)  # of the owner's scores

    def sections(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(self.parts, self.dim)) if self.parts > 1 else [parameter]


def scored_blocks(layout: Layout, statistic: Statistic, grid: Grid | None) -> list[ScoredBlocks]:
    if grid is not None:
        shapes = [(w.parameter, grid.shape(w.rows, w.cols)) for w in layout.weights]
        return [ScoredBlocks(name, name, grid, shape=shape) for name, shape in shapes]
    chosen = [(site, site.members if statistic.all_members else (site.consumer,)) for site in layout.sites]
    return [ScoredBlocks(site.name, m.parameter, m.grid, m.dim, m.parts) for site, members in chosen for m in members]


def reduce_blocks(
    blocks: list[ScoredBlocks],
    weights: list[Tensor],
    grads: list[Tensor] | None,
    statistic: Statistic,
    out: list[Tensor] | None,
) -> list[Tensor]:
    """One op call for all weights. out: one tensor per section, in the shape of its grid."""
    parts, part_grads, grids = [], [], []
    for number, block in enumerate(blocks):
        sections = block.sections(weights[number])
        parts += sections
        part_grads += block.sections(grads[number]) if grads is not None else []
        grids += [block.grid] * len(sections)
    return block_sensitivity(parts, part_grads, grids, statistic.reduce, statistic.finish, out=out)


def collect_scores(blocks: list[ScoredBlocks], out: list[Tensor]) -> dict[str, Tensor]:
    """Sum the sections and members of each owner: name -> fp32 [units], or [block rows, block columns]."""
    scores: dict[str, Tensor] = {}
    parts = iter(out)
    for block in blocks:
        for _ in range(block.parts):
            part = next(parts).float().reshape(block.shape)
            scores[block.owner] = scores[block.owner] + part if block.owner in scores else part
    return scores


def batch_size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def gradient_scores(
    model: nn.Module,
    blocks: list[ScoredBlocks],
    batches: Iterable[Batch],
    statistic: Statistic,
    loss: Loss,
    seed: int,
    autocast: torch.dtype | None,
) -> tuple[dict[str, Tensor], int]:
    state = dict(base_of(model).named_parameters())
    weights = [state[block.parameter] for block in blocks]
    frozen = [p for p in weights if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    generator, out, losses = torch.Generator().manual_seed(seed), None, Losses()
    try:
        with eval_mode(model, autocast) as device:
            for batch, outputs in passes(model, batches, device):
                value = loss(outputs, batch, generator)
                losses.add(value, batch_size(batch))
                # Computes no gradients of embeddings, and does not change any .grad.
                grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
                out = reduce_blocks(blocks, [w.detach() for w in weights], list(grads), statistic, out)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if out is None:
        raise SensibertError("analyze: batches is empty, want at least one micro-batch")
    losses.check()
    return collect_scores(blocks, out), losses.samples
