"""Training on packed batches in several processes: gradients, weights and logs are those of one process."""

import pytest
import torch

from sensibert.data.batching import Collator
from sensibert.nn.packed_attention import Packing
from sensibert.optim import MaskedAdamW
from sensibert.training.gradient_sum import GradientSum
from sensibert.training.lean_step import LeanStep
from sensibert.training.processes import Processes
from tests.helpers import tiny_model
from tests.training.distributed import PACKED, Training, pack, packed, run
from tests.training.test_fast_loop import rows

HEADS = {"tokens": "TokenClassification", "answers": "QuestionAnswering"}


def gradients(kind, shares, pack) -> tuple[dict[str, torch.Tensor], float]:
    """The sum of the gradients and losses of some shares, in fp64, each by a model of its own."""
    sums, total = {}, 0.0
    for some, part in ((some, part) for some, part in shares if some and part):
        model = tiny_model(head=HEADS.get(kind, "SequenceClassification")).double().train()
        pooling = None if kind in HEADS else "first"
        lean = LeanStep(model, pooling, MaskedAdamW(model.parameters(), lr=1e-3), False, by_row=False)
        batch, lengths = pack(some)
        packing = Packing.of(lengths, batch["input_ids"].numel())
        total += float(lean.passes(batch, packing, lambda outputs, part=part: outputs["loss"] * part))
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                sums[name] = sums.get(name, 0) + weight.grad
    return sums, total


@pytest.mark.parametrize("kind", ["classes", "labels", "tokens", "answers"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_shares_of_a_batch_have_its_gradient_and_loss(kind, count):
    data, batch = rows(20, kind), [3, 17, 8, 0, 11, 5, 2]
    if kind == "tokens":  # one token of most rows, all of one, none of two
        keep = data.per_token["labels"].copy()
        data.per_token["labels"][:] = -100
        for row in (3, 17, 8, 0):
            data.per_token["labels"][data.ends[row]] = keep[data.ends[row]]
        data.per_token["labels"][data.ends[11] : data.ends[12]] = 1
    pack = Collator(0).packer(data, 8)
    ours, loss = gradients(kind, pack.shares(batch, count), pack)
    theirs, whole = gradients(kind, pack.shares(batch, 1), pack)
    assert ours.keys() == theirs.keys() and loss == pytest.approx(whole, rel=1e-12)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12, msg=name)


class Together(Processes):
    """Two processes, of which the other one has these numbers to add."""

    def __init__(self, *given):
        super().__init__(2)
        object.__setattr__(self, "given", list(given))

    def add_up(self, tensor):
        tensor += self.given.pop(0)


def test_a_process_without_gradients_gets_those_of_the_others_and_none_where_nobody_has_one():
    weights = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(3)),
    ]
    weights[0].grad = torch.tensor([1.0, 2.0])
    others = Together(torch.tensor([1, 1, 0], dtype=torch.int32), torch.tensor([10.0, 10, 5, 0.25]), torch.ones(4))
    add_up = GradientSum(weights, others)
    assert add_up(torch.tensor(0.5)) == 0.75
    assert weights[0].grad.tolist() == [11, 12] and weights[1].grad.tolist() == [5] and weights[2].grad is None
    for weight in weights:
        weight.grad = None
    assert add_up(torch.tensor(0.0)) == 1  # the parameters of the first step
    assert weights[0].grad.tolist() == [1, 1] and weights[1].grad.tolist() == [1] and weights[2].grad is None


def test_gradients_in_16_bits_are_added_up_in_32():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    weight.grad = torch.full((1,), 1.0, dtype=torch.bfloat16)
    add_up = GradientSum([weight], Together(torch.ones(1, dtype=torch.int32), torch.tensor([2.0**-9, 2.0**-9])))
    assert add_up(torch.tensor(1.0)) == 1 + 2.0**-9 and weight.grad.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def alone(here):
    (here / "alone").mkdir()
    return packed(Training(here / "alone"))


@pytest.fixture(scope="module")
def both(here, alone):  # whose checkpoints it resumes
    return run("packed", here / "both", 2)


def same_weights(here, ours, theirs, tolerance=1e-7) -> None:
    ours, theirs = (torch.load(here / f"{name}.pt") for name in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", PACKED)
def test_two_processes_take_the_steps_of_one_and_end_with_the_same_bits(here, alone, both, case):
    first, second = (found[case] for found in both)
    assert first == second and first["packed"] and first["step"] == 9
    assert first["to wrap"] and not first["wrapped"]
    tolerance = 0.05 if case == "bf16" else 1e-6
    for name in ("losses", "norms"):
        assert first[name] == pytest.approx(alone[case][name], rel=tolerance), name
    assert first["tokens"] == alone[case]["tokens"]
    assert first["flops per token"] == pytest.approx(alone[case]["flops per token"], rel=0.2)
    if case != "bf16":
        same_weights(here, f"both/{case}", f"alone/{case}")


@pytest.mark.parametrize("step", [2, 4])  # before and after the cut
def test_two_processes_resume_the_checkpoints_of_one_and_one_those_of_two(here, alone, both, step):
    assert both[0][f"from {step}"] == both[1][f"from {step}"]
    resumed = pack(Training(here / "alone"), f"from {step}", checkpoint=here / f"both/classes/checkpoint-{step}")
    for found, name in ((both[0][f"from {step}"], "both"), (resumed, "alone")):
        assert found["packed"] and found["tokens"] == alone["classes"]["tokens"]
        assert found["losses"] == pytest.approx(alone["classes"]["losses"], rel=1e-6)
        same_weights(here, f"{name}/from {step}", "alone/classes")


def test_a_process_that_is_lost_within_a_step_ends_the_others(here):
    (found,) = run("dying_packed", here / "dying", 2, ending=1)
    assert "process 0 lost another one, which ended or did not answer" in found["error"]


def test_rows_are_divided_into_shares_of_about_as_many_tokens():
    data = rows(200)
    pack, batch = Collator(0).packer(data, 8), list(range(3, 67))
    shares = pack.shares(batch, 4)
    assert sorted(row for some, _ in shares for row in some) == batch
    assert [part for _, part in shares] == [len(some) / 64 for some, _ in shares]
    tokens = [pack.tokens(some)[0] for some, _ in shares]
    assert max(tokens) - min(tokens) <= min(data.lengths) and sum(tokens) == pack.tokens(batch)[0]
    assert pack.shares(batch[::-1], 4) == shares
    assert pack.shares([5], 3) == [([5], 1.0), ([], 0.0), ([], 0.0)]
