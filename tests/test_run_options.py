"""What options mean before anything is read, and how the files they name are found."""

import json
from pathlib import Path

import pytest
import torch

from sensibert import inputs as sources
from sensibert.core.config import TrimConfig
from sensibert.core.errors import SensibertError
from sensibert.core.schedule import Schedule
from sensibert.data.tasks import PRESETS
from sensibert.run_options import Options, all_names

V0_1 = Path(__file__).parent / "fixtures" / "v0_1"


def options(**changed) -> Options:
    return Options("m", "o", **changed)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_brings_its_settings_and_the_command_line_wins(name):
    preset = PRESETS[name]
    options(task=name).want_data()  # needs no file
    found = options(task=name).resolved()
    for setting in ("epochs", "learning_rate", "batch_size", "max_length"):
        assert getattr(found, setting) == getattr(preset, setting), setting
    assert options(task=name, learning_rate=1.0).resolved().learning_rate == 1.0


def test_without_a_preset_there_are_usual_settings():
    found = options(train_file="t.csv", task="regression").resolved()
    assert (found.epochs, found.learning_rate, found.batch_size, found.max_length) == (3, 1e-4, 32, None)


def test_the_settings_are_the_words_of_the_command_line():
    run = options(trim=TrimConfig(schedule=Schedule("cubic", milestones=2)), resume=True)
    settings = run.settings()
    assert (settings["schedule"], settings["milestones"]) == ("cubic", 2)
    assert all_names() - settings.keys() == {"resume", "overwrite", "quiet", "device", "report_to"}
    assert Options.from_settings({**json.loads(json.dumps(settings)), "resume": True}) == run


def test_the_recipe_of_an_earlier_version_is_read():
    written = json.loads((V0_1 / "unit" / "recipe.json").read_text())
    assert {"policy", "step", "search", "distil_hidden"} <= written.keys()
    run = Options.from_settings(written)
    assert (run.trim.allocation, run.trim.width_multiple, run.trim.schedule.recovery) == ("global", 8, "rewarm")
    assert (run.max_steps, run.learning_rate, run.trim.schedule.trim_start) == (12, 1e-3, 1 / 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"search": 4}, "search is 4, but this setting was removed"),
        ({"teacher": "average"}, "teacher is 'average', which was removed"),
        ({"colour": "red"}, "colour is no setting of a run, want one of allocation, "),
        ({"policy": "uniform", "allocation": "global"}, "allocation is given twice"),
        ({"teacher": "snapshot", "method": "dense"}, "method baseline does not trim"),
        ({"seed": 2.5}, "seed is 2.5, want a whole number"),
        ({"resume": "yes"}, "resume is 'yes', want true or false"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(SensibertError, match=message):
        Options.from_settings(settings)


def test_precision_is_a_dtype():
    assert options().autocast() is None and options(precision="bf16").autocast() == torch.bfloat16


@pytest.mark.parametrize("quick", [True, False])
def test_precision_auto_is_bf16_where_the_device_computes_in_it(quick, monkeypatch):
    monkeypatch.setattr("sensibert.core.device.computes_in_bf16", lambda device: quick)
    options = Options(precision="auto")
    assert options.resolved().precision == ("bf16" if quick else "fp32")
    assert options.autocast() == (torch.bfloat16 if quick else None)


@pytest.mark.parametrize(
    "requested, wanted",
    [
        ({"task": "sst2"}, [("nyu-mll/glue:sst2", "train"), ("nyu-mll/glue:sst2", "validation")]),
        ({"task": "mnli"}, [("nyu-mll/glue:mnli", "train"), ("nyu-mll/glue:mnli", "validation_matched")]),
        ({"task": "sst2", "validation_file": "d"}, [("nyu-mll/glue:sst2", "train"), ("d", "validation")]),
        ({"task": "sst2", "train_file": "t"}, [("t", "train")]),
        ({"train_file": "a/b", "validation_file": "a/b"}, [("a/b", "train"), ("a/b", "validation")]),
    ],
)
def test_files_come_before_presets_and_hub_names_get_their_split(requested, wanted, monkeypatch):
    seen = []
    monkeypatch.setattr(sources, "load_examples", lambda source, split: seen.append((source, split)) or "rows")
    train, validation = (
        sources.training_examples(options(**requested)),
        sources.validation_examples(options(**requested)),
    )
    assert seen == wanted and train == "rows" and (validation is None) == (len(wanted) == 1)


def test_a_missing_training_file_is_named():
    with pytest.raises(SensibertError, match=r"train_file is missing, want a file or a preset task \(mnli, qqp"):
        options().want_data()
    with pytest.raises(SensibertError, match="train_file is missing"):
        sources.training_examples(options())
