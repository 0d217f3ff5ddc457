"""What a run would do, from its options, model and data: `sensibert finetune --dry-run`. Nothing is written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from .core import cost
from .core.errors import SensibertError
from .data.columns import columns_of
from .data.embedding_data import EmbeddingData, text_columns, training_texts
from .data.files import Examples
from .data.task_data import TaskData
from .data.tasks import EMBEDDING, get_task
from .inputs import (
    check_family,
    check_room,
    encode,
    encode_texts,
    load_model,
    load_tokenizer,
    outlined,
    prepared,
    to_device,
    training_examples,
    validation_examples,
    vocabulary_texts,
)
from .models import layout_of
from .models.embedding import EmbeddingModel
from .recipe import check_place
from .run_options import OF_TRAINING, Options
from .trainer_arguments import check_run, training_arguments
from .training.predict import predict
from .training.timing import STEPS, step_seconds

SHOWN_CLASSES = 10
FORWARD = 1 / 3  # of the time of a step: a pass without gradients


def outline(options: Options) -> dict:
    """Describe a run from its options, model and local files. Nothing is written, and of a preset nothing is fetched.

    With a training file, a few steps are timed on some of its rows."""
    check_run(options)
    options = options.resolved()
    check_place(options)
    train = training_examples(options) if options.train_file else None
    validation = validation_examples(options) if options.validation_file else None
    if options.vocabulary != OF_TRAINING:
        vocabulary_texts(options)  # names a file that cannot be read
    check_family(options.model)
    if options.task != EMBEDDING and train:
        train, validation = prepared(options, train, validation)
        assert train is not None  # what goes in comes out
    data = outlined(options, train) if train else None
    task = data.task.name if data else options.task
    assert task is not None  # options without a training file name a preset
    model = load_model(options.model, data)
    layout, trim, known = layout_of(model), options.trim, get_task(task)
    schedule = trim.schedule.for_task(known.recovery, known.trim_start)
    budget, counts = trim.parsed_budget(), cost.counts_of(layout)
    budgets = options.parsed_budgets() or ([budget] if trim.trims and not options.keep else [])
    counted = [each for each in budgets if each.table is not None or not each.measured]  # others: in the run
    limits = [cost.want_reach(layout, each, trim.parsed_grid()) for each in counted]
    facts = {
        "task": known.name,
        "model": options.model,
        "family": layout.family,
        "train_rows": len(train) if train else None,
        "validation_rows": len(validation) if validation else None,
        **(_columns(options, known.name, train) if train else {}),
        "classes": data.label_names if data and data.label_names else None,
        "method": trim.method,
        "budget": str(budget) if trim.trims and not (options.budgets or options.keep) else None,
        "budgets": options.budgets,
        "keep": options.keep,
        "baseline": options.baseline or options.keep is not None or None,
        "weights": trim.weights,
        "vocabulary": options.vocabulary,
        "scope": trim.scope,
        "grid": trim.grid,
        "encoder_params_before": layout.encoder_params,
        "total_params_before": layout.total_params,
        "flops_before": cost.flops(layout, counts, budget.scope, 1, budget.length),
        "limit": limits[0] if len(limits) == 1 else ", ".join(f"{limit:,}" for limit in limits) or None,
        "schedule": schedule.shape if trim.trims else None,
        "cut_after": f"{100 * schedule.start():.0f} % of the steps" if trim.trims else None,
        "epochs": options.epochs if options.max_steps == -1 else None,
        "steps": options.max_steps if options.max_steps != -1 else None,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
    }
    if train and data:
        left = cost.encoder_left(layout, counted[0]) if len(counted) == 1 and trim.parsed_grid() is None else 1.0
        whole = schedule.start() if trim.trims else 1.0
        scored = 2 * len(validation) if validation else 0  # at the cut and at the end
        facts |= _steps_and_time(options, model, data, train, whole + (1 - whole) * left, scored)
    return {**facts, "output": options.output}


def described(facts: dict) -> dict:
    """The facts of `outline` as lines for a person: few classes, and the time in words."""
    lines = dict(facts)
    if classes := facts["classes"]:
        more = f", ... ({len(classes)} in all)" if len(classes) > SHOWN_CLASSES else ""
        lines["classes"] = ", ".join(classes[:SHOWN_CLASSES]) + more
    if facts.get("text_columns"):
        lines["text_columns"] = ", ".join(facts["text_columns"])
    if (seconds := lines.pop("estimated_seconds", None)) is not None:
        timed = lines.pop("timed_steps")
        lines["time"] = f"about {_in_words(seconds)} (an estimate from {timed} steps of this model on this machine)"
    return lines


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _columns(options: Options, task: str, train: Examples) -> dict[str, object]:
    """The columns that the run reads."""
    if task == EMBEDDING:
        return {"text_columns": text_columns(train, options.text_column), "label_column": None}
    texts, label = columns_of(get_task(task), train, options.text_column, options.label_column)
    return {"text_columns": list(texts), "label_column": label}


def _steps_and_time(
    options: Options, model: PreTrainedModel, data: TaskData, train: Examples, share: float, scored: int
) -> dict[str, object]:
    """Steps of the run and an estimate of its seconds. share: of the time of an untrimmed run that training takes.
    scored: rows of which logits are computed."""
    assert options.batch_size is not None and options.epochs is not None  # of resolved options
    per_step = options.batch_size * options.gradient_accumulation
    encoded, rows_in_all = _some_rows(options, data, train, (1 + STEPS) * per_step)
    check_room(model, encoded)
    to_device(model, options.device)
    timed: PreTrainedModel | EmbeddingModel = model
    if isinstance(encoded, EmbeddingData):
        timed = whole = EmbeddingModel(model, encoded.pooling)
        collator, autocast = encoded.collator, options.autocast()
        encoded = replace(encoded, validation=None)
        encoded = encoded.with_labels(lambda rows: np.asarray(predict(whole, rows, collator, autocast=autocast)))
    assert encoded.train is not None  # of training rows
    arguments = training_arguments(options, Path(options.output))
    seconds, number = step_seconds(timed, encoded.train, encoded.collator, arguments, options.packing)
    a_pass = math.ceil(math.ceil(rows_in_all / options.batch_size) / options.gradient_accumulation)
    steps = options.max_steps if options.max_steps != -1 else math.ceil(options.epochs * a_pass)
    scored += rows_in_all if isinstance(encoded, EmbeddingData) else 0  # the original's embeddings are the labels
    in_all = seconds * (steps * share + scored / per_step * FORWARD)
    return {"steps": steps, "estimated_seconds": round(in_all, 3), "timed_steps": number}


def _some_rows(options: Options, data: TaskData, train: Examples, number: int) -> tuple[TaskData, int]:
    """About this many rows of the training file, encoded, and how many the whole file has then: a question has a row
    for each window of its context, an embedding model reads each text once."""
    tokenizer = load_tokenizer(options.model)
    if isinstance(data, EmbeddingData):
        texts = training_texts(train, options.text_column)
        return encode_texts(options, tokenizer, train, None, number), min(texts, options.rows() or texts)
    chosen = np.sort(np.random.default_rng(options.seed).permutation(len(train))[:number])
    some = replace(train, columns={name: [values[i] for i in chosen] for name, values in train.columns.items()})
    options = replace(options, task=data.task.name) if options.task is None or data.one_logit else options
    names = data.label_names or None
    try:
        encoded = encode(options, tokenizer, some, None, names, data.one_logit)
    except SensibertError:
        encode(options, tokenizer, train, None, names, data.one_logit)  # names the row by its number in the file
        raise
    assert encoded.train is not None
    return encoded, round(len(train) * len(encoded.train) / len(chosen))
