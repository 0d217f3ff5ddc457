"""Files, or data sets on the hub -> features, collator, head settings and metrics of a task."""

from .answers import Answer, best_answers
from .batching import Collator, micro_batches
from .encode import Features, Windows
from .files import Examples, load_examples
from .task_data import TaskData, guess_task
from .tasks import PRESETS, TASKS, Preset, Task, get_task

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
]
