"""Fixtures every test may use. Environment first: torch and transformers read it when they are imported."""

import functools
import gc
import logging
import os
import sys
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they bring
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The test runs once on the CPU and, where there is one, once on the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_sync():
    """Nothing waits for the disk: tests that look at synced files have their own function, or their own process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage():
    """Imported libraries are half a million objects that live to the end. Each Trainer collects garbage, and each trim
    looks through all objects: they need not look at these."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session", autouse=True)
def few_latencies():
    """One measured pass of every model, over a few tokens, where the time does not matter, and no process of its own
    for the memory that it takes; the test that looks at the memory asks for `peak_memory`. For the session: the runs of
    module fixtures are timed too, and a test may undo its own patches before its last run."""
    with pytest.MonkeyPatch.context() as patch:
        if not {"tests.runs", "sensibert.deploy.bench"}.isdisjoint(sys.modules):  # else nothing is timed
            from sensibert.deploy import bench, opened
            from tests.helpers import FEW_LATENCIES

            for name, value in FEW_LATENCIES.items():
                patch.setattr(bench, name, value)
            patch.setattr(opened, "IDLE_S", 0)
        yield


@pytest.fixture
def peak_memory(monkeypatch):
    """For a test that needs the memory of a model measured."""
    from sensibert.deploy.peak_memory import peak_mb

    monkeypatch.setattr("sensibert.deploy.bench.peak_mb", peak_mb)


@pytest.fixture
def poisoned_empty():
    """Every torch.empty, empty_like, new_empty and resize_ comes filled with NaN (integers: their largest value),
    so that a result that was never written cannot pass by luck."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


@pytest.fixture(scope="module")
def no_pictures():
    """Drawing takes longer than a tiny run; the tests that look at what is drawn ask for `report`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sensibert.run_output.write_report", lambda *args: [])
        yield


@pytest.fixture
def report(monkeypatch):
    """For a test that needs the pictures of a run drawn."""
    from sensibert.report import write_report

    monkeypatch.setattr("sensibert.run_output.write_report", write_report)


@pytest.fixture
def sizes_of_weights(monkeypatch):
    """The size of model.safetensors stands for that of a graph: no graphs of probes."""
    from sensibert.deploy import costs

    measured = costs.costs_of
    monkeypatch.setattr(costs, "costs_of", lambda models, target: measured(models, replace(target, runtime="torch")))


@pytest.fixture(scope="session")
def one_table_of_onnx_ops():
    """torch.onnx reads the sources of 500 functions for each export, a sixth of its time for so small a model."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def steps(monkeypatch):
    """The steps that were trained, one number each."""
    from sensibert.callback import TrimCallback

    trained, step_end = [], TrimCallback.on_step_begin

    def counts(self, args, state, control, **kwargs):
        trained.append(state.global_step + 1)
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(TrimCallback, "on_step_begin", counts)
    return trained


@pytest.fixture
def analyses(monkeypatch):
    """How often a model was analyzed."""
    from sensibert import decide as deciding

    found, collect = [], deciding.collect_factors
    monkeypatch.setattr(deciding, "collect_factors", lambda *args: (found.append(1), collect(*args))[1])
    return found


@pytest.fixture(autouse=True)
def usual_logging():
    """What a test, a fixture or a library it calls changed of the logging, it changed for no other test."""
    logging.getLogger("sensibert").setLevel(logging.NOTSET)
    logging.disable(logging.NOTSET)
