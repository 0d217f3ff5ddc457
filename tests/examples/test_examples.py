"""The examples run from end to end on a tiny model and files of a few rows, and the notebook cell by cell."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests import runs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
pytestmark = pytest.mark.usefixtures("no_pictures")


def main_of(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def arguments(folder: Path, write, **more) -> list[str]:
    """Of an example: a tiny model, and the files that `write` writes."""
    suffix = "csv" if write is runs.sentence_file else "jsonl"
    files = {part: write(folder / f"{part}.{suffix}", seed=seed) for seed, part in enumerate(("train", "dev"))}
    given = {
        "model": runs.model_folder(folder / "model"),
        "train-file": files["train"],
        "validation-file": files["dev"],
    }
    given |= {"output": str(folder / "out"), "epochs": "2", **more}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def assert_halved(printed: str) -> None:
    before, after = (int(n.replace(",", "")) for n in re.search(r"parameters: ([\d,]+) -> ([\d,]+)", printed).groups())
    assert 0 < after <= before / 2


def test_a_trainer_of_your_own_trims_and_its_model_reloads(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    more = {"budget": "50%params", "learning-rate": "3e-3"}
    main_of("own_trainer")(arguments(tmp_path, runs.sentence_file, **more))
    printed = capsys.readouterr().out
    assert_halved(printed)
    after, reloaded = re.search(r"-> ([\d,]+)", printed)[1], re.search(r"reloads with ([\d,]+) encoder", printed)[1]
    assert after == reloaded and re.search(r"^accuracy: [01]\.\d{4}$", printed, flags=re.MULTILINE)


def test_questions_are_answered_with_a_part_of_the_context(tmp_path, capsys):
    main_of("question_answering")(arguments(tmp_path, runs.question_file, **{"max-length": "32"}))
    printed = capsys.readouterr().out
    assert_halved(printed)
    assert "f1 " in printed
    example = (EXAMPLES / "question_answering.py").read_text()
    context = re.search(r'^CONTEXT = "(.*)"$', example, flags=re.MULTILINE)[1]
    answer = re.search(r"^Who wrote it\? (.+)$", printed, flags=re.MULTILINE)[1]
    assert answer in context


def test_words_are_tagged_one_by_one(tmp_path, capsys):
    main_of("token_classification")(arguments(tmp_path, runs.tag_file, **{"learning-rate": "3e-3"}))
    printed = capsys.readouterr().out
    assert_halved(printed)
    tagged = [pair.split("/") for pair in printed.splitlines()[-1].split()]
    assert [word for word, _ in tagged] == ["Anna", "lives", "in", "Paris"]
    assert {tag for _, tag in tagged} <= {"O", "B-PER", "B-LOC"}


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_cells_of_the_notebook_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs.model_folder(tmp_path / "bert-base-uncased")
    runs.sentence_file(tmp_path / "train.csv", seed=1)
    runs.sentence_file(tmp_path / "dev.csv", 40, seed=2)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells("code")):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number + 1}", "exec"), namespace)
    assert namespace["result"]["encoder_params_after"] <= namespace["result"]["encoder_params_before"] / 2
    printed = capsys.readouterr().out
    assert "layer 1, FFN: " in printed and printed.count("UnitPlan: ") == 3


def test_the_notebook_has_neither_outputs_nor_counters():
    assert len(cells("code")) >= 5 and cells("markdown")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
