"""Exactly k survive, and the right k."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from sensibert.ops.select_threshold import OP, select_threshold
from tests.helpers import DTYPES, dtype_id

AWKWARD = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, 5.9e-8, 2.5]
SHAPES = [(3, 9), (), (0, 4), (5,), (16, 8), (2, 0), (2, 3, 4), (1, 65)]


def truth(scores, k):
    """keep, threshold and number of NaN by sorting (score, tensor, index) in Python's own order."""
    order = []
    for t, s in enumerate(scores):
        for i, x in enumerate(s.flatten().tolist()):
            order.append(((1, 0.0) if math.isnan(x) else (0, -x), t, i, x))
    order.sort(key=lambda e: e[:3])
    keep = [torch.zeros(s.numel(), dtype=torch.bool) for s in scores]
    for _, t, i, _ in order[:k]:
        keep[t][i] = True
    threshold = order[k - 1][3] if k else math.inf
    return [m.view(s.shape) for m, s in zip(keep, scores)], threshold, sum(math.isnan(e[3]) for e in order)


def make_scores(dtype, device, shapes=SHAPES):
    """Normal values rounded to quarters, so ties abound within and between tensors, and every awkward value."""
    scores = [(torch.randn(shape) * 4).round().div(4) for shape in shapes]
    for s in scores:
        spots = torch.rand(s.shape) < 0.2
        s[spots] = torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), (int(spots.sum()),))]
    return [s.to(dtype).to(device) for s in scores]


def assert_true(selection, scores, k):
    keep, threshold, num_nan = truth([s.cpu().float() for s in scores], k)
    for t, (ours, want) in enumerate(zip(selection.keep, keep, strict=True)):
        assert ours.dtype == torch.bool and torch.equal(ours.cpu(), want), f"keep[{t}]"
    assert sum(int(m.sum()) for m in selection.keep) == k
    assert selection.threshold.item() == threshold or math.isnan(selection.threshold) and math.isnan(threshold)
    assert math.copysign(1, selection.threshold) == 1 or selection.threshold != 0, "a threshold of -0.0"
    assert selection.num_nan.item() == num_nan and selection.num_nan.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.usefixtures("poisoned_empty")
def test_exactly_k_are_kept_largest_first_then_by_tensor_and_index(share, dtype, device):
    scores = make_scores(dtype, device)
    k = round(share * sum(s.numel() for s in scores))
    assert_true(select_threshold(scores, k), scores, k)


@pytest.mark.usefixtures("poisoned_empty")
def test_every_k_of_a_list_of_mixed_dtypes(device):
    scores = [s.to(DTYPES[i % 3]) for i, s in enumerate(make_scores(torch.float32, device, [(3, 3), (4,), (2, 5)]))]
    for k in range(24):
        assert_true(select_threshold(scores, k), scores, k)


value = st.one_of(st.sampled_from(AWKWARD), st.floats(width=32), st.integers(-2, 2).map(float))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(value, max_size=12), max_size=5), st.data())
def test_any_values_give_the_sorted_answer(lists, data):
    scores = [torch.tensor(x) for x in lists]
    k = data.draw(st.integers(0, sum(map(len, lists))))
    assert_true(select_threshold(scores, k), scores, k)


def test_ties_go_to_the_earlier_tensor_then_the_lower_index():
    a, b = torch.tensor([1.0, 5.0, 1.0]), torch.tensor([1.0, 1.0])
    assert [m.tolist() for m in select_threshold([a, b], 3).keep] == [[True, True, True], [False, False]]
    assert [m.tolist() for m in select_threshold([b, a], 2).keep] == [[True, False], [False, True, False]]


def test_minus_zero_ties_with_zero():
    assert select_threshold([torch.tensor([-0.0, 0.0, -0.0])], 2).keep[0].tolist() == [True, True, False]
    assert math.copysign(1, select_threshold([torch.tensor([-0.0])], 1).threshold) == 1


def test_nan_is_counted_and_kept_only_when_nothing_else_is_left():
    scores = [torch.tensor([math.nan, -math.inf, 2.0, -math.nan])]
    assert select_threshold(scores, 2).keep[0].tolist() == [False, True, True, False]
    last = select_threshold(scores, 3)
    assert last.keep[0].tolist() == [True, True, True, False]
    assert math.isnan(last.threshold) and last.num_nan == 2


def test_nothing_to_select_from_is_a_selection_too(device):
    assert select_threshold([], 0) == ([], math.inf, 0)
    got = select_threshold([torch.empty(0, 3, device=device)], 0)
    assert got.keep[0].shape == (0, 3) and got.num_nan == 0


def test_strided_and_shifted_views_are_read_as_they_look(device):
    base = make_scores(torch.float32, device, [(40, 50)])[0]
    views = [base.t(), base[1::3, ::2], base.flatten()[1:], base[:1].expand(5, -1)]
    got = select_threshold(views, 1000)
    assert_true(got, views, 1000)


