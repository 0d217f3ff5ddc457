"""A task and its data, ready for a Trainer: features, collator, head settings and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import SensibertError
from . import labels
from .answers import Answer, best_answers
from .batching import Collator
from .encode import IGNORED, Features, encode_questions, encode_text, encode_words
from .files import Examples
from .labels import ClassIds, Column
from .metrics import answer_metrics, classification_metrics, regression_metrics, tagging_metrics
from .tasks import Task, get_task


def guess_task(examples: Examples, text_column: str | None = None, label_column: str | None = None) -> str:
    """The name of the task that the columns, and for a single label its values, speak of."""
    columns = examples.columns
    asked = set((text_column or "").split(",")) | {label_column}
    if {"question", "context", "answers"} <= set(columns) and asked <= {"", None, "question", "context", "answers"}:
        return "question-answering"
    label = label_column or next((c for c in ("label", "tags", "ner_tags") if c in columns), None)
    if label is None:
        seen = ", ".join(repr(c) for c in columns)
        raise SensibertError(f"{examples.name}: no column 'label', 'tags' or 'answers', the columns are {seen}")
    column = Column.of(examples, label)
    if label in ("tags", "ner_tags") or isinstance(column.values[0], list):
        return "token-classification"
    if labels.kind(column, column.filled()) != "number":
        return "text-classification"
    if all(float(value).is_integer() for value in column.values):
        row, value = labels.first_number(column, column.filled())
        said = f"is {labels.show(value)}, and all are whole numbers"
        raise column.error(row, f"{said}: want a task (regression to predict numbers), or classes written as integers")
    return "regression"


@dataclass
class TaskData:
    """Built by TaskData.build. label_names is [] for regression and question-answering."""

    task: Task
    num_labels: int
    label_names: list[str]
    train: Features | None
    validation: Features | None
    collator: Collator

    @classmethod
    def build(
        cls,
        task_name: str | None,
        train: Examples | None,
        validation: Examples | None,
        tokenizer,
        max_length: int | None = None,
        doc_stride: int | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        label_names: list[str] | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> TaskData:
        """task_name: of a task or preset, None to guess. text_column: 'a' or 'a,b'. label_names: those of a model
        that exists; left out they come from train. max_length: 128, for questions 384. doc_stride: 128, or a third of
        max_length where that is less. SensibertError names file, row, column, what came and what was wanted."""
        data = [examples for examples in (train, validation) if examples is not None]
        if not data:
            raise SensibertError("TaskData: train and validation are both None, want at least one")
        task = get_task(task_name or guess_task(data[0], text_column, label_column))
        inputs, label = _columns(task, data[0], text_column, label_column)
        max_length = task.max_length if max_length is None else max_length
        doc_stride = min(128, max_length // 3) if doc_stride is None else doc_stride
        if tokenizer.pad_token_id is None:
            raise SensibertError(f"tokenizer {type(tokenizer).__name__} has no pad token")
        names = _names(task, data[0], label, label_names)
        encoded = {
            id(examples): _encode(task, examples, inputs, label, names, tokenizer, max_length, doc_stride)
            for examples in data
        }
        longest = max(max(features.lengths) for features in encoded.values())
        collator = Collator(tokenizer.pad_token_id, pad_to_multiple_of, longest)
        return cls(task, _outputs(task, names), names, encoded.get(id(train)), encoded.get(id(validation)), collator)

    @classmethod
    def outlined(cls, task_name: str, train: Examples, text_column: str | None, label_column: str | None) -> TaskData:
        """What the head of a model depends on, without features: nothing is encoded."""
        task = get_task(task_name)
        names = _names(task, train, _columns(task, train, text_column, label_column)[1], None)
        return cls(task, _outputs(task, names), names, None, None, Collator(0))

    @property
    def main_metric(self) -> str:
        return self.task.main_metric

    def auto_class(self) -> type:
        import transformers

        return getattr(transformers, self.task.auto_class_name)

    def config_kwargs(self) -> dict[str, Any]:
        """What the model's config must say about its head."""
        names = self.label_names or [f"LABEL_{i}" for i in range(self.num_labels)]
        problem = {"text-classification": "single_label_classification", "regression": "regression"}
        return {
            "num_labels": self.num_labels,
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": problem.get(self.task.name),
        }

    def compute_metrics(self, predictions: Any, label_ids: Any = None) -> dict[str, float]:
        """Logits of the validation, in its order -> metrics as fractions.

        predictions: an EvalPrediction, an array, or a tuple of arrays. label_ids: the validation's own, if given."""
        if hasattr(predictions, "predictions"):
            predictions, label_ids = predictions.predictions, predictions.label_ids
        if self.validation is None:
            raise SensibertError("compute_metrics: there is no validation data")
        logits = predictions if isinstance(predictions, (tuple, list)) else (predictions,)
        logits = [np.asarray(part, np.float32) for part in logits[:2]]
        if len(logits[0]) != len(self.validation):
            raise SensibertError(f"compute_metrics: {len(logits[0])} predictions, want {len(self.validation)}")
        if np.isnan(logits[0]).any():
            bad = int(np.isnan(logits[0]).reshape(len(logits[0]), -1).any(1).sum())
            raise SensibertError(f"compute_metrics: {bad} of {len(logits[0])} predictions are NaN")
        return _METRICS[self.task.name](self, logits, label_ids)

    def _class_metrics(self, logits, label_ids) -> dict[str, float]:
        wanted = self.validation.per_item["labels"] if label_ids is None else np.asarray(label_ids)
        return classification_metrics(logits[0].argmax(-1), wanted, self.num_labels)

    def _number_metrics(self, logits, label_ids) -> dict[str, float]:
        wanted = self.validation.per_item["labels"] if label_ids is None else np.asarray(label_ids)
        return regression_metrics(logits[0].reshape(-1), wanted.reshape(-1))

    def _tag_metrics(self, logits, label_ids) -> dict[str, float]:
        if label_ids is None:
            rows = [item["labels"] for item in self.validation]
        else:
            rows = np.asarray(label_ids).tolist()
        predicted, wanted = [], []
        for best, row in zip(logits[0].argmax(-1), rows):
            predicted.append([self.label_names[b] for b, label in zip(best, row) if label != IGNORED])
            wanted.append([self.label_names[label] for label in row if label != IGNORED])
        return tagging_metrics(predicted, wanted)

    def _answer_metrics(self, logits, label_ids) -> dict[str, float]:
        starts = self.validation.per_item["start_positions"]
        if isinstance(label_ids, (tuple, list)) and not np.array_equal(label_ids[0], starts):
            raise SensibertError("compute_metrics: the windows came in another order than that of the validation")
        found = self.answers(*logits, n_best=1)
        golds = [[text for text, _ in row] for row in self.validation.golds]
        return answer_metrics([row[0].text if row else "" for row in found], golds)

    def answers(self, start_logits: np.ndarray, end_logits: np.ndarray, n_best: int = 20) -> list[list[Answer]]:
        """Per validation question its n_best answers, best first. 'No answer' competes if some gold says so."""
        null_answers = not all(self.validation.golds)
        return best_answers(start_logits, end_logits, self.validation, n_best, null_answers=null_answers)


