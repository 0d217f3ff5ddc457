"""A layout without a model, with a sensitivity and plans of it."""

import torch

from sensibert.core.artifacts import BlockPlan, Sensitivity, UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.grid import Grid
from sensibert.core.layout import Flops, Layout, Member, Site, Weight

GRID = Grid.block(4, 16)


def layout() -> Layout:
    up, bias, down = Member("up.weight", 0), Member("up.bias", 0), Member("down.weight", 1)
    fused, out = Member("qkv.weight", 0, 8, parts=3), Member("out.weight", 1, 8)
    sites = (
        Site("layer.0.head", "head", 0, 4, (fused, out), out, 1000, Flops(2000, 32), minimum=1),
        Site("layer.0.ffn", "ffn", 0, 6, (up, bias, down), down, 65, Flops(128)),
        Site("layer.1.ffn", "ffn", 1, 0, (up, bias, down), down, 65, Flops(128)),
    )
    weights = (Weight("up.weight", 0, 6, 32, 2), Weight("out.weight", 0, 32, 32, 2))
    return Layout("bert", "0123456789abcdef", sites, 32, 5000, 9000, Flops(7), Flops(8, 0, 9, 10), weights)


def sensitivity() -> Sensitivity:
    scores = {"layer.0.head": torch.tensor([0.1, -0.0, float("inf"), 1e-42]), "layer.0.ffn": torch.randn(6)}
    return Sensitivity(layout(), scores | {"layer.1.ffn": torch.zeros(0)}, "fisher", 1024, seed=3)


def unit_plan() -> UnitPlan:
    keep = {"layer.0.head": torch.tensor([True, False, True, False]), "layer.0.ffn": torch.arange(6) < 2}
    keep["layer.1.ffn"] = torch.zeros(0, dtype=torch.bool)
    return UnitPlan(layout(), keep, Budget.parse("33.3%flops", "model", 384), "fisher")


def block_plan() -> BlockPlan:
    keep = {w.parameter: torch.ones(GRID.shape(w.rows, w.cols), dtype=torch.bool) for w in layout().weights}
    keep["up.weight"][1, 0] = False  # a block of 2 rows: the last one of 6 rows is short
    keep["out.weight"][:, 1] = False
    return BlockPlan(layout(), keep, Budget.parse("60%params"), "fisher", grid=GRID)
