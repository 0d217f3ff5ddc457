"""One step at a time, from file to file: the commands analyze, plan, trim, eval and inspect, and a dry run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .allocation.allocate import allocate
from .core import cost
from .core.arguments import fraction, one_of
from .core.artifacts import BlockPlan, Plan, Sensitivity
from .core.config import LAYOUTS, TrimConfig, grid_name
from .core.errors import SensibertError, naming
from .core.files import write_atomically, writing
from .core.statistics import STATISTICS
from .data.batching import micro_batches
from .data.embedding_data import EmbeddingData
from .data.files import Examples, load_examples
from .data.task_data import ONE_LOGIT, TaskData
from .data.tasks import EMBEDDING, PRESETS, get_task
from .decide import cut_once
from .deploy import export_graph
from .inputs import (
    check_family,
    check_room,
    encode,
    encode_texts,
    has_one_logit,
    load_folder,
    load_model,
    load_tokenizer,
    outlined,
    output_names,
    to_device,
    training_examples,
    validation_examples,
)
from .models import base_of, layout_of
from .models.embedding import EmbeddingModel
from .models.masks import cost_of, masks_of
from .models.structure import is_trimmed
from .recipe import RECIPE, RESULT, check_place
from .report.page import page
from .run_options import Options
from .saving.folder import DENSE, export, zero_filled
from .saving.output_paths import check_apart, check_file, check_output
from .sensitivity import analyze, rank_tensors, sampled_loss
from .trainer_arguments import check_run
from .training.predict import predict
from .trimming.trim import trim
from .trimming.vocabulary import trim_vocabulary

RANKED_SAMPLES = 64  # rows read for the ranking of whole tensors, which only reports use
_TASK_OF_HEAD = {"QuestionAnswering": "question-answering", "TokenClassification": "token-classification"}


def outline(options: Options) -> dict:
    """Describe a run from its options, model and local files. Nothing is written, encoded or trained."""
    check_run(options)
    options = options.resolved()
    check_place(options)
    train = training_examples(options) if options.train_file else None
    validation = validation_examples(options) if options.validation_file else None
    check_family(options.model)
    data = outlined(options, train) if train else None  # of a preset nothing is fetched
    task = data.task.name if data else options.task
    assert task is not None  # options without a training file name a preset
    layout, trim, known = layout_of(load_model(options.model, data)), options.trim, get_task(task)
    schedule = trim.schedule.for_task(known.recovery, known.trim_start)
    budget, counts = trim.parsed_budget(), cost.counts_of(layout)
    return {
        "task": known.name,
        "model": options.model,
        "family": layout.family,
        "train_rows": len(train) if train else None,
        "validation_rows": len(validation) if validation else None,
        "method": trim.method,
        "budget": str(budget) if trim.trims else None,
        "scope": trim.scope,
        "grid": trim.grid,
        "encoder_params_before": layout.encoder_params,
        "total_params_before": layout.total_params,
        "flops_before": cost.flops(layout, counts, budget.scope, 1, budget.length),
        "limit": cost.want_reach(layout, budget, trim.parsed_grid()) if trim.trims else None,
        "schedule": schedule.shape if trim.trims else None,
        "cut_after": f"{100 * schedule.start():.0f} % of the steps" if trim.trims else None,
        "epochs": options.epochs if options.max_steps == -1 else None,
        "steps": options.max_steps if options.max_steps != -1 else None,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "output": options.output,
    }


def analyze_file(options: Options) -> tuple[dict, Sensitivity]:
    """Scores of a fine-tuned model on a file, written to options.output."""
    options = options.resolved()
    trim = options.trim
    assert trim.method is not None  # of resolved options
    rule = STATISTICS.get(trim.method)
    if rule is None:
        raise SensibertError(f"method is {trim.method!r}, {one_of(trim.method, STATISTICS)}")
    if rule.data:
        options.want_train_data()
    inputs = {"model": options.model, "train_file": options.train_file}
    check_file(options.output, options.overwrite, **inputs)
    grid, common, task = trim.parsed_grid(), (sampled_loss, options.seed, options.autocast()), None
    if rule.data:
        model, data = _model_and_data(options, "train")
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


def plan_file(
    sensitivity: str, output: str | None, config: TrimConfig, overwrite: bool, dry_run: bool
) -> tuple[dict, Plan]:
    """Plan for config's budget from a sensitivity file, and write it to output. Returns (facts for `--json`, plan)."""
    if output is None and not dry_run:
        raise SensibertError("output is missing, want a file to write, or --dry-run")
    if output is not None:
        check_file(output, overwrite, sensitivity=sensitivity)
    with naming("sensitivity"):
        scores = Sensitivity.load(sensitivity)
    budget = config.parsed_budget()
    cost.want_reach(scores.layout, budget, scores.grid)
    plan = allocate(scores, budget, config.width_multiple, config.allocation)
    if output is not None and not dry_run:
        with writing(output):
            plan.save(output)
    return {**plan_result(plan), "output": None if dry_run else output}, plan


