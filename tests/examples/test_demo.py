"""The whole of the examples, on a tiny model and two small libraries; of examples/demo.py with its second process."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sensibert.compare  # noqa: F401  (before the fixtures that make its measurements short)
from tests.fresh import python_in_fork
from tests.runs import REST, model_folder

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The module, with a tiny model in place of the packaged one, and two libraries in place of the installed ones."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo
    import docstrings

    libraries = {name: tmp_path / name for name in ("alpha", "beta")}
    for name, telling in zip(libraries, ("good", "bad")):
        libraries[name].mkdir()
        for i in range(60):
            words = [*REST[: i % 6], telling, *REST, str(i), telling]
            (libraries[name] / f"m{i}.py").write_text(f'"""{" ".join(words)}"""')
    base = model_folder(tmp_path / "base", head="SequenceClassification", max_position_embeddings=128)
    monkeypatch.setattr(demo, "packaged_model", lambda: base)
    monkeypatch.setattr(docstrings, "sources", lambda: libraries)
    shown = SimpleNamespace(run=lambda *args, **more: print(python_in_fork(*args, **more).stdout))
    monkeypatch.setattr(demo, "subprocess", shown)
    yield demo
    for name in ("demo", "demo_embeddings", "docstrings", "multi_label"):
        sys.modules.pop(name, None)


def test_it_compares_with_an_untrimmed_model_of_as_many_steps_and_reloads(demo, tmp_path, capfd):
    demo.main(["--output", str(tmp_path / "out"), "--epochs", "2"])
    printed = capfd.readouterr().out
    assert re.search(r"^ +untrimmed +trimmed +ratio$", printed, flags=re.MULTILINE)
    before, after = re.search(r"encoder parameters +([\d,]+) +([\d,]+)", printed).groups()
    assert int(after.replace(",", "")) <= int(before.replace(",", "")) / 2
    whole, trimmed = re.search(r"accuracy on the validation set +([\d.]+) % +([\d.]+) %", printed).groups()
    gap, low, high = map(float, re.search(r"([-+][\d.]+) points.* interval (\S+) to (\S+)$", printed, re.M).groups())
    assert low <= gap <= high and gap == pytest.approx(float(trimmed) - float(whole), abs=0.11)
    results = [json.loads((tmp_path / "out" / name / "result.json").read_text()) for name in ("untrimmed", "trimmed")]
    assert results[0]["steps"] == results[1]["steps"] and f"after {results[0]['steps']} steps" in printed
    assert results[0]["encoder_params_after"] == int(before.replace(",", ""))
    assert re.search(r"Reloaded from .*: accuracy ([\d.]+) %", printed)[1] == trimmed
    assert len(re.findall(r"^ +(?:alpha|beta) +\d+ %  ", printed, flags=re.MULTILINE)) == len(demo.LINES)


def test_an_embedding_model_is_trimmed_without_labels_and_searched(demo, tmp_path, capfd, monkeypatch):
    pytest.importorskip("sentence_transformers")
    import demo_embeddings

    base = model_folder(tmp_path / "encoder", max_position_embeddings=128)
    monkeypatch.setattr(demo_embeddings, "packaged_model", lambda: base)
    demo_embeddings.main(["--output", str(tmp_path / "out"), "--max-steps", "4"])
    printed = capfd.readouterr().out
    before, after = re.search(r"encoder parameters +([\d,]+) +([\d,]+)", printed).groups()
    assert int(after.replace(",", "")) <= int(before.replace(",", "")) / 2
    assert printed.count("\n  original  ") == printed.count("\n  trimmed   ") == len(demo_embeddings.QUERIES)


def test_several_labels_a_row_are_learned_and_given_with_their_probabilities(demo, tmp_path, capfd):
    import multi_label

    multi_label.main(["--output", str(tmp_path / "out"), "--epochs", "0.2"])
    printed = capfd.readouterr().out
    before, after = re.search(r"Encoder: ([\d,]+) -> ([\d,]+) parameters", printed).groups()
    assert int(after.replace(",", "")) <= int(before.replace(",", "")) / 2
    assert all(re.search(rf"^f1/{topic} +[\d.]+", printed, flags=re.MULTILINE) for topic in multi_label.SENTENCES)
    assert len(re.findall(r"^  delivery \d+ %, payment \d+ %, account \d+ %", printed, flags=re.MULTILINE)) == 3
