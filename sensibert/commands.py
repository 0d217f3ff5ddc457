"""One step at a time, from file to file: the commands analyze, trim, eval and export."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .core.arguments import one_of, show
from .core.artifacts import Plan, Sensitivity
from .core.config import LAYOUTS, TrimConfig, parse_shape
from .core.errors import SensibertError, naming
from .core.files import writing
from .core.folder_facts import want_facts
from .core.json_text import parse_json
from .core.output_paths import check_apart, check_file, check_output, try_move
from .core.statistics import STATISTICS
from .data.batching import micro_batches
from .data.embedding_data import EmbeddingData
from .data.files import Examples, load_examples, texts_of
from .data.task_data import LOGIT_PER_LABEL, TaskData
from .data.tasks import EMBEDDING, LABELLED, MULTI_LABEL, PRESETS, Task, get_task
from .decide import cut_once
from .deploy import export_graph
from .deploy.costs import Target, measure_costs, write_probes
from .inputs import (
    check_family,
    check_room,
    encode,
    encode_texts,
    has_one_logit,
    load_folder,
    load_model,
    load_tokenizer,
    output_names,
    prepared,
    to_device,
    training_examples,
    validation_examples,
)
from .models import base_of, layout_of
from .models.embedding import EmbeddingModel
from .models.masks import cost_of
from .planning import plan_result
from .run_options import RECIPE, Options
from .saving.folder import DENSE, export
from .sensitivity import analyze, rank_tensors, sampled_loss
from .training.predict import predict
from .trimming.trim import trim
from .trimming.vocabulary import trim_vocabulary

RANKED_SAMPLES = 64  # rows read for the ranking of whole tensors, which only reports use
_TASK_OF_HEAD = {"QuestionAnswering": "question-answering", "TokenClassification": "token-classification"}


def analyze_file(options: Options) -> tuple[dict, Sensitivity]:
    """Scores of a fine-tuned model on a file, written to options.output."""
    options = options.resolved()
    trim = options.trim
    assert trim.method is not None  # of resolved options
    rule = STATISTICS.get(trim.method)
    if rule is None:
        raise SensibertError(f"method is {trim.method!r}, {one_of(trim.method, STATISTICS)}")
    if rule.data:
        options.want_data()
    inputs = {"model": options.model, "train_file": options.train_file}
    check_file(options.output, options.overwrite, **inputs)
    grid, common, task = trim.parsed_grid(), (sampled_loss, options.seed, options.autocast()), None
    if rule.data:
        model, data = model_and_data(options, "train")
        task, rows = data.task.name, data.train
        assert rows is not None  # of this role

        def batches(samples: int) -> Iterator[dict[str, Tensor]]:
            return micro_batches(rows, data.collator, samples, trim.micro_batch, options.seed)

        scores = analyze(model, batches(trim.samples), trim.method, *common, grid)
        scores = replace(scores, tensors=rank_tensors(model, batches(min(trim.samples, RANKED_SAMPLES)), *common))
    else:
        scores = analyze(load_folder(options.model)[0], (), trim.method, *common, grid)
    check_file(options.output, options.overwrite)  # again: it may have appeared during the analysis
    with writing(options.output):
        scores.save(options.output)
    facts = {"task": task, "model": options.model, "method": trim.method, "grid": trim.grid}
    sizes = {"seed": options.seed, "samples": scores.samples, "encoder_params_before": scores.layout.encoder_params}
    return {**facts, **sizes, "tensors": scores.tensors, "curves": scores.curves, "output": options.output}, scores


def measure_latency(config: TrimConfig, model: str, save: str | None, probes: str | None, overwrite: bool) -> dict:
    """Write a table of what a model's layers cost on this device, or the probes that measure it on another one."""
    if (save is None) == (probes is None):
        raise SensibertError(f"save and probes are {'missing' if save is None else 'both given'}, want one of them")
    target = Target("latency", config.runtime, *parse_shape(config.latency_shape), config.latency_threads)
    if save is not None:
        check_file(save, overwrite, model=model)
    else:
        check_output(str(probes), False)
    check_family(model)
    loaded = load_folder(model)[0] if Path(model).exists() else load_model(model, None)
    if save is None:
        assert probes is not None
        write_probes(loaded, probes, target)
        return {"model": model, "output": probes}
    table = measure_costs(loaded, target)
    with writing(save):
        table.save(save)
    return {"model": model, **table.to_dict(), "of": table.described(), "output": save}


