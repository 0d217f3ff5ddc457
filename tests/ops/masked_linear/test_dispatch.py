"""The choice of path is a pure function: every rule, its reason, and what force() may override."""

import re

import pytest
import torch

from sensibert.core.grid import Grid
from sensibert.ops.masked_linear import dispatch as paths
from sensibert.ops.masked_linear.dispatch import Problem, architecture, choose, refusal
from sensibert.ops.masked_linear.op import force, masked_linear

OWN = frozenset({"tiles", "bits"})
FFN = Problem(4096, 3072, 768, torch.bfloat16, Grid.block(64, 64), density=0.5, share=1.0, architecture="sm_90")


@pytest.mark.parametrize("architecture", ["cpu", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("measured", [frozenset(), OWN], ids=["unmeasured", "measured"])
@pytest.mark.parametrize(
    "grid,density,share,path",
    [
        (Grid.row(), 1.0, 1.0, "dense"),
        (Grid.block(64, 64), 1.0, 1.0, "dense"),
        (Grid.row(), 0.25, 0.25, "compact"),
        (Grid.columns(64), 0.25, 0.25, "compact"),
        (Grid.tensor(), 0.0, 0.0, "compact"),
    ],
    ids=str,
)
def test_where_little_is_left_all_gpus_decide_alike(grid, density, share, path, architecture, measured):
    row_share = share if grid.block_cols == 0 else 1.0
    problem = FFN._replace(grid=grid, density=density, share=share, architecture=architecture, row_share=row_share)
    choice = choose(problem, measured, built=measured)
    assert choice.path == path and len(choice.reason) > 20


@pytest.mark.parametrize("architecture", ["cpu", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("grid", [Grid.element(), Grid.block(64, 64), Grid.block(4, 4)], ids=str)
def test_scattered_holes_take_a_masked_copy_without_a_kernel_of_our_own(grid, architecture):
    problem = FFN._replace(grid=grid, architecture=architecture)
    assert choose(problem).path == choose(problem, measured=frozenset(), built=OWN).path == "masked"
    assert choose(problem, measured=OWN, built=frozenset()).path == "masked"


def path_of(**change):
    return choose(FFN._replace(**change), measured=OWN, built=OWN).path


def test_a_cpu_leaves_out_what_is_empty_and_masks_the_rest():
    assert path_of(architecture="cpu") == "masked"
    assert path_of(architecture="cpu", share=0.99) == "compact"


def test_own_kernels_are_chosen_where_they_run_and_win():
    assert path_of(density=0.25) == path_of(density=0.25, dtype=torch.float16) == "tiles"
    assert path_of(density=0.9) == path_of(grid=Grid.element()) == path_of(grid=Grid.block(32, 64)) == "bits"
    assert path_of(grid=Grid.element(), part="dw") == "masked"  # bits has none
    assert path_of(grid=Grid.element(), ready=True) == "masked"  # masked already: the plain matmul
    assert path_of(density=0.25, architecture="sm_80") == path_of(density=0.25, dtype=torch.float32) == "masked"
    assert path_of(density=0.25, num_cols=772) == "masked"


ROWS = {"grid": Grid.row(), "density": 0.5, "share": 0.5, "row_share": 0.5}
COLUMNS = {"grid": Grid.column(), "density": 0.5, "share": 0.5}


def test_a_smaller_product_is_worth_it_where_it_saves_more_than_it_costs_to_spread_the_result():
    wide = {"num_tokens": 16384, "num_rows": 4096, "num_cols": 1024}
    assert path_of(**wide, **ROWS) == path_of(**wide, **ROWS, part="dw") == "compact"
    narrow = {"num_tokens": 4096, "num_rows": 768, "num_cols": 768}
    assert path_of(**narrow, **ROWS) == path_of(**narrow, **COLUMNS, part="dx") == "masked"
    assert path_of(**narrow, **COLUMNS) == path_of(**narrow, **ROWS, part="dx") == "compact"  # nothing to spread
    assert path_of(**narrow, **ROWS, ready=True) == "compact"


@pytest.mark.parametrize("path", ["compact", "masked", "tiles"])
@pytest.mark.parametrize("part", ["fwd", "dx", "dw"])
def test_an_estimate_grows_with_the_tokens_and_with_what_is_kept(path, part):
    def time(tokens, kept):
        problem = FFN._replace(num_tokens=tokens, density=kept, share=kept if path == "compact" else 1.0, part=part)
        return paths.estimate(path, problem._replace(row_share=problem.share))

    assert 0 < time(1024, 0.5) < time(4096, 0.5) and time(4096, 0.25) <= time(4096, 0.5)


def test_estimates_by_hand():
    """x, W and y of 1000 x 1000 in 2 bytes: the plain matmul takes `dense`, and a pass over one of them `one`."""
    square = Problem(1000, 1000, 1000, torch.bfloat16, Grid.element(), 0.5, 1.0, "sm_90")
    rows = square._replace(grid=Grid.row(), share=0.5, row_share=0.5)
    columns = square._replace(grid=Grid.column(), share=0.5)
    launch, take, one = 2.5, 4.5, 2e6 / 3.4e6
    dense = 2e9 / 620e6 + launch
    half = take + 1.5 * one  # x or y and its kept half
    for path, problem, us in (
        ("dense", square, dense),
        ("bits", square, 1.03 * dense),
        ("tiles", square, (0.5 + 0.525) * dense + launch),
        ("tiles", square._replace(part="dw"), (0.17 + 0.55) * dense + 18),
        ("masked", square, dense + launch + 3 * one),
        ("masked", square._replace(part="dw"), dense + launch + 3 * one),
        ("masked", square._replace(ready=True), dense),
        ("masked", rows, dense + launch + 2 * one),
        ("masked", rows._replace(ready=True), dense + launch + 2 * one),
        ("masked", rows._replace(part="dx"), 0.5 * dense + half + launch + 2 * one),
        ("masked", columns, 0.5 * dense + half + launch + 2 * one),
        ("compact", rows, 0.5 * dense + half + launch + 2 * one),
        ("compact", rows._replace(ready=True), 0.5 * dense + half),
        ("compact", rows._replace(part="dw"), 0.5 * dense + half + 2 * launch + 1.5 * one),
        ("compact", columns._replace(part="dx"), 0.5 * dense + half + launch + 2 * one),
        ("compact", rows._replace(share=0.25), 0.25 * dense + 2 * half + launch + 1.5 * one),
        ("compact", rows._replace(share=0.0, row_share=0.0), 2 * (take + one) + launch + one),
    ):
        assert paths.estimate(path, problem) == pytest.approx(us), (path, problem)


def test_only_kernels_of_our_own_have_to_be_measured():
    assert paths.MEASURED <= set(paths.KERNELS) <= OWN


@pytest.mark.parametrize(
    "path,change,words",
    [
        ("compact", {}, None),
        ("reference", {}, None),
        ("masked", {}, None),
        ("tiles", {}, None),
        ("bits", {"grid": Grid.element()}, None),
        ("dense", {"density": 1.0}, None),
        ("fast", {}, "unknown, want one of compact, masked"),
        ("dense", {}, "multiplies every weight, but 50% are dropped"),
        ("tiles", {"architecture": "sm_80"}, "needs wgmma, which only sm_90 has; this is sm_80"),
        ("bits", {"architecture": "cpu"}, "needs wgmma, which only sm_90 has; this is cpu"),
        ("tiles", {"dtype": torch.float32}, "needs bfloat16 or float16; this is torch.float32"),
        ("tiles", {"num_cols": 766}, r"multiples of 8 \(TMA strides\); W is \(3072, 766\)"),
        ("tiles", {"grid": Grid.block(64, 32)}, "blocks that are multiples of 64; the grid is 64x32"),
        ("tiles", {"grid": Grid.element()}, "blocks that are multiples of 64; the grid is element"),
        ("tiles", {"grid": Grid.rows(64)}, None),
        ("tiles", {"grid": Grid.columns(128)}, None),
    ],
)
def test_a_refused_path_has_a_reason(path, change, words):
    reason = refusal(path, FFN._replace(**change), built=OWN)
    assert reason is None if words is None else re.search(words, reason)


@pytest.mark.parametrize("path", sorted(OWN))
def test_a_kernel_that_was_not_built_is_refused(path):
    assert refusal(path, FFN) == "needs a kernel that this installation does not have"


def half_dropped():
    keep = torch.tensor([[True], [False]])
    return torch.ones(3, 2), torch.ones(2, 2), None, keep, Grid.row()


def test_force_holds_within_its_block_and_nests():
    problem = FFN._replace(share=0.5)
    with force("reference"):
        assert paths.resolve(problem) == ("reference", "forced")
        with force("compact"):
            assert paths.resolve(problem).path == "compact"
        with force(None):
            assert paths.resolve(problem) == choose(problem)
        assert paths.resolve(problem).path == "reference"
    assert paths.resolve(problem) == choose(problem)


def test_force_ends_with_an_error_inside():
    with pytest.raises(KeyError), force("reference"):
        raise KeyError
    assert paths.resolve(FFN) == choose(FFN)


def test_an_unknown_path_is_refused_at_once():
    with pytest.raises(ValueError, match="force: path is 'fast', want one of compact, masked, bits"), force("fast"):
        pass


@pytest.mark.parametrize("path", ["dense", "tiles", "bits"])
def test_a_forced_path_that_cannot_run_is_an_error_at_the_call(path):
    with force(path), pytest.raises(ValueError, match=f"masked_linear: path '{path}' was forced, but it "):
        masked_linear(*half_dropped())


def test_force_is_an_attribute_of_the_function():
    assert masked_linear.force is force


def test_the_architecture_of_this_machine(device):
    name = architecture(device)
    assert name == "cpu" if device.type == "cpu" else name.startswith("sm_")
