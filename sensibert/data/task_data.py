"""A task and its data, ready for a Trainer: features, collator, head settings and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.errors import SensibertError
from . import classes, labels
from .answers import Answer, best_answers
from .batching import Collator
from .classes import ClassIds
from .columns import columns_of, guess_task
from .encode import IGNORED, Features, Windows, encode_questions, encode_text, encode_words
from .files import Examples
from .label_forms import cells_of
from .labels import Column
from .metrics import (
    answer_metrics,
    best_constant_f1,
    classification_metrics,
    multi_label_metrics,
    ranking_metrics,
    regression_metrics,
    tagging_metrics,
)
from .multi_label import LabelLists
from .tasks import LABELLED, MULTI_LABEL, Task, get_task

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

QUERY_IDS = ("query_id", "query-id", "qid")  # columns that make the rows of validation data rankings
# transformers' problem_type of a logit for each label, also of a single one, with binary cross entropy.
LOGIT_PER_LABEL: Literal["multi_label_classification"] = "multi_label_classification"
Logits = Sequence[np.ndarray]  # of one output, or of start and end


@dataclass
class TaskData:
    """A task with its encoded data; made by `build`.

    num_labels: outputs of the head. label_names: the classes, [] for regression and question-answering. own_names: the
    same in the order of the data, where the model has another. one_logit: regression of a probability, the only output
    being its logit, with binary cross entropy. queries: the number of each validation row's query, if there are ids."""

    task: Task
    num_labels: int
    label_names: list[str]
    train: Features | None
    validation: Features | None
    collator: Collator
    own_names: list[str] = field(default_factory=list)
    one_logit: bool = False
    queries: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        task_name: str | None,
        train: Examples | None,
        validation: Examples | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        doc_stride: int | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        label_names: list[str] | None = None,
        pad_to_multiple_of: int | None = None,
        one_logit: bool = False,
    ) -> TaskData:
        """Check and encode training data, validation data or both.

        task_name: of a task or a preset, None to guess. text_column: 'a' or 'a,b'. label_names: of an existing model,
        by default those of the training data. max_length: in tokens, by default 128, for questions 384. doc_stride: by
        default 128, but at most a third of max_length. pad_to_multiple_of: see `Collator`. SensibertError names file,
        row and column, the value, and what was expected."""
        data = [examples for examples in (train, validation) if examples is not None]
        if not data:
            raise SensibertError("TaskData: train and validation are both None, want at least one")
        task = get_task(task_name or guess_task(data[0], text_column, label_column))
        inputs, label = columns_of(task, data[0], text_column, label_column)
        max_length = task.max_length if max_length is None else max_length
        doc_stride = min(128, max_length // 3) if doc_stride is None else doc_stride
        if tokenizer.pad_token_id is None:
            raise SensibertError(f"tokenizer {type(tokenizer).__name__} has no pad token")
        names = _names(task, data[0], label, label_names)
        if task.name in LABELLED and len(data) == 2:
            _want_same_kind(task, data, label)
        checked = {id(examples): _inputs_and_labels(task, examples, inputs, label, names) for examples in data}
        encoded = {of: _encode(task, *parts, tokenizer, max_length, doc_stride) for of, parts in checked.items()}
        longest = max(max(features.lengths) for features in encoded.values())
        collator = Collator(tokenizer.pad_token_id, pad_to_multiple_of, longest)
        if one_logit:
            for examples in data:
                _as_probabilities(encoded[id(examples)], Column.of(examples, label))
        queries = None if validation is None else _queries(task, validation, encoded[id(validation)], label)
        parts = encoded.get(id(train)), encoded.get(id(validation))
        return cls(task, _outputs(task, names), names, *parts, collator, one_logit=one_logit, queries=queries)

    @classmethod
    def outlined(
        cls,
        task_name: str,
        train: Examples,
        text_column: str | None,
        label_column: str | None,
        known: Sequence[str] = (),
    ) -> TaskData:
        """Only the task and the labels, which determine a model's head. Nothing is encoded.

        known: classes of a model, which are those of the data if they are the labels that occur."""
        task = get_task(task_name)
        label = columns_of(task, train, text_column, label_column)[1]
        names = None
        if task.name in LABELLED and label not in train.class_names:
            occurring = sorted({str(value).strip() for _, value in cells_of(task, Column.of(train, label))})
            names = occurring if known and classes.positions_of(known, occurring) is not None else None
        names = _names(task, train, label, names)
        return cls(task, _outputs(task, names), names, None, None, Collator(0))

    @property
    def main_metric(self) -> str:
        """The metric that the task is judged by."""
        return self.task.main_metric

    def constant_score(self) -> float:
        """The main metric of the best answer that is the same for every validation row. SensibertError without them."""
        if self.validation is None:
            raise SensibertError("constant_score: there is no validation data")
        if isinstance(self.validation, Windows):  # no answer
            return float(np.mean([not golds for golds in self.validation.golds]))
        if self.task.name == MULTI_LABEL:
            return best_constant_f1(self.validation.per_item["labels"] > 0.5)
        if self.task.name != "text-classification":  # correlations, and f1 of entities
            return 0.0
        return float(np.bincount(self.validation.per_item["labels"]).max() / len(self.validation))

    def auto_class(self) -> Any:
        """The AutoModel class of transformers for the task."""
        import transformers

        return getattr(transformers, self.task.auto_class_name)

    def config_kwargs(self) -> dict[str, Any]:
        """The entries of a model's config that define its head."""
        names = self.label_names or [f"LABEL_{i}" for i in range(self.num_labels)]
        problem = {"text-classification": "single_label_classification", "regression": "regression"}
        problem[MULTI_LABEL] = LOGIT_PER_LABEL
        return {
            "num_labels": self.num_labels,
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": LOGIT_PER_LABEL if self.one_logit else problem.get(self.task.name),
        }

    def compute_metrics(self, predictions: Any, label_ids: Any = None) -> dict[str, float]:
        """Logits of the validation data, in their order -> metrics as fractions.

        predictions: an EvalPrediction, an array, or a tuple of arrays. label_ids: by default those of the data.
        SensibertError without validation data, for another number of predictions, and for NaN."""
        if hasattr(predictions, "predictions"):
            predictions, label_ids = predictions.predictions, predictions.label_ids
        data = self.validation
        if data is None:
            raise SensibertError("compute_metrics: there is no validation data")
        logits = predictions if isinstance(predictions, (tuple, list)) else (predictions,)
        logits = [np.asarray(part, np.float32) for part in logits[:2]]
        if len(logits[0]) != len(data):
            raise SensibertError(f"compute_metrics: {len(logits[0])} predictions, want {len(data)}")
        if np.isnan(logits[0]).any():
            bad = int(np.isnan(logits[0]).reshape(len(logits[0]), -1).any(1).sum())
            raise SensibertError(f"compute_metrics: {bad} of {len(logits[0])} predictions are NaN")
        return self._metrics(data, logits, label_ids)

    def _metrics(self, data: Features, logits: Logits, label_ids: Any) -> dict[str, float]:
        return _METRICS[self.task.name](self, data, logits, label_ids)

    def _class_metrics(self, data: Features, logits: Logits, label_ids: Any) -> dict[str, float]:
        wanted = data.per_item["labels"] if label_ids is None else np.asarray(label_ids)
        metrics = classification_metrics(logits[0].argmax(-1), wanted, self.num_labels)
        if self.queries is not None and self.num_labels == 2:
            metrics |= ranking_metrics(logits[0][:, 1] - logits[0][:, 0], wanted, self.queries)
        return metrics

    def _label_metrics(self, data: Features, logits: Logits, label_ids: Any) -> dict[str, float]:
        wanted = data.per_item["labels"] if label_ids is None else np.asarray(label_ids)
        return multi_label_metrics(logits[0] > 0, wanted > 0.5, self.label_names)

    def _number_metrics(self, data: Features, logits: Logits, label_ids: Any) -> dict[str, float]:
        wanted = data.per_item["labels"] if label_ids is None else np.asarray(label_ids)
        predicted, wanted = logits[0].reshape(-1), wanted.reshape(-1)
        metrics = {}
        if self.one_logit:
            metrics = classification_metrics(predicted > 0, wanted > 0.5, 2)
            predicted = 1 / (1 + np.exp(-predicted))
        if self.queries is not None:
            metrics |= ranking_metrics(predicted, wanted, self.queries)
        return metrics | regression_metrics(predicted, wanted)

    def tags(self, data: Features, logits: Logits, label_ids: Any = None) -> tuple[list[list[str]], list[list[str]]]:
        """The predicted and the correct tags of every sentence."""
        if label_ids is None:
            rows = [data[i]["labels"] for i in range(len(data))]
        else:
            rows = np.asarray(label_ids).tolist()
        predicted, wanted = [], []
        for best, row in zip(logits[0].argmax(-1), rows):
            predicted.append([self.label_names[b] for b, label in zip(best, row) if label != IGNORED])
            wanted.append([self.label_names[label] for label in row if label != IGNORED])
        return predicted, wanted

    def _tag_metrics(self, data: Features, logits: Logits, label_ids: Any) -> dict[str, float]:
        return tagging_metrics(*self.tags(data, logits, label_ids))

    def _answer_metrics(self, data: Features, logits: Logits, label_ids: Any) -> dict[str, float]:
        starts = data.per_item["start_positions"]
        if isinstance(label_ids, (tuple, list)) and not np.array_equal(label_ids[0], starts):
            raise SensibertError("compute_metrics: the windows are in another order than those of the validation data")
        best = self.answers(logits[0], logits[1], n_best=1)
        return answer_metrics([row[0].text if row else "" for row in best], self.golds())

    def golds(self) -> list[list[str]]:
        """The correct answers of every validation question."""
        return [[text for text, _ in row] for row in self._windows().golds]

    def answers(self, start_logits: np.ndarray, end_logits: np.ndarray, n_best: int = 20) -> list[list[Answer]]:
        """Logits [windows, tokens] -> for every validation question its n_best answers, the best first.

        'No answer' is a candidate if some question has no correct answer. SensibertError without validation data."""
        windows = self._windows()
        return best_answers(start_logits, end_logits, windows, n_best, null_answers=not all(windows.golds))

    def _windows(self) -> Windows:
        if not isinstance(self.validation, Windows):
            raise SensibertError("answers: there is no validation data of question-answering")
        return self.validation


_METRICS = {
    "text-classification": TaskData._class_metrics,
    MULTI_LABEL: TaskData._label_metrics,
    "regression": TaskData._number_metrics,
    "token-classification": TaskData._tag_metrics,
    "question-answering": TaskData._answer_metrics,
}


def _outputs(task: Task, names: list[str]) -> int:
    """Outputs of the head; a question has a start and an end."""
    return {"regression": 1, "question-answering": 2}.get(task.name, len(names))


def _names(task: Task, examples: Examples, label: str, given: list[str] | None) -> list[str]:
    """The classes: given ones, else those of the hub, else those in the label column; [] for tasks without classes."""
    if task.name in ("regression", "question-answering"):
        return []
    if given is None:
        given = examples.class_names.get(label)
    if given is not None:
        if len(given) < 2 or len(set(given)) < len(given):
            raise SensibertError(f"label_names is {list(given)}, want at least two different names")
        return list(given)
    column = Column.of(examples, label)
    cells = cells_of(task, column)
    return cells.names() if isinstance(cells, LabelLists) else classes.class_names(column, cells)


def zeros_and_ones(train: Examples, text_column: str | None, label_column: str | None, task_name: str) -> bool:
    """Whether the labels are only the numbers 0 and 1."""
    column = Column.of(train, columns_of(get_task(task_name), train, text_column, label_column)[1])
    return all(str(value).strip() in ("0", "1", "0.0", "1.0") for _, value in column.filled())


def _as_probabilities(features: Features, column: Column) -> None:
    """Labels [rows] -> [rows, 1], one for each logit; SensibertError for one that is no probability."""
    values = features.per_item["labels"]
    for row in np.flatnonzero((values < 0) | (values > 1)).tolist():
        raise column.error(
            row, f"is {labels.show(column.values[row])}, want 0 to 1: the model has the logit of a label"
        )
    features.per_item["labels"] = values[:, None]


def _queries(task: Task, examples: Examples, features: Features, label: str) -> np.ndarray | None:
    """The number of each row's query, for tasks that score pairs; None without a column of ids.

    SensibertError for an empty id, and for labels that are no relevance."""
    name = next((name for name in QUERY_IDS if name in examples.columns), None)
    if name is None or task.name not in ("text-classification", "regression"):
        return None
    values = features.per_item["labels"]
    column, ids = Column.of(examples, label), [str(value) for _, value in Column.of(examples, name).filled()]
    for row in np.flatnonzero(values.reshape(-1) < 0).tolist():
        raise column.error(row, f"is {labels.show(column.values[row])}, want 0 or more in a file with {name}")
    return np.unique(ids, return_inverse=True)[1]


def _want_same_kind(task: Task, data: list[Examples], label: str) -> None:
    """SensibertError if one file has integers and the other names that do not say which integer is which."""
    kinds = []
    for each in data:
        cells = {str(value).strip() for _, value in cells_of(task, Column.of(each, label))}
        names = label in each.class_names or not any(classes.NUMBER.fullmatch(cell) for cell in cells)
        integers = all(classes.whole(cell) is not None for cell in cells)
        kinds.append("name" if names else "integer" if integers else "")
    if set(kinds) == {"name", "integer"}:
        named, numbered = (data[kinds.index(kind)].name for kind in ("name", "integer"))
        raise SensibertError(
            f"{numbered}: column '{label}' holds integers, and {named} has names for its classes: want names in both"
        )


def _inputs_and_labels(
    task: Task, examples: Examples, inputs: tuple[str, ...], label: str, names: list[str]
) -> tuple[list, Any]:
    """The checked columns of texts, or for tags the words of every row; and the checked labels."""
    column, sources = Column.of(examples, label), [Column.of(examples, name) for name in inputs]
    numbered = examples.class_names.get(label)
    if task.name == "token-classification":
        sentences = labels.words(sources[0])
        ids, tags = ClassIds(names, numbered), labels.tag_values(column, sentences)
        return sentences, [[ids(column, row, tag) for tag in sentence] for row, sentence in enumerate(tags)]
    texts = [labels.texts(source) for source in sources]
    if task.name == "question-answering":
        return texts, labels.answers(column, texts[1])
    if task.name == "regression":
        return texts, labels.numbers(column)
    if task.name == MULTI_LABEL:
        return texts, LabelLists.of(column, len(names)).matrix(names, numbered)
    ids = ClassIds(names, numbered)
    return texts, np.array([ids(column, row, value) for row, value in column.filled()], np.int64)


def _encode(
    task: Task, inputs: list, wanted: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> Features:
    """The parts that `_inputs_and_labels` returns, as features."""
    if task.name == "token-classification":
        return encode_words(inputs, wanted, tokenizer, max_length)
    if task.name == "question-answering":
        return encode_questions(inputs[0], inputs[1], wanted, tokenizer, max_length, doc_stride)
    features = encode_text(inputs, tokenizer, max_length)
    features.per_item["labels"] = wanted
    return features