def plan_result(plan: Plan) -> dict:
    """The facts of a plan, under the names of result.json."""
    budget, sizes = plan.budget, {}
    for when, cost_in in (("before", partial(cost.cost_of_units, plan.layout, None)), ("after", plan.cost)):
        for name, scope in (("encoder_params", "encoder"), ("total_params", "model")):
            sizes[f"{name}_{when}"] = cost_in(scope)[0]
        sizes[f"flops_{when}"] = cost_in(budget.scope, budget.length)[1]
    grid = plan.grid if isinstance(plan, BlockPlan) else None
    facts = {"method": plan.method, "budget": str(budget), "scope": budget.scope, "grid": grid_name(grid)}
    return {**facts, **sizes, "flops_length": budget.length}


def trim_folder(model: str, plan: str, output: str, layout: str, overwrite: bool, dry_run: bool) -> dict:
    """Trim the model in a folder by a plan file and export it. The plan must have been made for this model."""
    if layout not in LAYOUTS:
        raise SensibertError(f"layout is {layout!r}, {one_of(layout, LAYOUTS)}")
    check_output(output, overwrite)
    check_apart(output, model=model, plan=plan)
    with naming("plan"):
        chosen = Plan.load(plan)
    loaded, tokenizer = load_folder(model)
    if layout_of(loaded).digest != chosen.layout.digest:
        raise SensibertError(
            f"plan: {plan} comes from the sensitivity of another model than {model} (their weights or shapes differ)"
        )
    if not dry_run:
        trim(loaded, chosen)
        info = {"method": chosen.method, "budget": str(chosen.budget)}
        with writing(output):
            export(loaded, output, tokenizer, layout=layout, overwrite=overwrite, info=info)
    return {"model": model, **plan_result(chosen), "output": None if dry_run else output}


def trim_vocabulary_of(model: str, texts: str, output: str, overwrite: bool, dry_run: bool) -> dict:
    """Keep the pieces of a model folder's vocabulary that the texts of a file need, and export the model."""
    check_output(output, overwrite)
    check_apart(output, model=model, vocabulary=texts)
    with naming("vocabulary"):
        examples = load_examples(texts)
    loaded, tokenizer = load_folder(model)
    tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
    before, params = len(tokenizer), cost_of(loaded, "model")[0]
    smaller = trim_vocabulary(loaded, tokenizer, texts_of(examples))
    if not dry_run:
        with writing(output):
            export(loaded, output, smaller, overwrite=overwrite)
    return {
        "model": model,
        "vocabulary_before": before,
        "vocabulary_after": len(smaller),
        "total_params_before": params,
        "total_params_after": cost_of(loaded, "model")[0],
        "output": None if dry_run else output,
    }


def texts_of(examples: Examples) -> Iterator[str]:
    """Every text of every column; words that are apart are joined by spaces."""
    for column in examples.columns.values():
        for value in column:
            if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
                yield " ".join(value)
            elif isinstance(value, str) and value:
                yield value


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
    model, data = _model_and_data(options, "train", embeds=True)
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
            export(encoder, options.output, tokenizer, options.layout, info=info, overwrite=options.overwrite)
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
    return "regression" if len(output_names(model.config, options.model)) == 1 else "text-classification"


def _noted_lengths(model: str) -> dict:
    """max_length and doc_stride of the run that wrote a folder, if a run did."""
    folder = Path(model)
    for recipe in (folder / RECIPE, folder.parent / RECIPE) if folder.name == DENSE else (folder / RECIPE,):
        try:
            settings = json.loads(recipe.read_text())
            return {name: settings[name] for name in ("max_length", "doc_stride") if settings.get(name)}
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return {}


def _model_and_data(
    options: Options, role: str, embeds: bool = False
) -> tuple[PreTrainedModel | EmbeddingModel, TaskData]:
    """A fine-tuned model and one file for it, encoded as `train` or `validation` with the model's own labels.

    embeds: whether a model without a head counts as an embedding model."""
    if role == "validation" and options.validation_file is None and options.task not in PRESETS:
        raise SensibertError(f"validation_file is missing, want a file or a preset task ({', '.join(PRESETS)})")
    examples = training_examples(options) if role == "train" else validation_examples(options)
    model, tokenizer = load_folder(options.model, "model" if role == "train" else "folder")
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
        name, model.config.problem_type = "regression", ONE_LOGIT
    options = replace(options.resolved(), task=name)
    task = get_task(name)
    if task.auto_class_name.removeprefix("AutoModelFor") not in type(model).__name__:
        raise SensibertError(f"task is {task.name!r}, but {options.model} holds a {type(model).__name__}")
    if task.name == "regression" and len(names) != 1:
        raise SensibertError(f"task is 'regression', but {options.model} has {len(names)} classes, want 1 output")
    classes = names if task.name in ("text-classification", "token-classification") else None
    if task.name == "question-answering" and len(names) != 2:
        raise SensibertError(f"task is {task.name!r}, but {options.model} has {len(names)} outputs, want 2")
    if classes is not None and len(classes) < 2:
        raise SensibertError(f"task is {task.name!r}, but {options.model} has 1 output, want at least 2 classes")
    data = encode(options, tokenizer, train, validation, classes, one_logit)
    check_room(model, data)
    to_device(model)
    return model, data


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
    model, data = _model_and_data(options, "validation")
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


