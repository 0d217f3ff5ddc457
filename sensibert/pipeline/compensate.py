"""Model, plan and micro-batches -> the same model with its consuming weights solved anew, before the cut.

What the dropped units of a site gave to its output, the kept ones take over as well as a linear map can. With the
unit activations h [K], the consuming weight W [N, K] and bias b [N], over all tokens t

    minimise over W' (zero outside the kept columns S), b':   sum_t a_t |W h_t + b - W' h_t - b'|^2
    W'_S = W_S + W_D C_DS (C_SS + damp I)^-1,   b' = b + (W - W') mean(h),   C, mean: moments of h weighted by a_t

a_t is the squared gradient of the loss at the output of token t (labels sampled from the model's prediction): tokens
the loss does not look at do not count. Least squares as in OBS (Hassibi & Stork, 1993) and K-prune (arXiv 2308.03449);
the weights are the output side of the Kronecker-factored curvature (Martens & Grosse, arXiv 1503.05671), by its trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..artifacts import Plan, Site
from ..errors import SensibertError
from ..models import base_of, evaluating
from ..models.base import attribute

DAMP = 1e-2  # of the mean variance of the kept activations


class Moments:
    """Weighted sums over tokens of one consuming weight's input h [K]: of a, a h and a h h^T."""

    def __init__(self, width: int, device: torch.device):
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, h: Tensor, grad: Tensor) -> None:
        """h [..., K] and the gradient at the output [..., N] of the same tokens."""
        h, grad = (t.flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32)) for t in (h, grad))
        a = grad.square().sum(-1, keepdim=True)
        self.weight += a.sum()
        self.first += (a * h).sum(0)
        self.second += h.T @ (a * h)

    def around(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """mean [K] and covariance [K, K]; around 0 where no bias could take up the mean."""
        mean = self.first / self.weight if bias is not None else torch.zeros_like(self.first)
        return mean, self.second / self.weight - mean[:, None] * mean


def input_moments(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Mapping[str, Tensor]],
    sampled_loss: Callable,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, Moments]:
    """Consuming weight -> moments of its input, for the sites that the plan cuts; one pass forward and back a batch."""
    base, found, handles, seen = base_of(model), {}, [], []
    for name in dict.fromkeys(site.consumer.parameter for site in _cut(plan)):  # a layer used many times has many sites
        linear = attribute(base, name.removesuffix(".weight"))
        found[name] = Moments(linear.in_features, linear.weight.device)

        def watch(module: nn.Module, args: tuple[Tensor], out: Tensor, moments: Moments = found[name]) -> Tensor:
            out = out if out.requires_grad else out.requires_grad_()  # a frozen encoder
            seen.append((moments, args[0].detach(), out))
            return out

        handles.append(linear.register_forward_hook(watch))
    generator = torch.Generator().manual_seed(seed)
    try:
        with evaluating(model, autocast) as device:
            for batch in batches:
                batch = {name: value.to(device) for name, value in batch.items()}
                loss = sampled_loss(model(**batch), batch, generator)
                grads = torch.autograd.grad(loss, [out for *_, out in seen], allow_unused=True, materialize_grads=True)
                for (moments, h, _), grad in zip(seen, grads, strict=True):
                    moments.add(h, grad)
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def compensate(model: nn.Module, plan: Plan, moments: Mapping[str, Moments], damp: float = DAMP) -> None:
    """Solve the consuming weights of the cut sites anew, in place; dropped columns stay for `trim` to remove.

    SensibertError if the loss has no gradient or an activation is not finite."""
    for site in _cut(plan):
        linear = attribute(base_of(model), site.consumer.parameter.removesuffix(".weight"))
        mean, covariance = moments[site.consumer.parameter].around(linear.bias)
        if not covariance.isfinite().all():
            raise SensibertError(f"compensate: the moments of {site.name} are not finite, want data and a finite loss")
        kept = site.consumer.index(plan.kept(site.name).to(mean.device), site.units)
        drop = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
        drop[kept] = False
        old, shift = linear.weight[:, drop].double(), mean[drop]
        if len(kept):
            inner = covariance[kept][:, kept]
            inner.diagonal().add_(damp * inner.diagonal().mean())
            taken = torch.linalg.solve(inner, covariance[kept][:, drop])  # [kept, dropped]
            linear.weight[:, kept] += (old @ taken.T).to(linear.weight.dtype)
            shift = shift - taken.T @ mean[kept]
        if linear.bias is not None:
            linear.bias += (old @ shift).to(linear.bias.dtype)


def _cut(plan: Plan) -> list[Site]:
    return [site for site in plan.layout.sites if not plan.keep[site.name].all()]