_METRICS = {
    "text-classification": TaskData._class_metrics,
    "regression": TaskData._number_metrics,
    "token-classification": TaskData._tag_metrics,
    "question-answering": TaskData._answer_metrics,
}


def _columns(task: Task, examples: Examples, text: str | None, label: str | None) -> tuple[tuple[str, ...], str]:
    """The input columns and the label column that examples has for this task."""
    if text is not None:
        inputs = (text,) if text in examples.columns else tuple(part.strip() for part in text.split(","))
    else:
        inputs = next((c for c in task.input_columns if set(c) <= set(examples.columns)), None)
    if inputs is None:
        wanted = " or ".join(", ".join(repr(c) for c in columns) for columns in task.input_columns)
        seen = ", ".join(repr(c) for c in examples.columns)
        raise SensibertError(f"{examples.name}: {task.name} wants the columns {wanted}; the columns are {seen}")
    counts = {len(columns) for columns in task.input_columns}
    if len(inputs) not in counts:
        wanted = " or ".join(map(str, sorted(counts)))
        raise SensibertError(f"text_column is '{text}', {task.name} takes {wanted} columns, parted by commas")
    label = label or next((c for c in task.label_columns if c in examples.columns), task.label_columns[0])
    return inputs, label


def _outputs(task: Task, names: list[str]) -> int:
    return {"regression": 1, "question-answering": 2}.get(task.name, len(names))


def _names(task: Task, examples: Examples, label: str, given: list[str] | None) -> list[str]:
    if task.name in ("regression", "question-answering"):
        return []
    if given is None:
        given = examples.class_names.get(label)
    if given is not None:
        if len(given) < 2 or len(set(given)) < len(given):
            raise SensibertError(f"label_names is {list(given)}, want at least two different names")
        return list(given)
    column = Column.of(examples, label)
    return labels.class_names(
        column, labels.each_tag(column) if task.name == "token-classification" else column.filled()
    )


def _encode(task, examples, inputs, label, names, tokenizer, max_length, doc_stride) -> Features:
    column, sources = Column.of(examples, label), [Column.of(examples, name) for name in inputs]
    if task.name == "token-classification":
        sentences = labels.words(sources[0])
        ids, tags = ClassIds(names), labels.tag_values(column, sentences)
        encoded = [[ids(column, row, tag) for tag in sentence] for row, sentence in enumerate(tags)]
        return encode_words(sentences, encoded, tokenizer, max_length)
    texts = [labels.texts(source) for source in sources]
    if task.name == "question-answering":
        golds = labels.answers(column, texts[1])
        return encode_questions(*texts, golds, tokenizer, max_length, doc_stride)
    if task.name == "regression":
        wanted = labels.numbers(column)
    else:
        ids = ClassIds(names)
        wanted = np.array([ids(column, row, value) for row, value in column.filled()], np.int64)
    features = encode_text(texts, tokenizer, max_length)
    features.per_item["labels"] = wanted
    return features
