"""The binding of select_threshold, run without a GPU: built for the CPU machine, registered for CPU tensors in its own
process, it must answer through the dispatcher as the reference does, and refuse what would write out of bounds."""

from .bindings import passes

PROGRAM = """
import torch
from torch.utils._pytree import tree_leaves
from sensibert.ops import select_threshold
op = torch.ops.sensibert.select_threshold_

def step(scores):
    got = select_threshold([s * 2 for s in scores], 700)
    return got, [s * m for s, m in zip(scores, got.keep)]

torch.manual_seed(0)
cube = [torch.ones(2, 2, 2)]
scores = [torch.randn(30, 70), torch.randn(5).half(), torch.randn(9, 9).t()[:, ::2], torch.empty(0, 3), torch.ones(())]
want, nothing, corner = step(scores), select_threshold([], 0), select_threshold(cube, 3)
import tests.native.through_binding
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
for got in (step(scores), compiled(scores)):
    assert all(map(torch.equal, tree_leaves(got), tree_leaves(want)))
assert select_threshold([], 0) == nothing and torch.equal(select_threshold(cube, 3).keep[0], corner.keep[0])

def arguments(**changed):
    empty = lambda *shape, dtype=torch.uint8: torch.empty(shape, dtype=dtype)
    given = {"keep": [empty(3, 9, dtype=torch.bool)], "threshold": torch.empty(()), "num_nan": empty(dtype=torch.int64)}
    return given | {"scores": [torch.randn(3, 9)], "k": 7} | changed

torch.library.opcheck(op.default, tuple(arguments().values()))
for changed, message in [
    ({"scores": [torch.randn(4, 9)]}, "keep[0] is not 36 contiguous elements"),
    ({"scores": [torch.randn(3, 9).double()]}, "scores[0] is of a dtype"),
    ({"scores": []}, "keep has 1 tensors, want 0"),
    ({"keep": [torch.empty(9, 3, dtype=torch.bool).t()]}, "keep[0] is not 27 contiguous elements"),
    ({"threshold": torch.empty((), dtype=torch.float64)}, "threshold[0] is not 1 contiguous elements"),
    ({"k": 28}, "k is 28, want an int in [0, 27]"),
    ({"k": -1}, "k is -1, want an int in [0, 27]"),
]:
    try:
        op(*arguments(**changed).values())
    except RuntimeError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(f"not refused: {message}")
print("passed")
"""


def test_the_binding_answers_as_the_reference_and_refuses_what_does_not_fit(binding):
    passes(binding("select_threshold", "-DSENSIBERT_SELECT_THREADS=64"), PROGRAM)
