"""AdamW that keeps dropped weights at zero and writes bf16 working copies in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..core.arguments import checked, show
from ..core.errors import SensibertError
from ..core.grid import Grid
from ..ops.masked_adamw import HeldAdamW, matrix_shape
from .compact_weights import CompactWeights

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(eq=False)
class _Held:
    """The step of one device, for these tensors and settings."""

    tensors: list[Tensor | None]
    settings: tuple
    step: HeldAdamW
    rate: torch.dtype

    def fits(self, tensors: list[Tensor | None], settings: tuple) -> bool:
        return settings == self.settings and len(tensors) == len(self.tensors) and all(map(is_, tensors, self.tensors))


class MaskedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with masks: one op call per step for all parameters of all groups.

    Without masks the weights are those of torch.optim.AdamW(fused=True), bit for bit on a CPU. In addition:

    - `set_keep` sets the keep mask of a parameter. Dropped blocks and their moments are exactly 0 after every step.
    - `follow` masks a model's masked layers in the same way, and writes the bf16 matrices that they multiply with.
    - `set_working_copy` makes every step write a bf16 copy of a parameter, or of its kept rows and columns.
    - `track` accumulates the sensitivity of parameters.
    - `clip_grad_norm` scales the gradients of the next step.
    - `grad_factor`, a float32 scalar tensor or None, multiplies every gradient in every step (inverse loss scale).

    A group's lr may be a tensor: then a captured step reads it at each replay. A step does not write gradients, except
    clipped ones on a CPU (`clip_grad_norm`)."""

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if float(lr) < 0 or eps < 0 or weight_decay < 0:
            raise SensibertError(f"MaskedAdamW: lr, eps, weight_decay are {lr}, {eps}, {weight_decay}, want 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise SensibertError(f"MaskedAdamW: betas are {betas}, want each in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._start_unsaved()

    def _start_unsaved(self) -> None:
        self.grad_factor: Tensor | None = None
        self._clip_factor: Tensor | None = None
        self._compact_weights = CompactWeights()
        self._lr: dict[tuple[torch.device, torch.dtype], tuple[list[float], Tensor]] = {}
        self._working_copies: dict[Tensor, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._held: dict[torch.device, _Held] = {}
        self.track({})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "grad_factor" not in self.__dict__:  # after a copy or unpickling; not in load_state_dict
            self._start_unsaved()

    @checked
    def set_keep(self, param: Tensor, keep: Tensor, grid: Grid) -> None:
        """Mask param from the next step on. keep: bool [ceil(N / bn), ceil(K / bk)]; a vector is taken as [N, 1].

        The mask is part of the state dict."""
        self._want_held(param)
        shape = grid.shape(*matrix_shape(param))
        if keep.dtype != torch.bool or tuple(keep.shape) != shape:
            raise SensibertError(f"set_keep: keep is {keep.dtype} {tuple(keep.shape)}, want torch.bool {shape}")
        self.state[param]["keep"] = keep.to(param.device).contiguous()
        self.state[param]["keep_grid"] = (grid.block_rows, grid.block_cols)

    @checked
    def set_working_copy(
        self, param: Tensor, working_copy: Tensor | None, row_map: Tensor | None = None, col_map: Tensor | None = None
    ) -> None:
        """Write the masked value of param to working_copy, bf16 in the shape of param, at every step. None ends this.

        With maps (`index_map`, int32 [N] and [K]) the copy is [n, k], the rows and columns that the maps keep. Not part
        of the state dict."""
        self._held.clear()
        self._working_copies.pop(param, None)
        if working_copy is not None:
            self._want_held(param)
            self._working_copies[param] = (working_copy, row_map, col_map)

    def working_copy(self, param: Tensor) -> Tensor | None:
        """The tensor set by `set_working_copy`, or None."""
        return self._working_copies[param][0] if param in self._working_copies else None

    @checked
    def follow(self, model: nn.Module) -> None:
        """Use the masks of the model's MaskedLinear layers, and write their compact weights in every step from now on.

        A compact weight is the bf16 matrix [n, k] of the kept rows and columns. Under bf16 autocast, or in bf16, the
        layer multiplies with it instead of gathering, casting and masking its weight. Layers whose weight is in no
        param group are ignored.

        If a layer gets new masks (`set_keep`), the next step uses them, also after load_state_dict, and gathers the new
        matrices of all layers in one launch; until then the layers gather from their weights. A layer that is turned
        back into nn.Linear or gets another weight is no longer followed: after a trim, call follow again. Not part of
        the state dict. SensibertError if layers with different masks share a weight."""
        self._compact_weights.follow(self, model)

    @torch.no_grad()
    @checked
    def clip_grad_norm(self, max_norm: float, norm: Tensor | None = None) -> Tensor:
        """Let the next step scale its gradients so that their total 2-norm is at most max_norm; return their norm.

        The weights are those after torch.nn.utils.clip_grad_norm_. On a GPU the gradients keep their values; on a CPU
        the step writes the scaled float32 or float64 gradients back, unless `grad_factor` is set. norm: the total norm
        of the gradients, if it is known."""
        if norm is None:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = nn.utils.get_total_norm(grads)
        if self.grad_factor is not None:
            norm = norm * self.grad_factor.to(norm.device)
        self._clip_factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0).float()
        return norm

    @checked
    def track(
        self,
        scores: Mapping[Tensor, tuple[Tensor, Grid]],
        reduce: str = "abs",
        finish: str = "none",
        decay: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        """From the next step on, add the sensitivity of each param in scores to its fp32 tensor, like
        `block_sensitivity`. It is computed from the weight before the step and the scaled gradient, for kept weights
        only. {} ends this. Not part of the state dict."""
        for param in scores:
            self._want_held(param)
        self._held.clear()
        self._scores: dict[Tensor, tuple[Tensor, Grid]] = dict(scores)
        self._statistic = {"reduce": reduce, "finish": finish, "decay": decay, "scale": scale}

    @property
    def tracks(self) -> bool:
        """Whether a step adds to scores (`track`)."""
        return bool(self._scores)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's overloads say float, yet a closure returns the loss tensor
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._compact_weights.before_step(self)
        entries = [
            (param, grad, number)
            for number, group in enumerate(self.param_groups)
            for param in group["params"]
            if (grad := param.grad) is not None
        ]
        devices = {param.device for param, _, _ in entries}
        for device in devices:
            here = entries if len(devices) == 1 else [entry for entry in entries if entry[0].device == device]
            self._step_on(device, *map(list, zip(*here, strict=True)))
        self._clip_factor = None
        self._compact_weights.after_step(self)
        return loss

    def _step_on(self, device: torch.device, params: list[Tensor], grads: list[Tensor], groups: list[int]) -> None:
        for layout in {grad.layout for grad in grads} - {torch.strided}:
            raise SensibertError(f"MaskedAdamW: a gradient is {layout}, want a dense one")
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        held = self._held_for(device, params, groups, states, steps)
        held.step(grads, self._lr_on(device, held.rate), self._factor_on(device, grads))
        torch.autograd.graph.increment_version(params)  # so that a backward pass that needs the old values raises

    def _factor_on(self, device: torch.device, grads: list[Tensor]) -> Tensor | None:
        """The factor that the op multiplies every gradient by; clipping on a CPU is done here, in place."""
        factors = [factor.to(device) for factor in (self._clip_factor, self.grad_factor) if factor is not None]
        if self._clip_factor is not None and device.type == "cpu":
            if factors[0] == 1:
                del factors[0]  # nothing is clipped
            elif len(factors) == 1 and all(grad.itemsize > 2 for grad in grads):  # the op rounds half precision once
                # Faster than scaled copies inside the step: those are made a piece at a time, with a call for each.
                torch._foreach_mul_(grads, factors.pop())
        return None if not factors else factors[0] if len(factors) == 1 else factors[0] * factors[1]

    def _held_for(
        self, device: torch.device, params: list[Tensor], groups: list[int], states: list[dict], steps: list[Tensor]
    ) -> _Held:
        """The step of the last call, or a new one if a tensor or setting has changed."""
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        keeps = [state.get("keep") for state in states]
        grids = [state.get("keep_grid") for state in states]
        betas = [(float(group["betas"][0]), float(group["betas"][1])) for group in self.param_groups]
        eps, weight_decay = ([float(group[name]) for group in self.param_groups] for name in ("eps", "weight_decay"))
        tensors = [*params, *exp_avgs, *exp_avg_sqs, *steps, *keeps]
        settings = groups, grids, betas, eps, weight_decay
        held = self._held.get(device)
        if held is None or not held.fits(tensors, settings):
            step = HeldAdamW(
                params, exp_avgs, exp_avg_sqs, steps, groups, betas, eps, weight_decay,
                keeps={t: (keep, Grid(*states[t]["keep_grid"])) for t, keep in enumerate(keeps) if keep is not None},
                **self._working_copies_of(params),
                scores={t: self._scores[p] for t, p in enumerate(params) if p in self._scores},
                **self._statistic,
            )  # fmt: skip
            wide = device.type == "cpu" or any(param.dtype == torch.float64 for param in params)
            held = _Held(tensors, settings, step, torch.float64 if wide else torch.float32)
            self._held[device] = held
        return held

    def _working_copies_of(self, params: list[Tensor]) -> dict[str, dict[int, Tensor]]:
        """Working copies, row maps and column maps by position, as the op takes them."""
        held = [(t, self._working_copies[p]) for t, p in enumerate(params) if p in self._working_copies]
        names = ("working_copies", "row_maps", "col_maps")
        return {name: {t: tensor for t, s in held if (tensor := s[i]) is not None} for i, name in enumerate(names)}

    def _lr_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One learning rate per group [G]; copied to the device only if one has changed."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(rate, Tensor) for rate in rates):
            return torch.stack([torch.as_tensor(rate, dtype=dtype, device=device) for rate in rates])
        known = self._lr.get((device, dtype))
        if known is None or known[0] != rates:
            known = self._lr[device, dtype] = rates, torch.tensor(rates, dtype=dtype, device=device)
        return known[1]

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of a MaskedAdamW or a torch.optim.AdamW."""
        self._held.clear()
        super().load_state_dict(state_dict)  # casts state tensors to the dtype of the parameter
        for param, state in self.state.items():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)
            if "keep" in state:
                state["keep"] = state["keep"].to(param.device, torch.bool)

    def forget(self, param: Tensor) -> None:
        """Drop the working copy and score of param, before it is removed from the optimizer."""
        self._held.clear()
        self._working_copies.pop(param, None)
        self._scores.pop(param, None)

    def _want_held(self, param: Tensor) -> None:
        if not any(param is p for group in self.param_groups for p in group["params"]):
            raise SensibertError(f"MaskedAdamW: param {tuple(param.shape)} is in none of the optimizer's param_groups")


def optimizer_cls_and_kwargs(args: TrainingArguments) -> tuple[type[MaskedAdamW], dict[str, Any]]:
    """MaskedAdamW with the settings of a transformers.TrainingArguments: `Trainer(optimizer_cls_and_kwargs=...)`.

    Weights are those of `optim="adamw_torch_fused"`, bit for bit on a CPU."""
    if not hasattr(args, "adam_beta1"):
        raise SensibertError(f"optimizer_cls_and_kwargs: args is {show(args)}, want TrainingArguments")
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    return MaskedAdamW, settings
