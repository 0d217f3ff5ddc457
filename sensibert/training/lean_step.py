"""Forward and backward pass of a packed batch with little beside the matrix products.

- bf16 working copies: the encoder runs in bf16 on copies of its weights, which MaskedAdamW writes in its step, so that
  nothing is cast in the passes. Embeddings, head and the weights themselves stay fp32.
- q, k and v are one product.
- On a CPU dropout draws its masks faster, and the gradients of embedding tables are kept by row.

All this is in place only within a pass: callbacks, checkpoints and evaluations see the model as it is.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import base_of, embeddings_of, family_of, layers
from ..models.masks import masks_of
from ..models.packed import PackedModel
from ..nn.dropout import dropout
from ..nn.packed_attention import Packing
from ..optim import MaskedAdamW


class _Fused:
    """The product of one input with several linear layers, computed when the first of them is called."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self._x: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, number: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if x is not self._x:
                self._x, self._parts = x, F.linear(x, self.weight, self.bias).split(self.sizes, -1)
            part = self._parts[number]
            if number == len(self.sizes) - 1:
                self._x, self._parts = None, ()  # frees the memory
            return part

        return forward


class _Table:
    """An embedding table on a CPU whose gradient is added up, zeroed and measured by the rows of the batch.

    weight.grad is dense, with zeros in all other rows."""

    def __init__(self, module: nn.Embedding) -> None:
        self.module, self.weight, self.rows = module, module.weight, torch.empty(0, dtype=torch.int64)

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[nn.Embedding]:
        if not isinstance(module, nn.Embedding) or not module.weight.is_cpu or not module.weight.requires_grad:
            return False
        return not (module.sparse or module.max_norm or module.scale_grad_by_freq or "forward" in module.__dict__)

    def __call__(self, ids: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, ids, self)

    def add(self, ids: Tensor, grad: Tensor) -> None:
        rows, place = ids.unique(return_inverse=True)
        dense = torch.ops.aten.embedding_dense_backward(grad.contiguous(), place, len(rows), -1, False)
        if self.module.padding_idx is not None:
            dense[rows == self.module.padding_idx] = 0
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad.index_add_(0, rows, dense)
        self.rows = torch.cat([self.rows, rows]).unique() if len(self.rows) else rows

    def used(self) -> Tensor:
        """The gradients of the rows of the batch."""
        assert self.weight.grad is not None  # `add` has made it
        return self.weight.grad.index_select(0, self.rows)

    def zero(self) -> None:
        if self.weight.grad is not None:
            self.weight.grad.index_fill_(0, self.rows, 0)
        self.rows = self.rows[:0]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: _Table) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.table.add(ctx.saved_tensors[0], grads[0])
        return None, None, None


@dataclass(frozen=True)
class _Copy:
    """The working copy of a weight: rows of a leaf tensor, which several weights may share."""

    weight: Tensor
    leaf: Tensor
    grad: Tensor  # fp32: memory that is used again in every step
    begin: int | None = None  # None: all of the leaf

    def of(self, leaf: Tensor) -> Tensor:
        return leaf if self.begin is None else leaf.narrow(0, self.begin, len(self.weight))


