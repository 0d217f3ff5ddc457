"""The binding of masked_adamw, run without a GPU: built for the CPU machine, registered for CPU tensors in a process of
its own, and held against the Python reference through the dispatcher. What only a GPU has is replaced in its text."""

from .bindings import passes

PROGRAM = """
import torch
from sensibert.ops.masked_adamw import reference
from tests.native.through_binding import refused
from tests.ops.test_masked_adamw import op_arguments
op = torch.ops.sensibert.masked_adamw_

def flat(arguments):
    return [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]

torch.manual_seed(0)
start = op_arguments()
clone = lambda: tuple([t.clone() if isinstance(t, torch.Tensor) else t for t in a] if isinstance(a, list)
                      else a.clone() if isinstance(a, torch.Tensor) else a for a in start)
ours, theirs = clone(), clone()
op(*ours)
reference(*theirs)
for a, b in zip(flat(ours), flat(theirs)):
    torch.testing.assert_close(a, b)
assert any(not torch.equal(a, b) for a, b in zip(flat(ours), flat(start))), "nothing was written"
torch.library.opcheck(op.default, clone())

def wrong(index, value, message):
    arguments = list(clone())
    arguments[index] = value(arguments[index])
    refused(message, op, *arguments)

# Held, then run: the same bits wherever parameters and gradients are, and False where something does not fit.
def run(arguments, held, params=None, grads=None, lr=None):
    params, grads, lr = params or arguments[0], grads or arguments[1], arguments[5] if lr is None else lr
    return torch.ops.sensibert.masked_adamw_run_(held, params, grads, lr, arguments[11])

hold = lambda a: torch.ops.sensibert.masked_adamw_hold(*a[2:5], *a[6:11], *a[12:])
again = clone()
op(*ours)
held = hold(again)
for _ in range(2):
    assert run(again, held, grads=[again[1][0].t().contiguous().t(), *again[1][1:]])
for a, b in zip(flat(again), flat(ours)):
    assert torch.equal(a, b)
before = [t.clone() for t in flat(again)]
assert not run(again, held, params=again[0][1:])
assert not run(again, held, params=[again[0][0].view(7, 5), *again[0][1:]])
assert not run(again, held, grads=[again[1][0].double(), *again[1][1:]])
assert not run(again, held, lr=again[5].double())
moment = again[2][0].data
again[2][0].data = torch.zeros(3)
assert not run(again, held)
again[2][0].data = moment
assert all(torch.equal(a, b) for a, b in zip(flat(again), before)), "something was written"
assert run(again, held)
again[12][0].zero_()
again[2][0].data = torch.ones_like(moment)
assert run(again, held) and (again[2][0] == 0).all(), "the moment is written where it is now"

# The optimizer on top of it, in fp32 as on a GPU: held in all but the first step after a change.
import tests.optim.test_masked_adamw as optim
import tests.optim.test_state as state
from sensibert.ops.masked_adamw import HeldAdamW
rates, ran = optim.MaskedAdamW._lr_on, []
optim.MaskedAdamW._lr_on = lambda self, device, dtype: rates(self, device, torch.float32)
run_held = HeldAdamW._run
HeldAdamW._run = lambda self, *given: ran.append(run_held(self, *given)) or ran[-1]

def held(change):
    assert ran and all(ran) == ("with gaps" not in change) and 2 <= len(ran) <= 3, (change, ran)
    ran.clear()

optim.changed_between_steps("cpu", held)
optim.test_a_moment_that_no_longer_fits_is_named_at_any_step("cpu")
state.test_a_replaced_state_is_not_kept_alive()

wrong(1, lambda grads: grads[1:], "a list has 5 entries, want 6")
wrong(1, lambda grads: [grads[0][:4], *grads[1:]], "grad[0] is not 35 contiguous elements")
wrong(2, lambda moments: [moments[0].t().contiguous().t(), *moments[1:]], "exp_avg[0] is not 35 contiguous elements")
wrong(4, lambda steps: [steps[0].double(), *steps[1:]], "step[0] is not 1 contiguous elements")
wrong(5, lambda lr: lr.double(), "lr[0] is not 2 contiguous elements of the documented dtype")
wrong(6, lambda groups: [7, *groups[1:]], "group[0] is 7")
wrong(12, lambda keep: [keep[0][1:]], "keep[0] is not 5 contiguous elements")
wrong(13, lambda of: [6], "keep_of holds 6, of 6")
wrong(15, lambda given: [given[0], given[1][:, :2]], "working_copy[1] is not")
wrong(15, lambda given: [given[0], given[1].view(-1)], "working_copy[1] has a map, but is not a matrix")
wrong(15, lambda given: [given[0], given[1].new_zeros(6, 3)], "working_copy[1] is not of the shape that its maps leave")
wrong(17, lambda maps: [maps[0][1:]], "row_map[0] is not 5 contiguous elements")
wrong(19, lambda maps: [maps[0].long()], "col_map[0] is not 7 contiguous elements")
wrong(20, lambda of: [6], "col_map_of holds 6, of 6")
wrong(24, lambda reduce: "sum", "reduce is sum")
print("passed")
"""


def test_the_binding_agrees_with_the_reference_and_refuses_what_would_read_out_of_bounds(binding):
    passes(binding("masked_adamw"), PROGRAM)
