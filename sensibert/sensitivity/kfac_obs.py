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

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.layout import Layout, Site
from ..models import Losses, base_of, eval_mode, sites
from ..models.modules import attribute, is_linear
from ..models.padded_rows import PaddedRows
from .gradients import Batch, Loss, batch_size, model_loss, passes
from .sampled_loss import loss_of, terms

DAMP = 1e-2  # added to the diagonal of C, as a fraction of its mean
# The same for changes of weights. Right after the cut it is as good as 0.1 or 0.01 (71.5 to 71.2 % on banking77 at
# 30 %), but weights grow only by a tenth, not by half or threefold, which is a better start for training.
DAMP_WEIGHTS = 1.0
# Products of wide inputs are computed in panels: 4 panels of the triangle take 10/16 of the time of the square.
PANELS, LEAST = 4, 64
# Elements of inputs of layers that are added up together: on a GPU 512 MB in fp32, on a CPU few, since copying them
# together takes longer than the calls that it saves.
TOGETHER, TOGETHER_ON_CPU = 2**27, 2**20
TINY = 1e-30  # the least that is added, so that the C of inputs that never change has an inverse


class FisherFactors:
    """Sums over tokens at one consuming weight: of a, a h, a h h^T and delta delta^T. samples: number of rows.

    With labels in the batches also the sums of delta and delta h^T, the gradients of bias and weight. Over samples: the
    squared gradient of a gate on each unit (the statistic `fisher` with one sample per micro-batch). fp32, or fp64 for
    fp64 weights. Until `complete` the sum of a h h^T lacks panels below the diagonal. It is K x K: 38 MB for an FFN
    layer of BERT-base.

    layers: of several consumers of the same sizes; every sum then has that many entries in front, and factors[n] are
    those of one of them, in the same memory."""

    def __init__(
        self,
        width: int,
        height: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        units: int = 0,
        layers: int | None = None,
    ):
        self.samples = 0
        shapes = ((), (width,), (width, width), (height, height), (height,), (height, width), (units,))
        front, dtype = () if layers is None else (layers,), torch.promote_types(dtype, torch.float32)
        self._name(torch.zeros((*front, *shape), dtype=dtype, device=device) for shape in shapes)

    def _name(self, sums: Iterable[Tensor]) -> None:
        self.weight, self.first, self.second, self.output, self.bias_slope, self.slope, self.gates = sums

    def _sums(self) -> tuple[Tensor, ...]:
        return self.weight, self.first, self.second, self.output, self.bias_slope, self.slope, self.gates

    def __getitem__(self, part: int | slice) -> FisherFactors:
        found = copy.copy(self)
        found._name(total[part] for total in self._sums())
        return found

    def add(self, h: Tensor, delta: Tensor, given: Tensor | None = None) -> None:
        """Add tokens: h [..., T, K], and the gradients of the loss at the output [..., T, N]: delta with drawn labels,
        given with the labels of the batch."""
        wide, dtype = h.to(self.second.dtype), h.dtype
        if given is not None:
            self.bias_slope += given.sum(-2, dtype=self.second.dtype)
            _add_product(self.slope, given.to(wide.dtype), wide, dtype)
        delta = delta.to(wide.dtype)
        self._add(wide, delta.square().sum(-1, keepdim=True), dtype)
        _add_product(self.output, delta, delta, dtype)

    def add_gates(self, h: Tensor, slope: Tensor, columns: Tensor, lengths: list[int] | None = None) -> None:
        """Add B samples: h [..., B, S, K], slope: gradient of the loss with drawn labels at h. columns: [units, span],
        in front of it the layers. lengths: of B samples that stand one after the other in h [..., 1, T, K]. If samples
        are not separated (B = 1), the gradient of their sum is squared: its mean is the same, since labels are drawn.
        """
        products = h * slope
        if lengths is not None:
            parts = products.split(lengths, -2)
            products = torch.cat([part.sum(-2, True, dtype=self.gates.dtype) for part in parts], -3)
        by_column = products.sum(-2, dtype=self.gates.dtype)  # [..., B, K]
        place = columns.flatten(-2)[..., None, :].expand(*by_column.shape[:-1], -1)
        self.gates += by_column.gather(-1, place).unflatten(-1, columns.shape[-2:]).sum(-1).square().sum(-2)

    def add_evenly(self, h: Tensor, mask: Tensor) -> None:
        """Add tokens h [..., T, K] whose mask [..., T] is 1, with equal weights for all tokens and outputs (G = I)."""
        a = mask[..., None].to(self.second.dtype)
        self._add(h.to(self.second.dtype), a, h.dtype)
        self.output.diagonal(dim1=-2, dim2=-1).add_(a.sum((-2, -1))[..., None])

    def _add(self, h: Tensor, a: Tensor, dtype: torch.dtype) -> None:
        """h: numbers of `dtype`, in the precision of the sums."""
        self.weight += a.sum((-2, -1))
        # The same numbers in both sums, or C may have negative eigenvalues.
        root = a.sqrt()
        h = (root * h).to(dtype).to(h.dtype)
        with torch.autocast(h.device.type, enabled=False):  # which multiplies in bf16
            self.first += (root.mT @ h).squeeze(-2)
        for rows in self._panels():
            _add_product(self.second[..., rows, rows.start :], h[..., rows], h[..., rows.start :], dtype)

    def _panels(self) -> Iterator[slice]:
        width = self.second.shape[-1]
        size = -(-width // PANELS) if width >= PANELS * LEAST else max(width, 1)
        yield from (slice(begin, begin + size) for begin in range(0, width, size))

    def scale(self, loss: Tensor) -> None:
        """Make the sums those of so many times the losses with drawn labels and with those of the batches."""
        for total in (self.weight, self.first, self.second, self.output, self.gates):
            total *= loss.square()
        for total in (self.bias_slope, self.slope):
            total *= loss

    def complete(self) -> None:
        """Call it after the last token was added: copies the sums above the diagonal to below it."""
        for rows in self._panels():
            self.second[..., rows.stop :, rows] = self.second[..., rows, rows.stop :].mT


def _add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """total [..., M, N] += left^T right, with left [..., T, M], right [..., T, N], whose elements are of `dtype`."""
    with _products_of(dtype):
        if total.dim() == 2 or len(total) == 1:  # on a CPU one layer at a time is faster with the product of matrices
            left, right, total = (x if x.dim() == 2 else x[0] for x in (left, right, total))
            total.addmm_(left.mT, right)
        else:
            total.baddbmm_(left.mT, right)


@contextlib.contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Products of fp32 matrices whose elements are bf16 numbers multiply in bf16 and add up in fp32, on a CPU."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or not hasattr(settings, "fp32_precision"):
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


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
    if the batch has labels. The model is not changed. The losses are read from the device after the last batch.

    With our `sampled_loss` the result does not depend on how rows are batched and padded, beyond rounding.

    sampled_loss: (outputs, batch, generator) -> mean loss over the rows of the batch, with drawn labels. None: forward
    passes only, with equal weights for all tokens (a_t = 1, G = I). SensibertError for no data, a batch that the model
    cannot run on, a loss that is not finite, or the layout of another model."""
    if layout.sites != sites(model):
        raise SensibertError("collect_factors: layout is that of another model, want layout_of(model)")
    consumers = {site.consumer.parameter: site for site in reversed(layout.sites)}  # a shared layer has several sites
    groups = _Groups(model, list(consumers.values()))
    drawn_loss = loss_of(model, sampled_loss)
    ours = drawn_loss is not sampled_loss  # whose mean may be one over tokens
    # In bf16 on a CPU packed attention is faster than that of padded rows; in fp32 it is slower.
    packs = autocast == torch.bfloat16 and next(model.parameters()).device.type == "cpu"
    rows = PaddedRows(model, bf16=True) if packs else None
    handles, losses = [], Losses()
    tokens: Tensor | int = 0  # of all batches, where the losses are means over tokens
    calls: list[_Call] = []
    for name in consumers:

        def before(module: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if not torch.is_grad_enabled():
                return args
            h = args[0]  # a view, so that its gradient is that of this layer alone; without gradients if all is frozen
            return (h.view_as(h) if h.requires_grad else h.detach().requires_grad_(), *args[1:])

        def after(module: nn.Linear, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            calls.append(_Call(name, args[0], out))

        linear = consumer(model, name)
        handles += [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]
    generator = torch.Generator().manual_seed(seed)
    try:
        with eval_mode(model, autocast) as device, torch.set_grad_enabled(sampled_loss is not None):
            for batch, outputs in passes(rows or model, batches, device):
                lengths = None if rows is None else rows.lengths
                if drawn_loss is None:
                    groups.add_evenly(calls, None if lengths else batch.get("attention_mask"))
                    losses.samples += batch_size(batch)
                else:
                    drawn, given = drawn_loss(outputs, batch, generator), model_loss(outputs, batch)
                    count = terms(outputs, batch) if ours else batch_size(batch)
                    losses.add(drawn, batch_size(batch))
                    tokens = tokens + count if isinstance(count, Tensor) else 0
                    groups.add_gradients(calls, drawn * count, None if given is None else given * count, lengths)
                calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    if not losses.samples:
        raise SensibertError("analyze: batches is empty, want at least one micro-batch")
    losses.check()
    if isinstance(tokens, Tensor):
        groups.scale(losses.samples / tokens.clamp_min(1))
    return groups.factors(losses.samples)


class _Call(NamedTuple):
    """A call of a consumer in a forward pass: y = W h + b."""

    consumer: str
    h: Tensor  # [..., K]
    y: Tensor  # [..., N]


class _Groups:
    """The factors of all consumers. Those of the same sizes share memory, and are added up together."""

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        alike: dict[tuple, list[Site]] = {}
        for site in sites:
            weight = consumer(model, site.consumer.parameter).weight
            key = weight.shape, weight.device, weight.dtype, site.units, site.consumer.span
            alike.setdefault(key, []).append(site)
        self.group_of: dict[str, tuple[int, int]] = {}  # name of a consumer -> (group, number in it)
        self.groups: list[tuple[FisherFactors, Tensor]] = []  # and the columns of their units [L, units, span]
        for ((height, width), device, dtype, units, _), members in alike.items():
            for number, site in enumerate(members):
                self.group_of[site.consumer.parameter] = len(self.groups), number
            columns = torch.stack([unit_columns(site) for site in members]).to(device)
            self.groups.append((FisherFactors(width, height, device, dtype, units, len(members)), columns))

    def factors(self, samples: int) -> dict[str, FisherFactors]:
        for sums, _ in self.groups:
            sums.complete()
        found = {}
        for name, (group, number) in self.group_of.items():
            found[name] = self.groups[group][0][number]
            found[name].samples = samples
        return found

    def scale(self, loss: Tensor) -> None:
        """Make the sums those of so many times the losses."""
        for sums, _ in self.groups:
            sums.scale(loss)

    def add_gradients(self, calls: list[_Call], drawn: Tensor, given: Tensor | None, lengths: list[int] | None) -> None:
        """drawn, given: sums of the losses over the rows of the batch, or its tokens. lengths: of packed rows."""
        outputs, inputs = [call.y for call in calls], [call.h for call in calls]
        grad = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
        slopes = None if given is None else grad(given, outputs, retain_graph=True)
        deltas = grad(drawn, outputs + inputs)
        deltas, gates = deltas[: len(calls)], deltas[len(calls) :]
        for factors, columns, numbers in self._together(calls):
            h, gate, delta = (_stack(each, numbers) for each in (inputs, gates, deltas))
            slope = None if slopes is None else _stack(slopes, numbers).flatten(1, -2)
            apart = h.dim() == 4  # [L, B, S, K]; else [L, T, K], samples are not separated
            factors.add_gates(*((h, gate) if apart else (h[:, None], gate[:, None])), columns, lengths)
            factors.add(h.flatten(1, -2), delta.flatten(1, -2), slope)

    def add_evenly(self, calls: list[_Call], mask: Tensor | None) -> None:
        for factors, _, numbers in self._together(calls):
            h = _stack([call.h for call in calls], numbers)
            if mask is None or mask.numel() != h.shape[1:-1].numel():  # some models remove the padding
                weights = torch.ones(h.shape[:-1], device=h.device)
            else:
                weights = mask.expand(len(h), *mask.shape)
            factors.add_evenly(h.flatten(1, -2), weights.flatten(1))

    def _together(self, calls: list[_Call]) -> Iterator[tuple[FisherFactors, Tensor, list[int]]]:
        """(factors, columns of units, numbers of the calls) of calls that are added up together: one of every consumer
        of a group, or of some that follow one another."""
        turns: dict[tuple, list[tuple[int, int]]] = {}
        seen: Counter[str] = Counter()
        for number, call in enumerate(calls):
            group, member = self.group_of[call.consumer]
            turns.setdefault((group, seen[call.consumer], call.h.shape), []).append((member, number))
            seen[call.consumer] += 1
        for (group, *_), members in turns.items():
            factors, columns = self.groups[group]
            members.sort()
            h = calls[members[0][1]].h
            most = max(1, (TOGETHER_ON_CPU if h.is_cpu else TOGETHER) // max(1, h.numel()))
            while members:
                first = members[0][0]
                run = [n for place, (member, n) in enumerate(members[:most]) if member == first + place]
                part = slice(first, first + len(run))
                yield factors[part], columns[part], run
                del members[: len(run)]


def _stack(tensors: Sequence[Tensor], numbers: list[int]) -> Tensor:
    chosen = [tensors[n].detach() for n in numbers]
    return chosen[0][None] if len(chosen) == 1 else torch.stack(chosen)


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
