"""Reads the model, tokenizer, data and teacher that options name. Errors name the one that is wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from .core.device import device_of
from .core.errors import SensibertError, first_line, naming
from .core.model_folder import want_model_folder
from .data import classes
from .data.columns import columns_of, guess_task
from .data.embedding_data import EmbeddingData, different_texts
from .data.files import Examples, load_examples, texts_of
from .data.label_forms import joined, named
from .data.task_data import LOGIT_PER_LABEL, TaskData, zeros_and_ones
from .data.tasks import EMBEDDING, LABELLED, LABELS, MULTI_LABEL, PRESETS, get_task
from .models import base_type, families
from .models.masks import Masks
from .models.modules import attribute, positions, unsupported
from .models.pooling import read_pooling
from .models.structure import STRUCTURE, read_structure
from .models.weights import from_pretrained
from .run_options import ALL_PIECES, OF_TRAINING, SNAPSHOT, Options
from .saving import load

# For a folder that is damaged or of another kind, transformers, its libraries and pickle raise errors of many classes.
_UNREADABLE = Exception


def to_device(model: nn.Module, device: str = "auto") -> None:
    """Move a model to a device of `Options.device`, by default to the GPU if there is one."""
    model.to(device_of(device))


def training_examples(options: Options) -> Examples:
    """The rows of the training file, or those of the preset on the hub."""
    preset = PRESETS.get(options.task or "")
    if options.train_file is not None:
        with naming("train_file"):
            return load_examples(options.train_file, preset.train_split if preset else "train")
    if preset is None:
        raise SensibertError(f"train_file is missing, want a file or a preset task ({', '.join(PRESETS)})")
    return load_examples(preset.source, preset.train_split)


def vocabulary_texts(options: Options) -> list[str] | None:
    """The texts whose pieces the vocabulary keeps; None if it keeps all."""
    if options.vocabulary in (None, ALL_PIECES):
        return None
    if options.vocabulary == OF_TRAINING:
        return list(texts_of(training_examples(options)))
    with naming("vocabulary"):
        return list(texts_of(load_examples(options.vocabulary)))


def validation_examples(options: Options) -> Examples | None:
    """The rows of the validation file. Without one, those of a preset on the hub if training data comes from there."""
    preset = PRESETS.get(options.task or "")
    if options.validation_file is not None:
        with naming("validation_file"):
            return load_examples(options.validation_file, preset.validation_split if preset else "validation")
    if preset is None or options.train_file is not None:
        return None
    return load_examples(preset.source, preset.validation_split)


def prepared(options: Options, *parts: Examples | None, known: Sequence[str] = ()) -> list[Examples | None]:
    """The parts with the labels of several columns in one, and with names for integers where the options have some.

    known: the classes of an existing model. SensibertError for columns or names that do not fit the labels."""
    columns, data = (options.text_column, options.label_column), [part for part in parts if part is not None]
    if options.task in (None, MULTI_LABEL):
        data = [_joined(options.label_column, part, known) for part in data]
    if options.label_names is not None and data:
        task = get_task(options.task or guess_task(data[0], *columns, named=True))
        if task.name not in LABELLED:
            raise SensibertError(f"label_names: {data[0].name} is read as {task.name}, which has no classes")
        data = named(task, data, columns_of(task, data[0], *columns)[1], options.names_of_labels())
    rest = iter(data)
    return [None if part is None else next(rest) for part in parts]


def _joined(label_column: str | None, examples: Examples, known: Sequence[str]) -> Examples:
    """Without label_column: the columns called after the classes of a model, if there is no column of labels."""
    if label_column is None:
        several = known and not set(LABELS) & set(examples.columns) and set(known) <= set(examples.columns)
        return joined(examples, known, LABELS[0]) if several else examples
    if label_column in examples.columns or "," not in label_column:
        return examples
    names = [name.strip() for name in label_column.split(",")]
    if known and classes.positions_of(known, names) is None:
        raise SensibertError(
            f"label_column is '{label_column}', and the labels of the model are {classes.listed(known)}: want a column "
            "for each"
        )
    return joined(examples, names, label_column)


def outlined(options: Options, train: Examples) -> TaskData:
    """The task of a run and its classes, in the order of the model's head if it has one for them; nothing is encoded.

    SensibertError, showing both, if model and data name their classes differently."""
    if options.task == EMBEDDING:
        with naming("train_file"):
            different_texts(train, options.text_column)
        return EmbeddingData.of_folder(read_pooling(options.model))
    columns = options.text_column, options.label_column
    task = get_task(options.task or guess_task(train, *columns))
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=False)  # `check_family` has read it
    kind, known = task.auto_class_name.removeprefix("AutoModelFor"), config.architectures
    heads = [name for name in ([known] if isinstance(known, str) else known or ()) if _is_class(name)]
    said = any(kind in name for name in heads)
    names = output_names(config, options.model) if said or not heads else []  # a config may not say what the file has
    if said and options.task not in PRESETS and has_one_logit(config, len(names), task.name, train, options):
        return replace(TaskData.outlined("regression", train, *columns), one_logit=True)
    data = TaskData.outlined(task.name, train, *columns, [] if classes.generic(names) else names)
    if classes.positions_of(names, data.label_names) is None:
        _tell_integers(data.label_names, train, columns_of(task, train, *columns)[1])
    if len(names) != len(data.label_names):  # `load_model` makes a new head
        return replace(data, own_names=data.label_names)
    ordered = classes.in_order_of(names, data.label_names, options.model, train.name)
    if said and classes.generic(names) and not classes.generic(data.label_names):
        message = "model: %s numbers its %d classes; they are taken as %s, in this order"
        logging.getLogger("sensibert").warning(message, options.model, len(names), ", ".join(ordered))
    return replace(data, label_names=ordered, own_names=data.label_names)


def _tell_integers(names: list[str], train: Examples, label: str) -> None:
    """Warn of classes that are integers other than 0 to n-1: one of them may stand for a missing label."""
    if names and not classes.generic(names) and all(classes.whole(name) is not None for name in names):
        message = "%s: the classes in column '%s' are the integers %s"
        logging.getLogger("sensibert").warning(message, train.name, label, classes.listed(names))


def has_one_logit(config: PreTrainedConfig, outputs: int, task: str, examples: Examples, options: Options) -> bool:
    """Whether a classifier has one output, the logit of label 1, as rerankers have, and the labels are for it.

    config.problem_type decides; without one, as sentence-transformers leaves it, labels that are all 0 or 1."""
    if outputs != 1 or task not in ("regression", "text-classification") or config.problem_type == "regression":
        return False
    binary = zeros_and_ones(examples, options.text_column, options.label_column, task)
    return binary or (task == "regression" and config.problem_type == LOGIT_PER_LABEL)


def _is_class(name: str) -> bool:
    return hasattr(transformers, name.removeprefix("Sensibert"))


def load_data(options: Options, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Training and validation data as features, with the classes of `outlined`."""
    given = training_examples(options), validation_examples(options)
    if options.task == EMBEDDING:
        return encode_texts(options, tokenizer, *given, options.rows())
    train, validation = prepared(options, *given)
    assert train is not None  # as it was given
    data = outlined(options, train)
    if options.task is None or data.one_logit:
        options = replace(options, task=data.task.name)
    names = data.label_names or None
    encoded = encode(options, tokenizer, train, validation, names, data.one_logit)
    return replace(encoded, own_names=data.own_names)