class LeanStep:
    """Passes of one model at fixed structure; after a cut another one is needed (`fits` tells).

    pooling: of `PackedModel`. bf16: with working copies, which the optimizer writes until `end`. by_row: whether the
    gradients of embedding tables are kept by row on a CPU; those that are added up over processes cannot be."""

    def __init__(
        self, model: nn.Module, pooling: str | None, optimizer: MaskedAdamW, bf16: bool, by_row: bool = True
    ) -> None:
        self.model, self.packed, self.optimizer = model, PackedModel(model, pooling), optimizer
        self.device = next(self.model.parameters()).device
        self.masked = masks_of(self.model) is not None  # its layers have compact weights of their own
        self._autocast = bf16 and self.masked
        self._dtype = torch.bfloat16 if bf16 and not self.masked else None
        self._swaps: list[tuple[dict[str, Any], str, Any]] = []  # (dict of a module, name, value within a pass)
        self._copies: list[_Copy] = []
        self._written: dict[Tensor, Tensor] = {}  # weight -> its working copy, which the optimizer writes
        self._tables: list[_Table] = []
        self._seen = self._structure()
        if self._dtype is not None:
            self._add_working_copies()
        if self.device.type == "cpu":
            self._add_quick_modules(by_row)
        tables = {id(table.weight) for table in self._tables}
        self._others = [weight for weight in self.model.parameters() if id(weight) not in tables]

    def _structure(self) -> list[tuple]:
        """Modules and their classes, parameters, which of them are frozen, configs, and dropout."""
        seen: list[tuple] = []
        for module in self.model.modules():
            config, dropout = getattr(module, "config", None), getattr(module, "attention_dropout", None)
            seen.append((id(module), type(module), id(config), getattr(module, "p", dropout)))
            seen += [(id(weight), weight.requires_grad) for weight in module._parameters.values() if weight is not None]
        return seen

    def fits(self) -> bool:
        """Whether the model is still the one that this was made for."""
        return self._structure() == self._seen

    def _add_working_copies(self) -> None:
        base = base_of(self.model)
        copies: dict[Tensor, _Copy] = {}
        outside = [*embeddings_of(self.model).modules(), *getattr(getattr(base, "pooler", None), "modules", list)()]
        parts = [module for module in base.modules() if not any(module is other for other in outside)]
        for linears in self._alike(parts):
            self._fuse(linears, copies)
        for module in parts:
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                if weight not in copies:
                    leaf = weight.detach().to(torch.bfloat16).requires_grad_(weight.requires_grad)
                    copies[weight] = _Copy(weight, leaf, torch.empty_like(weight))
                self._swaps.append((module._parameters, name, copies[weight].of(copies[weight].leaf)))
        self._copies = list(copies.values())
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for copy in self._copies:
            if id(copy.weight) in held and copy.weight.requires_grad:
                self._written[copy.weight] = copy.of(copy.leaf.detach())
                self.optimizer.set_working_copy(copy.weight, self._written[copy.weight])

    def _alike(self, parts: list[nn.Module]) -> Iterator[list[nn.Linear]]:
        """Plain linear layers with the same input: q, k and v of a layer."""
        for _, layer in layers(self.model):
            produces = family_of(self.model).head.produces
            linears = [m for name in produces if type(m := layer.get_submodule(name)) is nn.Linear]
            plain = all(not m._forward_hooks and "forward" not in m.__dict__ for m in linears)
            kinds = {(m.bias is None, tuple(p.requires_grad for p in m.parameters())) for m in linears}
            if len(linears) == len(produces) > 1 and plain and len(kinds) == 1:
                yield linears

    def _fuse(self, linears: list[nn.Linear], copies: dict[Tensor, _Copy]) -> None:
        sizes = [linear.out_features for linear in linears]

        def joined(weights: Sequence[Tensor]) -> Tensor:
            leaf = torch.cat([w.detach() for w in weights]).to(torch.bfloat16).requires_grad_(weights[0].requires_grad)
            for number, w in enumerate(weights):
                copies[w] = _Copy(w, leaf, torch.empty_like(w), sum(sizes[:number]))
            return leaf

        biases = [linear.bias for linear in linears if linear.bias is not None]
        fused = _Fused(joined([linear.weight for linear in linears]), joined(biases) if biases else None, sizes)
        for number, linear in enumerate(linears):
            self._swaps.append((linear.__dict__, "forward", fused.part(number)))

    def _add_quick_modules(self, by_row: bool) -> None:
        for module in self.model.modules():
            if type(module) is nn.Dropout and not module.inplace and "forward" not in module.__dict__:
                self._swaps.append((module.__dict__, "forward", partial(_quick_dropout, module)))
        holders = Counter(id(w) for module in self.model.modules() for w in module._parameters.values())
        for module in embeddings_of(self.model).modules() if by_row else ():
            if _Table.fits(module) and holders[id(module.weight)] == 1:  # a tied weight has gradients in other rows
                self._tables.append(_Table(module))
                self._swaps.append((module.__dict__, "forward", self._tables[-1]))

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        before = [values.get(name, _ABSENT) for values, name, _ in self._swaps]
        try:
            for values, name, value in self._swaps:
                values[name] = value
            self.packed.dtype = self._dtype
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                yield
        finally:
            self.packed.dtype = None
            for (values, name, _), value in zip(self._swaps, before, strict=True):
                if value is _ABSENT:
                    values.pop(name, None)
                else:
                    values[name] = value

    def passes(self, batch: Mapping[str, Tensor], packing: Packing, loss: Callable[[Any], Tensor]) -> Tensor:
        """Adds the gradients of loss(outputs of the model) to those of the weights. Returns the loss."""
        with self._swapped():
            value = loss(self.packed(batch, packing))
            value.backward()
        if self._copies:
            self._collect()
        return value.detach()

    def _collect(self) -> None:
        """Adds the gradients of working copies to those of their weights."""
        # Others are frozen, or not in the pass.
        used = [(copy, copy.of(copy.leaf.grad)) for copy in self._copies if copy.leaf.grad is not None]
        if not used:
            return
        totals, grads = [copy.grad for copy, _ in used], [grad for _, grad in used]
        if all(copy.weight.grad is None for copy, _ in used):
            torch._foreach_copy_(totals, grads)
            for copy, _ in used:
                copy.weight.grad = copy.grad
        else:  # of another batch of this step
            torch._foreach_add_(totals, grads)
        for copy, _ in used:
            copy.leaf.grad = None

    def total_norm(self) -> Tensor:
        """The 2-norm of all gradients."""
        grads = [weight.grad for weight in self._others if weight.grad is not None]
        grads += [table.used() for table in self._tables if table.weight.grad is not None]
        return nn.utils.get_total_norm(grads)

    def zero_grad(self) -> None:
        for weight in self._others:
            weight.grad = None
        for table in self._tables:
            table.zero()

    def end(self) -> None:
        """The optimizer no longer writes the working copies, unless it has others since (`follow`)."""
        self.optimizer.zero_grad()
        for weight, copy in self._written.items():
            if self.optimizer.working_copy(weight) is copy:
                self.optimizer.set_working_copy(weight, None)


_ABSENT = object()


def _quick_dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return dropout(x, module.p, module.training)
