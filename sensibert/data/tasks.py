"""The tasks and the public data sets (presets) with their settings; `TaskData` applies them to rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.arguments import one_of, show
from ..core.errors import SensibertError


@dataclass(frozen=True)
class Task:
    """A kind of task: its columns, its model head and its defaults.

    input_columns, label_columns: alternatives; the first that the data have are used. recovery, trim_start: the
    defaults of `Schedule` for the task, chosen by the results in docs/method.md."""

    name: str
    auto_class_name: str
    input_columns: tuple[tuple[str, ...], ...]
    label_columns: tuple[str, ...]
    main_metric: str
    max_length: int = 128
    recovery: str = "rewarm"
    trim_start: float | None = None


SENTENCES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
QUESTIONS = (("question", "context"),)
WORDS = (("tokens",),)
TEXTS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("question", "answer"),
    ("question", "context"),
    *SENTENCES,
)
LABEL = ("label", "labels")
TAGS = ("tags", "ner_tags", "labels")
LABELS = ("labels", "label")
MULTI_LABEL = "multi-label-classification"
EMBEDDING = "embedding"
LABELLED = ("text-classification", MULTI_LABEL, "token-classification")  # tasks with classes

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("text-classification", "AutoModelForSequenceClassification", SENTENCES, LABEL, "accuracy"),
        Task("regression", "AutoModelForSequenceClassification", SENTENCES, LABEL, "pearson"),
        Task("question-answering", "AutoModelForQuestionAnswering", QUESTIONS, ("answers",), "f1", 384, "continue"),
        Task("token-classification", "AutoModelForTokenClassification", WORDS, TAGS, "f1"),
        Task(MULTI_LABEL, "AutoModelForSequenceClassification", SENTENCES, LABELS, "f1_micro"),
        Task(EMBEDDING, "AutoModel", TEXTS, ("score", "similarity_score", "label"), "spearman", trim_start=0.0),
    )
}


@dataclass(frozen=True)
class Preset:
    """A public data set with the usual settings for fine-tuning a BERT on it; source: for `load_examples`."""

    name: str
    task: str
    source: str
    train_split: str = "train"
    validation_split: str = "validation"
    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int = 3
    max_length: int = 128


# Settings: the examples of transformers (run_glue, run_qa), within the ranges of Devlin et al. 2019, appendix A.3.
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("mnli", "text-classification", "nyu-mll/glue:mnli", validation_split="validation_matched"),
        Preset("qqp", "text-classification", "nyu-mll/glue:qqp"),
        Preset("qnli", "text-classification", "nyu-mll/glue:qnli"),
        Preset("sst2", "text-classification", "nyu-mll/glue:sst2"),
        Preset(
            "squad",
            "question-answering",
            "rajpurkar/squad",
            learning_rate=3e-5,
            batch_size=12,
            epochs=2,
            max_length=384,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task, or the task of the preset, of that name; SensibertError if there is neither."""
    task = PRESETS[name].task if name in PRESETS else name
    if task not in TASKS:
        raise SensibertError(f"task is {show(name)}, {one_of(name, [*TASKS, *PRESETS])}")
    return TASKS[task]
