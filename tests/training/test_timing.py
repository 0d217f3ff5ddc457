"""Timed steps: as many as asked for, fewer where they are slow, and without a trace."""

import pytest
from transformers import TrainingArguments

from sensibert.data.task_data import TaskData
from sensibert.training import timing
from sensibert.training.timing import step_seconds
from tests import runs
from tests.data.tiny import word_piece
from tests.helpers import tiny_model


@pytest.fixture
def parts(tmp_path):
    from sensibert.data.files import load_examples

    tokenizer = word_piece()
    data = TaskData.build(None, load_examples(runs.sentence_file(tmp_path / "train.csv")), None, tokenizer)
    arguments = TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=8, use_cpu=True, report_to="none")
    return tiny_model(vocab_size=len(tokenizer)), data.train, data.collator, arguments


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_some_steps_are_timed_and_nothing_is_written_or_printed(parts, packing, tmp_path, capsys):
    seconds, steps = step_seconds(*parts, packing)
    assert seconds > 0 and steps == timing.STEPS
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"} and capsys.readouterr().out == ""


def test_slow_steps_are_timed_less_often(parts, monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    assert step_seconds(*parts)[1] == timing.LEAST
