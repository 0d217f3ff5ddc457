"""The tables agree with transformers, with the metrics and with one another."""

import pytest
import transformers

from sensibert.core.errors import SensibertError
from sensibert.data.tasks import PRESETS, TASKS, get_task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_its_name(name):
    task = get_task(name)
    assert task.name == name and hasattr(transformers, task.auto_class_name)


@pytest.mark.parametrize("name", ["mnli", "qqp", "qnli", "sst2", "squad"])
def test_a_preset_has_a_task(name):
    preset = PRESETS[name]
    assert get_task(name) is TASKS[preset.task] and preset.name == name
    assert preset.max_length == TASKS[preset.task].max_length
    assert preset.source.count("/") == 1


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(SensibertError, match="task is 'ner', want one of text-classification, regression, .*, squad"):
        get_task("ner")
