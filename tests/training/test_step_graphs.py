"""Steps as graphs, with a capture that records the function and runs it at each replay; on a GPU, with CUDA graphs."""

import logging

import pytest
import torch

from sensibert.nn.packed_attention import Packing
from sensibert.training import fast_loop
from sensibert.training.fast_loop import FastTrainer
from sensibert.training.step_graphs import StepGraphs
from tests.data.test_packing import features
from tests.helpers import tiny_model
from tests.training.test_fast_loop import assert_same_weights, losses, rows, train, trimming


class Recorder:
    """Stands for CUDA graphs: a capture runs nothing, a replay runs what was captured."""

    def __init__(self, fails=False):
        self.captures, self.replays, self.fails = 0, 0, fails

    def __call__(self, function):
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        self.captures += 1
        results = torch.zeros(()), torch.zeros(())

        def replay():
            self.replays += 1
            for mine, new in zip(results, function(), strict=True):
                mine.copy_(new)

        return replay, results


def batch(value, tokens=8):
    return {"x": torch.full((1, tokens), float(value))}, Packing.of([5, 2], tokens, max_length=5)


def test_a_shape_runs_then_is_captured_then_replayed_on_the_same_memory():
    seen, recorder = [], Recorder()

    def step(inputs, packing):
        seen.append((inputs["x"].data_ptr(), packing.cu_seq_lens.data_ptr(), float(inputs["x"].sum())))
        return inputs["x"].sum(), inputs["x"].max()

    graphs = StepGraphs(step, recorder)
    for value in (1, 2, 3, 4):
        assert [float(part) for part in graphs(*batch(value))] == [8 * value, value]
    assert (recorder.captures, recorder.replays) == (1, 3)
    assert len({addresses for *addresses, _ in map(list, seen[1:]) for addresses in [tuple(addresses)]}) == 1
    graphs(*batch(5, tokens=16))
    assert recorder.captures == 1  # another shape, seen once


def test_a_failed_capture_leaves_steps_as_they_are_and_says_so(caplog):
    ran = []

    def step(inputs, packing):
        ran.append(float(inputs["x"].sum()))
        return inputs["x"].sum(), inputs["x"].max()

    graphs = StepGraphs(step, Recorder(fails=True))
    with caplog.at_level(logging.WARNING, "sensibert"):
        for value in (1, 2, 3):
            graphs(*batch(value))
    assert ran == [8, 16, 24]  # no step was lost or taken twice
    (record,) = caplog.records
    assert (
        "without CUDA graphs (RuntimeError: CUDA error: operation not permitted when stream is capturing)"
        in record.message
    )


def even_rows(count):
    """Rows of one length: the indices of attention on a CPU, which a graph of a GPU does not have, stay the same."""
    return features([6] * count, labels=[i % 2 for i in range(count)])


@pytest.fixture
def recorded(monkeypatch):
    made = []

    def capture():
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(fast_loop, "cuda_capture", capture)
    monkeypatch.setattr(FastTrainer, "_captures", lambda self: True)
    return made


def test_a_run_ends_in_the_same_weights_and_captures_anew_after_the_cut(tmp_path, recorded):
    models = [tiny_model().double() for _ in range(2)]
    graphed = train(tmp_path / "graphs", models[0], even_rows(80), "on", [trimming()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastTrainer, "_captures", lambda self: False)
        plain = train(tmp_path / "plain", models[1], even_rows(80), "on", [trimming()])
    assert_same_weights(*models, tolerance=1e-6)  # the rate is a float32 tensor
    assert losses(graphed) == pytest.approx(losses(plain), rel=1e-4)
    assert len(recorded) == 2 and all(recorder.captures for recorder in recorded)
    assert sum(recorder.replays for recorder in recorded) > 0.5 * graphed.state.global_step
    assert all(isinstance(group["lr"], float) for group in graphed.optimizer.param_groups)
    assert [entry["learning_rate"] for entry in graphed.state.log_history[:-1]] == pytest.approx(
        [entry["learning_rate"] for entry in plain.state.log_history[:-1]]
    )


def test_a_last_batch_of_fewer_rows_and_accumulated_batches_run_as_they_are(tmp_path, recorded):
    for changed in ({}, {"gradient_accumulation_steps": 2}):
        models = [tiny_model().double() for _ in range(2)]
        train(tmp_path / "graphs", models[0], even_rows(43), "on", **changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FastTrainer, "_captures", lambda self: False)
            train(tmp_path / "plain", models[1], even_rows(43), "on", **changed)
        assert_same_weights(*models, tolerance=1e-6)
    assert recorded[0].captures and not recorded[1].captures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_cuda_graphs_learn_what_plain_steps_learn(tmp_path, bf16):
    models = [tiny_model(num_attention_heads=4, hidden_size=64).cuda() for _ in range(2)]
    graphed = train(tmp_path / "graphs", models[0], rows(160), "on", [trimming()], use_cpu=False, bf16=bf16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastTrainer, "_captures", lambda self: False)
        train(tmp_path / "plain", models[1], rows(160), "on", [trimming()], use_cpu=False, bf16=bf16)
    assert graphed._graphs is None
    assert_same_weights(*models, tolerance=1e-2 if bf16 else 1e-4)
