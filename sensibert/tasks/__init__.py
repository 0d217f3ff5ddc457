"""Files or hub names -> features, collator, head settings and metrics of a task."""

from .answers import Answer, best_answers
from .data import TaskData, guess_task
from .encode import Collator, Features, Windows, micro_batches
from .files import Examples, load_examples
from .sampled import sampled_loss
from .table import PRESETS, TASKS, Preset, Task, get_task

__all__ = [
    "PRESETS",
    "TASKS",
    "Answer",
    "Collator",
    "Examples",
    "Features",
    "Preset",
    "Task",
    "TaskData",
    "Windows",
    "best_answers",
    "get_task",
    "guess_task",
    "load_examples",
    "micro_batches",
    "sampled_loss",
]
