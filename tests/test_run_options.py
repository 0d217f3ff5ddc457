"""What options mean before anything is read, and how the files they name are found."""

from dataclasses import fields

import pytest
import torch

from sensibert import inputs as sources
from sensibert import run_options as names
from sensibert.allocation.allocate import POLICIES
from sensibert.core.errors import SensibertError
from sensibert.core.schedule import Schedule
from sensibert.data import PRESETS
from sensibert.run_options import Options
from sensibert.saving.folder import LAYOUTS
from sensibert.sensitivity.gradients import STATISTICS


def options(**changed) -> Options:
    return Options("m", "o", **changed)


def test_the_light_lists_agree_with_those_of_the_verbs():
    assert names.METHODS == (*STATISTICS, "dense")
    assert names.POLICIES == POLICIES and names.LAYOUTS == LAYOUTS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_brings_its_settings_and_the_command_line_wins(name):
    preset = PRESETS[name]
    options(task=name).check()  # needs no file
    found = options(task=name).resolved()
    for setting in ("epochs", "learning_rate", "batch_size", "max_length"):
        assert getattr(found, setting) == getattr(preset, setting), setting
    assert options(task=name, learning_rate=1.0).resolved().learning_rate == 1.0


def test_without_a_preset_there_are_usual_settings():
    found = options(train_file="t.csv", task="regression").resolved()
    assert (found.epochs, found.learning_rate, found.batch_size, found.max_length) == (3, 1e-4, 32, None)


def test_the_settings_are_the_words_of_the_command_line():
    settings = options(schedule=Schedule("cubic", milestones=2), resume=True).settings()
    assert (settings["schedule"], settings["milestones"]) == ("cubic", 2)
    assert not {"resume", "overwrite", "quiet"} & settings.keys()
    assert {f.name for f in fields(Options)} - settings.keys() == {"resume", "overwrite", "quiet"}


def test_precision_is_a_dtype():
    assert options().autocast() is None and options(precision="bf16").autocast() == torch.bfloat16


@pytest.mark.parametrize(
    "asked, wanted",
    [
        ({"task": "sst2"}, [("nyu-mll/glue:sst2", "train"), ("nyu-mll/glue:sst2", "validation")]),
        ({"task": "mnli"}, [("nyu-mll/glue:mnli", "train"), ("nyu-mll/glue:mnli", "validation_matched")]),
        ({"task": "sst2", "validation_file": "d"}, [("nyu-mll/glue:sst2", "train"), ("d", "validation")]),
        ({"task": "sst2", "train_file": "t"}, [("t", "train")]),
        ({"train_file": "a/b", "validation_file": "a/b"}, [("a/b", "train"), ("a/b", "validation")]),
    ],
)
def test_files_come_before_presets_and_hub_names_get_their_split(asked, wanted, monkeypatch):
    seen = []
    monkeypatch.setattr(sources, "load_examples", lambda source, split: seen.append((source, split)) or "rows")
    train, validation = sources.training_examples(options(**asked)), sources.validation_examples(options(**asked))
    assert seen == wanted and train == "rows" and (validation is None) == (len(wanted) == 1)


def test_what_is_missing_is_said():
    with pytest.raises(SensibertError, match=r"train_file is missing, want a file or a preset task \(mnli, qqp"):
        options().check()
    with pytest.raises(SensibertError, match="train_file is missing"):
        sources.training_examples(options())
    options().check(needs_data=False)
