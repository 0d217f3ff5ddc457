"""`sensibert bench`: one row a model and runtime, passes in turn."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from sensibert.core.errors import SensibertError
from sensibert.deploy import bench, measure
from sensibert.models import layout_of
from sensibert.trimming.trim import trim
from tests import runs
from tests.fresh import python_in_fork
from tests.helpers import tiny_model
from tests.plans import random_plan

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("bench")
    model = runs.model_folder(here / "model", head="SequenceClassification", num_hidden_layers=1)
    runs.command("export", model, "--int8", "--output", here / "onnx")
    runs.command("export", model, "--to", "torch", "--output", here / "torch")
    return [model, str(here / "onnx"), str(here / "torch")]


def test_every_file_of_a_folder_is_timed(folders):
    threads = torch.get_num_threads()
    done = runs.command("bench", *folders, "--threads", 1, "--rounds", 3, "--length", 8, "--json")
    assert done.code == 0 and torch.get_num_threads() == threads
    rows, machine = done.json["rows"], done.json["machine"]
    assert [row["runtime"] for row in rows] == ["torch", "onnx", "onnx int8", "torch.export"]
    assert [row["folder"] for row in rows] == [folders[0], folders[1], folders[1], folders[2]]
    for row in rows:
        assert row["mb"] > 0 and row["load_s"] > 0
        for spread in (row["batch_1_ms"], row["batch_32_ms"]):
            assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
    assert rows[2]["mb"] < rows[1]["mb"] and machine["threads"] == 1 and machine["processor"]
    lines = done.out.splitlines()
    assert "batch 32: ms" in lines[0] and all(row["runtime"] in line for row, line in zip(rows, lines[2:]))
    assert f"{machine['processor']}, 1 thread, texts of 8 tokens" in done.out


@pytest.mark.parametrize("number", [0, 1])
def test_the_memory_of_a_model_is_that_of_a_process_of_its_own(folders, peak_memory, number, monkeypatch):
    if number:  # the first one starts python
        monkeypatch.setattr("sensibert.deploy.peak_memory.subprocess", SimpleNamespace(run=python_in_fork))
    (place, *_) = bench.places_in(folders[number])
    assert bench.peak_mb(place, 8, 1) > 0


def test_texts_that_the_models_have_no_positions_for_are_refused(folders):
    for folder in folders:
        done = runs.command("bench", folder, "--length", 100_000)
        assert done.code == 2 and "length is 100000, want at most " in done.err and folder in done.err


def test_a_trimmed_model_is_timed_against_the_untrimmed_one_and_neither_is_the_one_that_was_trained(monkeypatch):
    model, seen = tiny_model(max_position_embeddings=16), []
    before = type(model), copy.deepcopy(model.config)
    trim(model, random_plan(layout_of(model)))
    model.forward = None  # as a Trainer changes it for mixed precision
    monkeypatch.setattr(bench, "_times", lambda entries, *_: seen.append(entries) or [[1.0]] * len(entries))
    found = bench.against_untrimmed(model, *before)
    times = {"before": 1.0, "after": 1.0}
    assert found["latency"] == {"threads": 1, "length": 16, "batch_1_ms": times, "batch_32_ms": times}
    untrimmed, trimmed = (entry.model for entry in seen[0])
    assert found["mb_before"] == round(4e-6 * sum(p.numel() for p in untrimmed.parameters()), 3)
    assert (
        layout_of(untrimmed).sites == layout_of(tiny_model()).sites
        and layout_of(trimmed).sites == layout_of(model).sites
    )


def test_a_time_limit_ends_the_rounds_and_one_pass_is_always_measured():
    models = {"a": tiny_model(), "b": tiny_model()}
    assert all(value > 0 for value in bench.side_by_side(models, limit_s=0)["batch_32_ms"].values())


def test_models_take_turns_and_the_second_pass_of_each_is_measured(folders, monkeypatch):
    turns = []
    forward = torch.nn.Module.__call__

    def noted(module, *args, **kwargs):
        if "input_ids" in kwargs and type(module).__name__ in ("BertForSequenceClassification", "Graph"):
            turns.append((type(module).__name__, tuple(kwargs["input_ids"].shape)))
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", noted)
    measure(folders[:2], length=4, rounds=2)
    one = [(name, (1, 4)) for name in ("BertForSequenceClassification", "Graph", "Graph") for _ in range(2)]
    assert turns == 2 * one + [(name, (32, 4)) for name, _ in 2 * one]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rounds", 0], "rounds is 0, want at least 1"),
        (["--length", -1], "length is -1, want at least 1"),
        (["--threads", 0], "threads is 0, want at least 1"),
        ([], "holds no model and no graph, want a folder of finetune, trim or export"),
    ],
)
def test_bad_input_is_refused_in_words(options, message, tmp_path):
    done = runs.command("bench", tmp_path, *options)
    assert done.code == 2 and message in done.err


def test_a_file_of_torch_export_that_names_no_inputs_is_refused(tmp_path):
    file = tmp_path / "torch" / "model.pt2"
    file.parent.mkdir()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), file)
    runs.model_folder(tmp_path / "model")
    (tmp_path / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    with pytest.raises(SensibertError, match="model.pt2 does not name its inputs, want a file of sensibert export"):
        measure([str(tmp_path)])


def test_a_broken_graph_is_named(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "broken")
    file = tmp_path / "broken" / "onnx" / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    done = runs.command("bench", tmp_path / "broken")
    assert done.code == 2 and f"{file}: onnx cannot open it (" in done.err and len(done.err.splitlines()) == 1


def test_one_pass_has_no_spread():
    assert bench._spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}
