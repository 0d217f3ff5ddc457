"""A run reaches the ops: on each grid, what `finetune` calls of `sensibert::...`; together, every public op."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sensibert import ops
from tests import runs
from tests.runs import command

pytestmark = pytest.mark.usefixtures("no_pictures")
# What a run calls on every grid: its optimizer, which also ranks the tensors, and one call for all tensors of the trim
# or for all working copies.
ALWAYS = {"masked_adamw", "gather_kept"}
SCORES_BLOCKS = {"block_sensitivity", "select_threshold", "masked_linear"}
EXPECTED = {"unit": ALWAYS, "element": ALWAYS | SCORES_BLOCKS, "block16": ALWAYS | SCORES_BLOCKS}


class Calls(TorchDispatchMode):
    """Counts the calls of ops of this library, by name."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "sensibert":
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("reached"))


def calls_of(here, output, grid) -> dict[str, int]:
    files = ("--train-file", here / "train.csv", "--model", here / "model", "--output", output)
    requested = ("--grid", grid, "--max-steps", 6, "--batch-size", 8, "--precision", "bf16")
    with Calls() as calls:
        done = command("finetune", *files, *requested)
    assert done.code == 0, done.err
    return calls.counts


def public(name: str) -> str:
    """masked_adamw_ is the op of masked_adamw, and so are masked_adamw_hold and masked_adamw_run_."""
    return next((op for op in PUBLIC if name.rstrip("_") == op or name.startswith(f"{op}_")), name)


PUBLIC = {name for name in ops.__all__ if isinstance(getattr(ops, name), types.FunctionType)}


@pytest.mark.parametrize("grid", EXPECTED)
def test_a_run_reaches_the_ops_of_its_grid(here, tmp_path, grid):
    counts = calls_of(here, tmp_path / "out", grid)
    assert {public(name) for name in counts} == EXPECTED[grid]
    assert counts.get("gather_kept_") == 1  # however many tensors there are
    steps = sum(number for name, number in counts.items() if name in ("masked_adamw_", "masked_adamw_run_"))
    assert steps >= 6


def test_together_they_reach_every_public_op():
    assert set().union(*EXPECTED.values()) == PUBLIC


def test_every_op_of_the_library_belongs_to_a_public_one():
    defined = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "sensibert::" in name
    }
    internal = {"take_columns"}  # called by masked_linear where it has a kernel
    assert {public(name) for name in defined} - internal == PUBLIC