def trim_folder(
    model: str, plan: str, output: str, layout: str, overwrite: bool, dry_run: bool, weights: str | None = None
) -> dict:
    """Trim the model in a folder by a plan file and export it. The plan must have been made for this model."""
    if layout not in LAYOUTS:
        raise SensibertError(f"layout is {layout!r}, {one_of(layout, LAYOUTS)}")
    check_output(output, overwrite)
    check_apart(output, model=model, plan=plan)
    with naming("plan"):
        chosen = Plan.load(plan)
    if not dry_run:
        try_move(output)
    loaded, tokenizer = load_folder(model)
    own, planned = layout_of(loaded), chosen.layout
    if (own.digest, own.family, own.sites, own.encoder_params) != (
        *(planned.digest, planned.family, planned.sites, planned.encoder_params),
    ):
        raise SensibertError(
            f"plan: {plan} comes from the sensitivity of another model than {model} (their weights or shapes differ)"
        )
    if not dry_run:
        trim(loaded, chosen)
        info = {"method": chosen.method, "budget": str(chosen.budget)}
        with writing(output):
            export(loaded, output, tokenizer, layout=layout, overwrite=overwrite, info=info, weights=weights)
    return {"model": model, **plan_result(chosen), "output": None if dry_run else output}


def trim_vocabulary_of(
    model: str, texts: str, output: str, overwrite: bool, dry_run: bool, weights: str | None = None
) -> dict:
    """Keep the pieces of a model folder's vocabulary that the texts of a file need, and export the model."""
    check_output(output, overwrite)
    check_apart(output, model=model, vocabulary=texts)
    with naming("vocabulary"):
        examples = load_examples(texts)
    if not dry_run:
        try_move(output)
    loaded, tokenizer = load_folder(model)
    tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
    before, params = len(tokenizer), cost_of(loaded, "model")[0]
    smaller = trim_vocabulary(loaded, tokenizer, texts_of(examples))
    if not dry_run:
        with writing(output):
            export(loaded, output, smaller, overwrite=overwrite, weights=weights)
    return {
        "model": model,
        "vocabulary_before": before,
        "vocabulary_after": len(smaller),
        "total_params_before": params,
        "total_params_after": cost_of(loaded, "model")[0],
        "output": None if dry_run else output,
    }


def trim_on_data(options: Options, dry_run: bool) -> dict:
    """Trim the model in a folder to a budget on a training file, without training, and export it."""
    if options.train_file is None and options.task not in PRESETS:
        raise SensibertError("plan and train_file are missing, want one of them")
    inputs = {"model": options.model, "train_file": options.train_file}
    check_output(options.output, options.overwrite)
    check_apart(options.output, **inputs)
    options = options.resolved()
    config = options.trim
    if not config.trims:
        raise SensibertError(f"method is {config.method!r}, which trims nothing, want another")
    if not dry_run:
        try_move(options.output)
    model, data = model_and_data(options, "train", embeds=True)
    rows = data.train
    assert rows is not None  # of this role

    def batches(samples: int, size: int) -> Iterator[dict[str, Tensor]]:
        return micro_batches(rows, data.collator, samples, size, options.seed)

    assert options.batch_size is not None  # of resolved options
    samples = min(config.samples, len(rows))
    plan = cut_once(model, config, batches, samples, options.batch_size, options.seed, autocast=options.autocast())
    if not dry_run:
        info: dict[str, object] = {"method": plan.method, "budget": str(plan.budget), "task": data.task.name}
        info["max_length"] = options.max_length or data.task.max_length
        encoder = model.base_model if isinstance(model, EmbeddingModel) else model
        tokenizer = load_tokenizer(options.model)
        with writing(options.output):
            export(
                encoder,
                options.output,
                tokenizer,
                options.layout,
                info=info,
                overwrite=options.overwrite,
                weights=config.weights,
            )
    return {"model": options.model, **plan_result(plan), "output": None if dry_run else options.output}


