"""Optimal Brain Surgeon for whole units, under a Kronecker-factored Fisher matrix of every consuming weight.

A consumer computes y = W h + b, W [N, K]; a unit is a set of its columns. With delta_t = dL/dy at token t, labels drawn
from the model's prediction, and a_t = |delta_t|^2, the loss rises with a change of W by about

    1/2 tr(G dW C dW^T),   C = sum_t a_t (h_t - m)(h_t - m)^T,   G = sum_t delta_t delta_t^T / sum_t a_t

(m: the mean of h weighted by a_t, which b absorbs; the factors are those of one step of the power iteration for the
nearest Kronecker product). Removing the units D, with optimal compensation by the remaining ones, costs, with H = C^-1,

    1/2 tr(G W_D (H_DD)^-1 W_D^T),   and   W' = W - W_D (H_DD)^-1 H_D

During training the loss also has a slope, with the labels of the data. Its predicted rise (`predicted_curve`) is the
sum of the slope and the curvature along that change of the weights, and of the squared gradients per sample n of a gate
m_j on each dropped unit, without compensation:

    tr((dL/dW - dL/db m^T)^T (W' - W))  +  1/2 tr(G W_D (H_DD)^-1 W_D^T)  +  1/2 sum over n and j in D of (dL_n/dm_j)^2

Either curvature alone is too small: far from a minimum, and across several layers, the loss curves more than the
Fisher matrix captures. The sum was calibrated on two checkpoints (`bench/bench_rank.py`): its order is reliable, its
scale is rough.

With a_t = 1 and G = I this is the squared error of the layer's output alone, which needs no gradient and no labels
(`layer-obs`; the criterion of ZipLM).

Hassibi & Stork, 1993 (OBS); Martens & Grosse, arXiv 1503.05671 (the factors); Kurtic et al., arXiv 2302.04089 (ZipLM),
and van der Ouderaa et al., arXiv 2312.17244, for structures of language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.layout import Layout, Site
from ..models import base_of, eval_mode, require_finite, sites
from ..models.modules import attribute, is_linear
from .gradients import Batch, Loss, batch_size, model_loss, passes

DAMP = 1e-2  # added to the diagonal of C, as a fraction of its mean
# The same for changes of weights. Right after the cut it is as good as 0.1 or 0.01 (71.5 to 71.2 % on banking77 at
# 30 %), but weights grow only by a tenth, not by half or threefold, which is a better start for training.
DAMP_WEIGHTS = 1.0
TINY = 1e-30  # the least that is added, so that the C of inputs that never change has an inverse


class FisherFactors:
    """Sums over tokens at one consuming weight: of a, a h, a h h^T and delta delta^T. samples: number of rows.

    With labels in the batches also the sums of delta and delta h^T, the gradients of bias and weight. Over samples: the
    squared gradient of a gate on each unit (the statistic `fisher` with one sample per micro-batch). fp32, or fp64 for
    fp64 weights. The largest sum is K x K: 38 MB for an FFN layer of BERT-base."""

    def __init__(
        self, width: int, height: int, device: torch.device, dtype: torch.dtype = torch.float32, units: int = 0
    ):
        self.samples = 0
        shapes = ((), (width,), (width, width), (height, height), (height,), (height, width), (units,))
        self.weight, self.first, self.second, self.output, self.bias_slope, self.slope, self.gates = (
            torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device) for shape in shapes
        )

    def add(self, h: Tensor, delta: Tensor, given: Tensor | None = None) -> None:
        """Add tokens: h [..., K], and the gradients of the loss at the output [..., N]: delta with drawn labels, given
        with the labels of the batch."""
        h, delta = (t.flatten(0, -2).to(self.second.dtype) for t in (h, delta))
        if given is not None:
            given = given.flatten(0, -2).to(self.second.dtype)
            self.bias_slope += given.sum(0)
            self.slope.addmm_(given.T, h)
        a = delta.square().sum(-1, keepdim=True)
        self._add(h, a)
        self.output.addmm_(delta.T, delta)

    def add_gates(self, h: Tensor, delta: Tensor, weight: Tensor, columns: Tensor) -> None:
        """Add B samples: h [B, ..., K], delta [B, ..., N]; weight [N, K], columns [units, span]. If samples are not
        separated ([tokens, K]), the gradient of their sum is squared: its mean is the same, since labels are drawn."""
        h, delta = (t.flatten(1, -2) if t.dim() > 2 else t[None] for t in (h, delta))
        gate = (h * (delta.to(weight.dtype) @ weight)).sum(1)[:, columns.to(h.device)].sum(-1)
        self.gates += gate.to(self.gates.dtype).square().sum(0)

    def add_evenly(self, h: Tensor, mask: Tensor) -> None:
        """Add tokens h [..., K] whose mask [...] is 1, with equal weights for all tokens and outputs (G = I)."""
        a = mask.flatten()[:, None].to(self.second.dtype)
        self._add(h.flatten(0, -2).to(self.second.dtype), a)
        self.output.diagonal().add_(a.sum())

    def _add(self, h: Tensor, a: Tensor) -> None:
        self.weight += a.sum()
        self.first += (a * h).sum(0)
        self.second.addmm_(h.T, a * h)


def inner(group: Sequence[FisherFactors], centred: bool, damp: float) -> tuple[Tensor, Tensor]:
    """m [L, K] and the damped C [L, K, K] of L factors of the same sizes, fp64. centred: the consumers have a bias that
    absorbs the mean; else m is 0."""
    total, first, covariance = (
        torch.stack(parts).double()
        for parts in zip(*((factors.weight, factors.first, factors.second) for factors in group), strict=True)
    )
    mean = first / total[:, None] if centred else torch.zeros_like(first)
    covariance.addcmul_((total[:, None] * mean)[:, :, None], mean[:, None], value=-1)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    diagonal.add_((damp * diagonal.mean(1, keepdim=True)).clamp_min(TINY))
    return mean, covariance


def consumer(model: nn.Module, parameter: str) -> nn.Linear:
    linear = attribute(base_of(model), parameter.removesuffix(".weight"))
    assert is_linear(linear)  # of a site, which has no other consumer
    return linear


def unit_columns(site: Site) -> Tensor:
    """The columns of the consuming weight that belong to each unit, [units, span]."""
    return site.consumer.index(torch.arange(site.units), site.units).view(site.units, site.consumer.span)


@checked
def collect_factors(
    model: nn.Module,
    layout: Layout,
    batches: Iterable[Batch],
    sampled_loss: Loss | None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, FisherFactors]:
    """Name of each consuming weight -> its factors. One forward and one backward pass per batch, or two backward passes
    if the batch has labels. The model is not changed.

    sampled_loss: (outputs, batch, generator) -> mean loss over the rows of the batch, with drawn labels. None: forward
    passes only, with equal weights for all tokens (a_t = 1, G = I). SensibertError for no data, a batch that the model
    cannot run on, a loss that is not finite, or the layout of another model."""
    if layout.sites != sites(model):
        raise SensibertError("collect_factors: layout is that of another model, want layout_of(model)")
    collected: dict[str, FisherFactors] = {}
    handles, samples = [], 0
    calls: list[Call] = []
    consumers = {site.consumer.parameter: site for site in reversed(layout.sites)}  # a shared layer has several sites
    for name, site in consumers.items():
        linear = consumer(model, name)
        like = linear.weight
        collected[name] = FisherFactors(linear.in_features, linear.out_features, like.device, like.dtype, site.units)

        def watch(module: nn.Linear, args: tuple[Tensor], out: Tensor, site: Site = site) -> Tensor:
            if torch.is_grad_enabled() and not out.requires_grad:  # a frozen encoder
                out.requires_grad_()
            calls.append(Call(site, module.weight.detach(), args[0].detach(), out))
            return out

        handles.append(linear.register_forward_hook(watch))
    generator = torch.Generator().manual_seed(seed)
    try:
        with eval_mode(model, autocast) as device, torch.set_grad_enabled(sampled_loss is not None):
            for batch, outputs in passes(model, batches, device):
                rows = batch_size(batch)
                if sampled_loss is None:
                    _add_evenly(collected, calls, batch.get("attention_mask"))
                else:
                    drawn, given = sampled_loss(outputs, batch, generator), model_loss(outputs)
                    require_finite(drawn, samples)
                    _add_gradients(collected, calls, drawn * rows, None if given is None else given * rows)
                calls.clear()
                samples += rows
    finally:
        for handle in handles:
            handle.remove()
    if not samples:
        raise SensibertError("analyze: batches is empty, want at least one micro-batch")
    for factors in collected.values():
        factors.samples = samples
    return collected


class Call(NamedTuple):
    """A call of a consumer in a forward pass: y = W h + b."""

    site: Site
    weight: Tensor  # [N, K]
    h: Tensor  # [..., K]
    y: Tensor  # [..., N]


def _add_gradients(
    collected: Mapping[str, FisherFactors], calls: list[Call], drawn: Tensor, given: Tensor | None
) -> None:
    grad = partial(torch.autograd.grad, inputs=[call.y for call in calls], allow_unused=True, materialize_grads=True)
    slopes = repeat(None) if given is None else grad(given, retain_graph=True)
    for call, delta, slope in zip(calls, grad(drawn), slopes):
        factors = collected[call.site.consumer.parameter]
        factors.add(call.h, delta, slope)
        factors.add_gates(call.h, delta, call.weight, unit_columns(call.site))


def _add_evenly(collected: Mapping[str, FisherFactors], calls: list[Call], mask: Tensor | None) -> None:
    for call in calls:
        if mask is None or mask.numel() * call.h.shape[-1] != call.h.numel():  # some models remove the padding
            weights = torch.ones(call.h.shape[:-1], device=call.h.device)
        else:
            weights = mask
        collected[call.site.consumer.parameter].add_evenly(call.h, weights)


def _share(covariance: Tensor, kept: Tensor, drop: Tensor) -> Tensor:
    """(C_SS)^-1 C_SD [kept, dropped]: the weight of each kept column in the replacement of each dropped one."""
    return torch.linalg.solve(covariance[kept][:, kept], covariance[kept][:, drop])


def _complement(kept: Tensor, width: int) -> Tensor:
    """bool [width], False at the kept positions."""
    drop = torch.ones(width, dtype=torch.bool, device=kept.device)
    drop[kept] = False
    return drop


@torch.no_grad()
def compensate_weights(linear: nn.Linear, factors: FisherFactors, kept: Tensor, damp: float = DAMP_WEIGHTS) -> None:
    """Set the kept columns and the bias, in place, to the least-squares solution without the other columns.

    W'_S = W_S + W_D C_DS (C_SS)^-1, b' = b + (W - W') m: the solution above, written with C. kept: column numbers [n].
    The other columns are not changed."""
    mean, covariance = (part[0] for part in inner([factors], linear.bias is not None, damp))
    drop = _complement(kept.to(mean.device), len(mean))
    old, shift = linear.weight[:, drop].double(), mean[drop]
    if len(kept):
        share = _share(covariance, kept, drop)
        linear.weight[:, kept] += (old @ share.T).to(linear.weight.dtype)
        shift = shift - share.T @ mean[kept]
    if linear.bias is not None:
        linear.bias.add_((old @ shift).to(linear.bias.dtype))
