"""An optimizer step with masks, bf16 working copy and sensitivity in one pass, against the same as separate steps.

python -m pytest bench/bench_masked_adamw.py --benchmark-only -o python_files='bench_*.py'

Half of the weights of every layer are dropped, element by element; each has a working copy, and a score on its own
grid. The rivals mask weights only, not moments, and by a product, which a NaN survives. `compact`: half of the heads
and neurons, and working copies of the kept rows and columns alone. On a CPU: two layers of the model.
"""

from __future__ import annotations

import pytest
import torch
from _harness import DEVICE, copy_us, host_us, measure, record, timed
from problems import MODELS, bert, random_like

from sensibert.core.grid import Grid
from sensibert.ops import gather_kept, masked_adamw
from sensibert.ops.masked_adamw import index_map
from sensibert.ops.masked_linear.kept_index import KeptIndex, kept_index
from sensibert.optim.masked_adamw import MaskedAdamW

BENCH = "bench_masked_adamw"
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SCALED = {"bert-base": bert(768, 2, 3072), "bert-large": bert(1024, 2, 4096)}
CASES = MODELS if DEVICE == "cuda" else {f"{name} 2 layers": SCALED[name] for name in MODELS}


class Problem:
    """Weights, gradients and everything a step with extras touches."""

    def __init__(self, case: str, compact: bool = False) -> None:
        parameters = CASES[case]
        self.params = [torch.nn.Parameter(w, requires_grad=False) for w in random_like(parameters, DEVICE)]
        for p, g in zip(self.params, random_like(parameters, DEVICE, seed=1)):
            p.grad = g
        self.chosen = [t for t, p in enumerate(parameters) if p.name.startswith("layer.") and len(p.shape) == 2]
        self.grids = [parameters[t].grid for t in self.chosen]
        self.weights = [self.params[t] for t in self.chosen]
        self.keep_grids = self.grids if compact else [Grid.element()] * len(self.weights)
        shapes = [grid.shape(*w.shape) for grid, w in zip(self.keep_grids, self.weights)]
        self.keeps = [torch.rand(shape, device=DEVICE) < 0.5 for shape in shapes]
        self.masks = [g.expand(keep, *w.shape) for keep, g, w in zip(self.keeps, self.keep_grids, self.weights)]
        whole = KeptIndex(None, None, None, 1.0, 1.0)  # working copies at full size
        self.kept = [
            kept_index(keep, g, *w.shape) if compact else whole
            for keep, g, w in zip(self.keeps, self.keep_grids, self.weights)
        ]
        self.index = [[kept[axis] for kept in self.kept] for axis in (0, 1)]  # rows, columns, or None
        self.maps = [
            {t: index_map(i, self.params[t].shape[axis]) for t, i in zip(self.chosen, index) if i is not None}
            for axis, index in enumerate(self.index)
        ]
        self.working_copies = gather_kept(self.weights, *self.index, dtype=torch.bfloat16)
        self.scores = [torch.zeros(g.shape(*w.shape), device=DEVICE) for g, w in zip(self.grids, self.weights)]
        for weight, mask in zip(self.weights, self.masks):
            weight.mul_(mask)
            weight.grad.mul_(mask)
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.steps = [torch.tensor(1.0, device=DEVICE) for _ in self.params]
        self.lr = torch.tensor([SETTINGS["lr"]], device=DEVICE)

    def one_pass(self, extras: bool = True, working_copies: bool = True) -> None:
        by_place = {
            "keeps": {t: (keep, grid) for t, keep, grid in zip(self.chosen, self.keeps, self.keep_grids)},
            "working_copies": dict(zip(self.chosen, self.working_copies)) if working_copies else {},
            "row_maps": self.maps[0] if working_copies else {},
            "col_maps": self.maps[1] if working_copies else {},
            "scores": {t: (score, grid) for t, score, grid in zip(self.chosen, self.scores, self.grids)},
        }
        masked_adamw(
            self.params, [p.grad for p in self.params], self.exp_avgs, self.exp_avg_sqs, self.steps, self.lr,
            [0] * len(self.params), betas=[SETTINGS["betas"]], eps=[SETTINGS["eps"]],
            weight_decay=[SETTINGS["weight_decay"]], **(by_place if extras else {}),
        )  # fmt: skip

    def optimizer(self) -> MaskedAdamW:
        """What makes the same steps in a training loop; its third step holds what does not change."""
        optimizer = MaskedAdamW(self.params, **SETTINGS)
        for t, keep, grid, working_copy in zip(self.chosen, self.keeps, self.keep_grids, self.working_copies):
            optimizer.set_keep(self.params[t], keep, grid)
            optimizer.set_working_copy(self.params[t], working_copy, self.maps[0].get(t), self.maps[1].get(t))
        held = zip(self.chosen, self.scores, self.grids)
        optimizer.track({self.params[t]: (score, grid) for t, score, grid in held})
        for _ in range(3):
            optimizer.step()
        return optimizer

    def separate(self, optimizer: torch.optim.Optimizer) -> None:
        products = torch._foreach_mul(self.weights, [w.grad for w in self.weights])
        torch._foreach_abs_(products)
        for score, product, grid in zip(self.scores, products, self.grids):
            rows, cols = grid.block_size(*product.shape)
            score += product.view(len(product) // rows, rows, -1, cols).sum((1, 3))
        optimizer.step()
        torch._foreach_mul_(self.weights, self.masks)
        for working_copy, weight, rows, cols in zip(self.working_copies, self.weights, *self.index):
            weight = weight if rows is None else weight.index_select(0, rows)
            working_copy.copy_(weight if cols is None else weight.index_select(1, cols))

    def pass_and_gather(self) -> None:
        """What a step costs that does not write the compact working copies itself."""
        self.one_pass(working_copies=False)
        gather_kept(self.weights, *self.index, out=self.working_copies)

    def num_bytes(self, extras: bool) -> int:
        moved = 28 * sum(p.numel() for p in self.params)
        if extras:
            moved += sum(2 * s.numel() + k.numel() for s, k in zip(self.working_copies, self.keeps))
        # Of a dropped row or column w, g, m and v are not read.
        return moved - sum(16 * round((1 - kept.density) * w.numel()) for kept, w in zip(self.kept, self.weights))


def prove(case: str, compact: bool = False) -> None:
    """Both ways from the same start give the same weights, working copies and scores."""
    ours, theirs = (torch.manual_seed(0) and Problem(case, compact) for _ in range(2))
    ours.one_pass()
    theirs.separate(torch.optim.AdamW(theirs.params, **SETTINGS))
    for mine, other in zip([*ours.params, *ours.working_copies], [*theirs.params, *theirs.working_copies]):
        torch.testing.assert_close(mine, other, rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    for mine, other in zip(ours.scores, theirs.scores):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_step_with_masks_working_copy_and_score(case, benchmark):
    prove(case)
    problem = Problem(case)
    ours = timed(benchmark, problem.one_pass, [()])  # the state of a model is many times L2
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(problem.params, **SETTINGS, **{kind: True})
        rival = measure(problem.separate, [(optimizer,)]).median
        record(BENCH, case, "us", ours.median, "us", f"{kind} AdamW + mask + cast + score", rival)
    if DEVICE == "cuda":
        held, once = host_us(problem.optimizer().step, (), calls=50), host_us(problem.one_pass, (), calls=20)
        record(BENCH, case, "host_us", held, "us", "one call, not held", once)
    copy = copy_us(problem.num_bytes(extras=True))
    record(BENCH, case, "copy_share", copy / ours.median, "1", "copy of the same bytes", 1.0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_step_with_compact_working_copies(case, benchmark):
    prove(case, compact=True)
    problem = Problem(case, compact=True)
    ours = timed(benchmark, problem.one_pass, [()]).median
    gathered = measure(problem.pass_and_gather, [()]).median
    record(BENCH, f"{case} compact", "us", ours, "us", "one pass, then gather_kept", gathered)
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(problem.params, **SETTINGS, **{kind: True})
        rival = measure(problem.separate, [(optimizer,)]).median
        record(BENCH, f"{case} compact", "us", ours, "us", f"{kind} AdamW + mask + gather + cast + score", rival)
    copy = copy_us(problem.num_bytes(extras=True))
    record(BENCH, f"{case} compact", "copy_share", copy / ours, "1", "copy of the same bytes", 1.0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_step_without_extras(case, benchmark):
    problem = Problem(case)
    ours = timed(benchmark, problem.one_pass, [(False,)])
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(problem.params, **SETTINGS, **{kind: True})
        record(BENCH, f"{case} plain", "us", ours.median, "us", f"{kind} AdamW", measure(optimizer.step, [()]).median)
    copy = copy_us(problem.num_bytes(extras=False))
    record(BENCH, f"{case} plain", "copy_share", copy / ours.median, "1", "copy of the same bytes", 1.0)