def encode(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples | None,
    validation: Examples | None,
    names: list[str] | None = None,
    one_logit: bool = False,
) -> TaskData:
    """Encode rows for the task. names: the classes of an existing model; None: those of the training data."""
    columns = options.text_column, options.label_column
    lengths = options.max_length, options.doc_stride
    return TaskData.build(options.task, train, validation, tokenizer, *lengths, *columns, names, one_logit=one_logit)


def validation_rows(
    options: Options, data: TaskData, tokenizer: PreTrainedTokenizerBase, labelled: int | None = None
) -> TaskData:
    """The validation rows of a run in the tokens of another tokenizer. labelled: at most so many, drawn by the seed, as
    training rows: with labels for a loss."""
    examples = prepared(options, validation_examples(options))[0]
    assert examples is not None  # `data` has them
    if options.task is None or data.one_logit:
        options = replace(options, task=data.task.name)
    parts: tuple[Examples | None, Examples | None] = None, examples
    if labelled is not None:
        chosen = np.sort(np.random.default_rng(options.seed).permutation(len(examples))[:labelled])
        columns = {name: [values[i] for i in chosen] for name, values in examples.columns.items()}
        parts = replace(examples, columns=columns), None
    encoded = encode(options, tokenizer, *parts, data.label_names or None, data.one_logit)
    return replace(encoded, own_names=data.own_names)