def export_folder(options: Options, to: str, int8: bool, fp16_embeddings: bool, max_loss: str) -> dict:
    """Write the graph of a model folder for a runtime. With a validation file the model and its graphs are scored."""
    check_apart(options.output, folder=options.model, validation_file=options.validation_file)
    score, bound = None, fraction("max_loss", max_loss)
    model: PreTrainedModel | EmbeddingModel
    if options.validation_file is None and options.task not in PRESETS:
        model, tokenizer = load_folder(options.model, "folder")
    else:
        model, data = _model_and_data(options, "validation", embeds=True)
        tokenizer, main = None, data.task.main_metric

        def score(module: nn.Module) -> dict[str, float]:
            whole = EmbeddingModel(module, data.pooling) if isinstance(data, EmbeddingData) else module
            assert data.validation is not None  # of this role
            metrics = data.compute_metrics(predict(whole, data.validation, data.collator))
            return {main: metrics[main], **metrics} if main in metrics else metrics

    encoder = model.base_model if isinstance(model, EmbeddingModel) else model
    tokenizer = load_tokenizer(options.model) if tokenizer is None else tokenizer
    return export_graph(encoder, options.output, to, tokenizer, int8, fp16_embeddings, score, bound, options.overwrite)


# Facts that only result.json has; null for a folder that was trimmed without a run.
_NOTED = (
    *("task", "method", "budget", "scope", "seed", "steps", "metrics", "metrics_at_cut", "seconds", "samples"),
    *("warnings", "throughput", "evaluations", "best_step", "latency", "mb_before", "mb_after"),
)


def report_folder(folder: str, output: str | None) -> dict:
    """Write the HTML page of a trimmed model folder; by default into its folder `report`."""
    facts, path = inspect_folder(folder), Path(folder)
    scores, target = path / "sensitivity.safetensors", Path(output) if output else path / "report" / "report.html"
    sensitivity = Sensitivity.load(scores) if scores.exists() else None
    sizes = [file.stat().st_size for file in path.glob("*.safetensors") if file.name.startswith("model")]
    text = page(facts, sensitivity, sum(sizes) / 1e6 if sizes else None)
    with writing(target):
        if output is None:
            target.parent.mkdir(exist_ok=True)
        write_atomically(target, lambda part: Path(part).write_text(text, encoding="utf-8"))
    return {"model": folder, "output": str(target)}


def inspect_folder(folder: str) -> dict:
    """Sizes, origin and layers of a trimmed model folder, under the names of result.json."""
    model, _ = load_folder(folder, "folder")
    layout = layout_of(model)
    masks = masks_of(model)
    grid = masks.grid if masks is not None else None
    before = layout_of(zero_filled(model)) if is_trimmed(model) else layout
    entry, result_file = getattr(model.config, "sensibert", None) or {}, Path(folder) / RESULT
    try:
        known = json.loads(result_file.read_text()) if result_file.exists() else {}
    except (OSError, ValueError) as error:
        raise SensibertError(f"{result_file}: cannot be read ({str(error).splitlines()[0]})") from None
    rows: dict[int, dict] = {}
    for now, then in zip(layout.sites, before.sites, strict=True):
        row = rows.setdefault(now.layer, {"layer": now.layer})
        name = "heads" if now.kind == "head" else "ffn"
        row |= {name: now.units, f"{name}_of": then.units}
    if "metrics_dense" in known:  # its name up to version 0.1
        known["metrics_at_cut"] = known.pop("metrics_dense")
    noted = {name: known.get(name, entry.get(name)) for name in _NOTED}
    scope, length = noted["scope"] or "encoder", known.get("flops_length", TrimConfig.flops_length)
    sizes = {
        "encoder_params_before": before.encoder_params,
        "encoder_params_after": cost_of(model, "encoder")[0],
        "total_params_before": before.total_params,
        "total_params_after": cost_of(model, "model")[0],
        "flops_before": cost.flops(before, cost.counts_of(before), scope, 1, length),
        "flops_after": cost_of(model, scope, length)[1],
        "flops_length": length,
    }
    facts = {
        "model": folder,
        "family": layout.family,
        **noted,
        "grid": grid_name(grid),
        **sizes,
    }
    weights = cost.kept_by_weight(layout, masks.keep, masks.grid) if masks is not None else []
    tensors = [{"tensor": name, "kept": kept, "of": of} for name, kept, of in weights]
    return {**facts, "layers": list(rows.values()), "tensors": tensors}