def test_scores_with_a_gradient_are_selected_without_one():
    got = select_threshold([torch.nn.Parameter(torch.randn(4, 4))], 5)
    assert not got.threshold.requires_grad and int(got.keep[0].sum()) == 5


def test_registration(device):
    scores = make_scores(torch.float32, device, [(3, 9), (5,)])
    got = select_threshold(scores, 7)
    torch.library.opcheck(torch.ops.sensibert.select_threshold_, (*got, scores, 7))


def test_compiles_without_a_graph_break(device):
    def step(scores):
        got = select_threshold([s * 2 for s in scores], 9)
        return [s * m for s, m in zip(scores, got.keep)], got

    scores = [torch.randn(3, 9, device=device), torch.randn(5, device=device)]
    ours, plain = torch.compile(step, fullgraph=True, backend="aot_eager")(scores), step(scores)
    for got, want in zip(tree_leaves(ours), tree_leaves(plain), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "scores, k, message",
    [
        ([torch.zeros(3)], 4, r"k is 4, want an int in \[0, 3\]"),
        ([torch.zeros(3)], -1, r"k is -1, want an int in \[0, 3\]"),
        ([torch.zeros(3)], 1.0, r"k is 1.0, want a whole number"),
        ([torch.zeros(3)], True, r"k is True, want a whole number"),
        ([], 1, r"k is 1, want an int in \[0, 0\]"),
        ([torch.zeros(3), torch.zeros(3).double()], 1, r"scores\[1\] is torch.float64, want float32, bfloat16 or"),
        ([torch.zeros(3, dtype=torch.int32)], 1, r"scores\[0\] is torch.int32"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], 1, r"scores\[1\] is on meta, want cpu like scores\[0\]"),
    ],
)
def test_a_wrong_argument_is_named(scores, k, message):
    with pytest.raises(ValueError, match="select_threshold: " + message):
        select_threshold(scores, k)


def test_more_scores_than_an_int32_can_count_are_counted():
    with pytest.raises(ValueError, match=r"\[0, 6442450944\]"):
        select_threshold([torch.empty(3, 2**31, device="meta")], 2**33)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def assert_equal(got, want):
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert torch.equal(a.cpu().nan_to_num(7), b.cpu().nan_to_num(7))


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_kernel_is_registered():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(OP, "CUDA"), "the reference serves CUDA tensors"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["awkward", "saliency", "half zeros", "constant", "one bin"])
def test_a_model_on_the_gpu_is_selected_as_on_the_cpu_and_every_time_the_same(kind):
    shapes = [(768, 3072), (3072, 768), (768,), (30522, 64), (1, 3)]
    scores = {
        "awkward": lambda: make_scores(torch.float32, "cpu", shapes),
        "saliency": lambda: [(torch.randn(s) * torch.randn(s)).abs() for s in shapes],
        "half zeros": lambda: [torch.randn(s).relu() for s in shapes],
        "constant": lambda: [torch.ones(s) for s in shapes],
        "one bin": lambda: [1 + torch.rand(s) * 1e-3 for s in shapes],
    }[kind]()
    scores.append(scores[0].bfloat16())
    total, on_gpu = sum(s.numel() for s in scores), [s.cuda() for s in scores]
    for k in (1, total // 3, total // 2, total - 1, total):
        want = select_threshold(scores, k)
        for _ in range(3):
            assert_equal(select_threshold(on_gpu, k), want)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_selection_follows_new_scores():
    scores = [torch.randn(300, 200, device="cuda"), torch.randn(501, device="cuda")]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        select_threshold(scores, 9999)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            held = select_threshold(scores, 9999)
    for _ in range(3):
        for s in scores:
            s.normal_()
        graph.replay()
        assert_equal(held, select_threshold([s.cpu() for s in scores], 9999))


@pytest.mark.gpu
@needs_gpu
def test_more_than_2_to_31_scores_are_selected():
    if torch.cuda.get_device_properties(0).total_memory < 32 << 30:
        pytest.skip("needs 32 GB")
    scores = torch.zeros(2**31 + 99, dtype=torch.bfloat16, device="cuda")
    largest = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 98], device="cuda")
    scores[largest] = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.bfloat16, device="cuda")
    got = select_threshold([torch.ones(7, device="cuda"), scores], 3)
    assert not got.keep[0].any() and got.threshold == 2 and got.keep[1].sum() == 3 and got.keep[1][largest[1:]].all()
    got = select_threshold([scores], 2**31 + 50)  # the last 49 zeros are too many
    assert got.keep[0].sum() == 2**31 + 50 and not got.keep[0][2**31 + 49 : 2**31 + 98].any()