def encode_texts(
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples | None,
    validation: Examples | None,
    rows: int | None,
) -> EmbeddingData:
    """Encode the texts of an embedding model, at most `rows` of the training file."""
    pooling, columns = read_pooling(options.model), (options.text_column, options.label_column)
    return EmbeddingData.of_texts(
        train, validation, tokenizer, pooling, options.max_length, *columns, rows, options.seed
    )


def check_family(source: str, argument: str = "model") -> None:
    """SensibertError, naming the argument, unless source is a model of a supported family. No code in it is run."""
    want_model_folder(source, argument)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _UNREADABLE as error:
        wrong = "cannot be read" if os.path.exists(source) else "is no folder, and cannot be loaded from the hub"
        raise SensibertError(f"{argument}: {source} {wrong} ({first_line(error)})") from None
    if base_type(config.model_type) not in families():
        raise SensibertError(unsupported(config.model_type, argument))


def load_folder(source: str, argument: str = "model") -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """`load` of a supported family; the SensibertError for anything else names the argument."""
    check_family(source, argument)
    with naming(argument):
        return load(source)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except _UNREADABLE as error:
        raise SensibertError(f"model: no tokenizer in {source} ({first_line(error)})") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers builds an empty one if files are missing
        raise SensibertError(
            f"model: no tokenizer in {source} (its vocabulary is {', '.join(tokenizer.all_special_tokens)})"
        )
    return tokenizer


def load_model(source: str, data: TaskData | None = None) -> PreTrainedModel:
    """A pre-trained encoder in fp32, with a head for the task if data is given.

    SensibertError for an unsupported family, or a folder masked by a grid: training would change its zeros."""
    check_family(source)
    structure = cached_file(source, STRUCTURE, _raise_exceptions_for_missing_entries=False)
    if structure is not None and isinstance(read_structure(structure), Masks):
        raise SensibertError(
            f"model: {source} is masked by a grid, want a model that is not trimmed, or trimmed by units"
        )
    kwargs = {name: value for name, value in data.config_kwargs().items() if value is not None} if data else {}
    try:
        # Not in the dtype of the file: most updates are too small for bf16 weights and moments.
        auto = data.auto_class() if data else AutoModel
        return from_pretrained(auto, source, new_head=True, dtype=torch.float32, trust_remote_code=False, **kwargs)
    except SensibertError as error:
        raise SensibertError(f"model: {error}") from None
    except _UNREADABLE as error:
        raise SensibertError(f"model: cannot load {source} ({first_line(error)})") from None