def _task_of(model: PreTrainedModel, options: Options) -> str:
    """The task of a fine-tuned model: the one requested, the one noted in its folder, or the one of its head."""
    known = options.task or (getattr(model.config, "sensibert", None) or {}).get("task")
    if known:
        return known
    name = type(model).__name__
    for head, task in _TASK_OF_HEAD.items():
        if head in name:
            return task
    if "SequenceClassification" not in name:
        raise SensibertError(f"model: {options.model} is a {name}, want a fine-tuned model with a task head")
    if len(output_names(model.config, options.model)) == 1:
        return "regression"
    return MULTI_LABEL if model.config.problem_type == LOGIT_PER_LABEL else "text-classification"


def _noted_lengths(model: str) -> dict:
    """max_length and doc_stride of the run that wrote a folder, if a run did."""
    folder = Path(model)
    for recipe in (folder / RECIPE, folder.parent / RECIPE) if folder.name == DENSE else (folder / RECIPE,):
        try:
            settings = parse_json(recipe.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise SensibertError(f"{recipe}: cannot be read ({str(error).splitlines()[0]})") from None
        if not isinstance(settings, dict):
            raise SensibertError(f"{recipe} holds {show(settings)}, want an object of settings")
        lengths = {name: settings[name] for name in ("max_length", "doc_stride") if settings.get(name)}
        want_facts(lengths, str(recipe))
        return lengths
    return {}


def model_and_data(
    options: Options, role: str, embeds: bool = False
) -> tuple[PreTrainedModel | EmbeddingModel, TaskData]:
    """A fine-tuned model and one file for it, encoded as `train` or `validation` with the model's own labels.

    embeds: whether a model without a head counts as an embedding model."""
    if role == "validation" and options.validation_file is None and options.task not in PRESETS:
        raise SensibertError(f"validation_file is missing, want a file or a preset task ({', '.join(PRESETS)})")
    examples = training_examples(options) if role == "train" else validation_examples(options)
    model, tokenizer = load_folder(options.model, "model" if role == "train" else "folder")
    if role == "validation":
        model.float()  # scores are those of the weights, whatever a CPU does with 16 bits
    if tokenizer is None:
        tokenizer = load_tokenizer(options.model)
    noted = _noted_lengths(options.model) | (getattr(model.config, "sensibert", None) or {})
    options = replace(options, max_length=options.max_length or noted.get("max_length"))
    train, validation = (examples, None) if role == "train" else (None, examples)
    embeds = embeds and options.task is None and base_of(model) is model
    if embeds or (options.task or noted.get("task")) == EMBEDDING:
        options = replace(options, task=EMBEDDING)  # refuses the methods that its loss rules out
        return _embedding_model_and_data(options, model, tokenizer, train, validation)
    if base_of(model) is model:
        raise SensibertError(f"model: {options.model} has no task head, want a fine-tuned model (sensibert finetune)")
    options = replace(options, doc_stride=noted.get("doc_stride") if options.doc_stride is None else options.doc_stride)
    name, names = _task_of(model, options), output_names(model.config, options.model)
    assert examples is not None  # both files were asked for above
    if one_logit := has_one_logit(model.config, len(names), get_task(name).name, examples, options):
        name, model.config.problem_type = "regression", LOGIT_PER_LABEL
    options = replace(options.resolved(), task=name)
    task = get_task(name)
    if task.auto_class_name.removeprefix("AutoModelFor") not in type(model).__name__:
        raise SensibertError(f"task is {task.name!r}, but {options.model} holds a {type(model).__name__}")
    if task.name == "regression" and len(names) != 1:
        raise SensibertError(f"task is 'regression', but {options.model} has {len(names)} classes, want 1 output")
    _want_problem_of(task, model, options.model)
    classes = names if task.name in LABELLED else None
    if task.name == "question-answering" and len(names) != 2:
        raise SensibertError(f"task is {task.name!r}, but {options.model} has {len(names)} outputs, want 2")
    if classes is not None and len(classes) < 2:
        raise SensibertError(f"task is {task.name!r}, but {options.model} has 1 output, want at least 2 classes")
    train, validation = prepared(options, train, validation, known=classes or ())
    data = encode(options, tokenizer, train, validation, classes, one_logit)
    check_room(model, data)
    to_device(model)
    return model, data


def _want_problem_of(task: Task, model: PreTrainedModel, source: str) -> None:
    """SensibertError if a classifier was trained for one label a row and the task has several, or the other way."""
    known = model.config.problem_type
    if task.name == MULTI_LABEL and known == "single_label_classification":
        raise SensibertError(f"task is {task.name!r}, but {source} gives one label a row, want text-classification")
    if task.name == "text-classification" and known == LOGIT_PER_LABEL:
        raise SensibertError(f"task is {task.name!r}, but {source} gives several labels a row, want {MULTI_LABEL}")
    if task.name == MULTI_LABEL:
        model.config.problem_type = LOGIT_PER_LABEL  # some models leave it out


def _embedding_model_and_data(
    options: Options,
    loaded: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples | None,
    validation: Examples | None,
) -> tuple[EmbeddingModel, EmbeddingData]:
    """The training texts, which an analysis reads, have the model's own embeddings as labels."""
    encoder = base_of(loaded)
    assert isinstance(encoder, PreTrainedModel)  # as the base model of every model in transformers
    data = encode_texts(options, tokenizer, train, validation, options.trim.samples)
    check_room(encoder, data)
    model = EmbeddingModel(encoder, data.pooling)
    to_device(model)
    if train is not None:
        autocast = options.autocast()
        data = data.with_labels(lambda texts: np.asarray(predict(model, texts, data.collator, autocast=autocast)))
    return model, data


def evaluate_folder(options: Options) -> dict:
    """Metrics of a model folder on a file."""
    started = time.perf_counter()
    model, data = model_and_data(options, "validation")
    assert data.validation is not None  # of this role
    logits = predict(model, data.validation, data.collator, autocast=options.autocast())
    return {
        "task": data.task.name,
        "model": options.model,
        "encoder_params_after": cost_of(model, "encoder")[0],
        "total_params_after": cost_of(model, "model")[0],
        "metrics": data.compute_metrics(logits),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
    }


def export_folder(options: Options, to: str, int8: bool, fp16_embeddings: bool, max_loss: float) -> dict:
    """Write the graph of a model folder for a runtime. With a validation file the model and its graphs are scored."""
    check_apart(options.output, folder=options.model, validation_file=options.validation_file)
    check_output(options.output, options.overwrite)
    try_move(options.output)
    score = None
    model: PreTrainedModel | EmbeddingModel
    if options.validation_file is None and options.task not in PRESETS:
        model, tokenizer = load_folder(options.model, "folder")
    else:
        model, data = model_and_data(options, "validation", embeds=True)
        tokenizer, main = None, data.task.main_metric

        def score(module: nn.Module) -> dict[str, float]:
            whole = EmbeddingModel(module, data.pooling) if isinstance(data, EmbeddingData) else module
            assert data.validation is not None  # of this role
            metrics = data.compute_metrics(predict(whole, data.validation, data.collator))
            return {main: metrics[main], **metrics} if main in metrics else metrics

    encoder = model.base_model if isinstance(model, EmbeddingModel) else model
    tokenizer = load_tokenizer(options.model) if tokenizer is None else tokenizer
    return export_graph(
        encoder, options.output, to, tokenizer, int8, fp16_embeddings, score, max_loss, options.overwrite
    )
