"""Programs of ExecuTorch: one text at a time, of a limited length. Most of these tests need the package executorch."""

import json

import pytest
import torch

from sensibert.core.errors import SensibertError
from sensibert.deploy import RUNTIMES, executorch_file, export_graph, graphs
from sensibert.models import layout_of
from sensibert.saving.folder import export, load
from sensibert.trimming.trim import trim
from tests import runs
from tests.plans import random_plan

RUNTIME = RUNTIMES["executorch"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trimmed model with an empty sub-layer, its folder, and the result of its export by the command."""
    pytest.importorskip("executorch.exir")
    folder = tmp_path_factory.mktemp("executorch")
    source = runs.model_folder(folder / "whole", head="SequenceClassification", initializer_range=0.2)
    model, tokenizer = load(source)
    empty = next(site.name for site in layout_of(model).sites if not site.minimum)
    trim(model, random_plan(layout_of(model), 0, empty=(empty,)))
    export(model, folder / "small", tokenizer)
    done = runs.command("export", folder / "small", "--to", "executorch", "--output", folder / "out", "--json")
    assert done.code == 0, done.err
    return model.eval(), folder, done


def test_texts_of_any_length_up_to_the_limit_agree_with_the_model(exported):
    model, folder, done = exported
    assert done.json["files"].keys() == {"model.pte"} and done.json["difference"] < 1e-5
    program = RUNTIME.open(folder / "out" / "model.pte", 1)
    longest = done.json["longest"]
    assert program.longest == longest == graphs.positions(model) and "model.pte" in done.out
    for rows, tokens in ((1, 1), (3, 9), (1, longest)):
        batch = graphs.random_inputs(program.inputs, model.config.vocab_size, rows, tokens, seed=tokens)
        torch.testing.assert_close(program(**batch)["logits"], model(**batch).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and "sensibert" not in config
    assert (folder / "out" / "tokenizer.json").exists()


def test_it_is_timed_beside_other_runtimes(exported):
    _, folder, _ = exported
    done = runs.command("bench", folder / "out", "--length", "8", "--rounds", "1", "--json")
    assert done.code == 0 and [row["runtime"] for row in done.json["rows"]] == ["executorch"]


@pytest.fixture
def doubling(tmp_path, monkeypatch):
    """A program in place of one of a file: it takes one row of at most 4 tokens, and returns twice its ids."""
    memory = torch.zeros(1, 2)

    def run(values):
        assert len(values["input_ids"]) == 1
        return [memory.copy_(2 * values["input_ids"][:, :2])]

    program = executorch_file.Opened(run, ("input_ids", "attention_mask"), ("logits",), 4)
    monkeypatch.setattr(executorch_file, "opened", lambda file, threads: program)
    return RUNTIME.open(tmp_path / "model.pte", None)


def test_rows_are_computed_one_by_one_and_kept(doubling):
    found = doubling(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]))["logits"]
    assert found.tolist() == [[2, 4], [8, 10]]


def test_a_text_beyond_the_limit_is_refused_in_words(doubling):
    with pytest.raises(SensibertError, match="a text has 5 tokens, want at most 4"):
        doubling(input_ids=torch.ones(1, 5, dtype=torch.int64))


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    from tests.helpers import tiny_model

    def fails(*arguments):
        raise RuntimeError("operator 7 is missing")

    monkeypatch.setattr(graphs, "import_module", lambda name: None)
    monkeypatch.setattr(executorch_file, "write", fails)
    with pytest.raises(SensibertError, match=r"executorch has no program of this model \(.*operator 7 is missing"):
        export_graph(tiny_model(), str(tmp_path / "out"), "executorch")
    assert not list(tmp_path.iterdir())