def output_names(config: PreTrainedConfig, source: str) -> list[str]:
    """The names of the outputs of the head in a folder, in order."""
    names = cast("dict[int, str]", config.id2label)  # a config makes numbers of its keys
    if set(names) != set(range(len(names))):
        keys = ", ".join(map(str, names))
        raise SensibertError(f"model: id2label in its config.json has the keys {keys}, want 0 to {len(names) - 1}")
    listed = [str(names[i]) for i in range(len(names))]
    if classes.generic(listed):  # some files have only label2id, which transformers then overwrites
        try:
            written = PreTrainedConfig.get_config_dict(source)[0].get("label2id") or {}
        except OSError:
            written = {}
        by_id = {i: str(name) for name, i in written.items()}
        listed = [by_id[i] for i in range(len(names))] if set(by_id) == set(names) else listed
    return listed


def check_room(model: PreTrainedModel, data: TaskData, argument: str = "model") -> None:
    """SensibertError for rows longer than the model's positions, or tokens or types that it has no vectors for."""
    parts = [part for part in (data.train, data.validation) if part is not None]
    if not parts:
        return
    longest = max(max(part.lengths) for part in parts)
    if longest > (positions(model) or longest):
        raise SensibertError(
            f"max_length: a row has {longest} tokens, want at most {positions(model)}, the positions of the {argument}"
        )
    pad = data.collator.padding["input_ids"]
    table, types = attribute(model, "get_input_embeddings")(), getattr(model.config, "type_vocab_size", 0)
    known = {
        "input_ids": ("id", "vocabulary", table.num_embeddings),
        "token_type_ids": ("type", "table of types", types),
    }
    for name, (what, where, entries) in known.items():
        highest = max((int(part.per_token[name].max()) for part in parts if name in part.per_token), default=0)
        highest = max(highest, pad) if name == "input_ids" else highest
        if highest >= (entries or highest + 1):  # a model without types ignores them
            raise SensibertError(
                f"{argument}: the tokenizer produces {what} {highest} but the {where} has {entries} entries; "
                "want the model's own tokenizer"
            )


def _want_same_problem(config: PreTrainedConfig, data: TaskData, source: str) -> None:
    """SensibertError if a teacher gives one label a row and the task has several, or the other way round."""
    several = {"single_label_classification": False, LOGIT_PER_LABEL: True}.get(config.problem_type or "")
    if several is None or data.num_labels < 2 or several == (data.task.name == MULTI_LABEL):
        return
    gives = "several labels" if several else "one label"
    raise SensibertError(f"teacher: {source} gives {gives} a row, want a model fine-tuned for {data.task.name}")


def load_teacher(options: Options, data: TaskData, folder: Path) -> nn.Module | None:
    """The given teacher, or the snapshot of this run if it exists; None otherwise.

    Classes in another order than those of the data are reordered. SensibertError for a model of another task."""
    from .training.distillation import Reordered  # with its package comes Trainer, which is slow to import

    if options.teacher is None or (options.teacher == SNAPSHOT and not (folder / SNAPSHOT).exists()):
        return None
    source = str(folder / SNAPSHOT) if options.teacher == SNAPSHOT else options.teacher
    teacher = load_folder(source, "teacher")[0].requires_grad_(False)
    to_device(teacher, options.device)
    kind, outputs = data.task.auto_class_name.removeprefix("AutoModelFor"), output_names(teacher.config, source)
    if kind not in type(teacher).__name__ or len(outputs) != data.num_labels:
        raise SensibertError(
            f"teacher: {source} is a {type(teacher).__name__} with {len(outputs)} outputs, want a model fine-tuned for "
            f"{data.task.name} with {data.num_labels}"
        )
    _want_same_problem(teacher.config, data, source)
    check_room(teacher, data, "teacher")
    own = data.own_names or data.label_names
    # Classes that are only numbered are those of the data, in their own order.
    order = classes.positions_of(own if classes.generic(outputs) else outputs, data.label_names)
    if order is None and data.label_names and not classes.generic(data.label_names):
        theirs, ours = ", ".join(outputs), ", ".join(data.label_names)
        raise SensibertError(f"teacher: {source} has the classes {theirs}, want {ours}")
    if order is None or order == sorted(order):
        return teacher
    return Reordered(teacher, order).eval()
