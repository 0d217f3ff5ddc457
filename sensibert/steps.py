"""The verbs one at a time, from file to file: what the commands analyze, plan, trim, eval and inspect do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from . import cost
from .artifacts import Budget, Layout, Plan, Sensitivity
from .checkpoints import check_output
from .errors import SensibertError
from .models import base_of, describe
from .models.structure import is_trimmed
from .options import PRECISIONS, Options, load_model, load_tokenizer
from .pipeline.allocate import allocate
from .pipeline.analyze import STATISTICS, analyze, rank_tensors
from .pipeline.export import dense, export, load
from .pipeline.finetune import predict
from .pipeline.trim import trim
from .recipe import RANKED_SAMPLES, RESULT, micro_batches
from .tasks import TaskData, load_examples, sampled_loss

_TASK_OF_HEAD = {"QuestionAnswering": "question-answering", "TokenClassification": "token-classification"}


def write(save: Callable[[str], object], path: str) -> None:
    """save(path), with the system's refusal as a SensibertError."""
    try:
        save(path)
    except OSError as error:
        raise SensibertError(f"output: cannot write {path} ({error.strerror or error})") from None


def outline(options: Options) -> dict:
    """What a run would do, told from options and model alone: nothing is written, no data is read."""
    options.check()
    options = options.resolved()
    layout = describe(load_model(options.model))
    budget, counts = options.parsed_budget(), cost.counts_of(layout)
    return {
        "model": options.model,
        "family": layout.family,
        "method": options.method,
        "budget": str(budget),
        "scope": options.scope,
        "encoder_params_before": layout.encoder_params,
        "total_params_before": layout.total_params,
        "flops_before": cost.flops(layout, counts, budget.scope, 1, budget.length),
        "limit": cost.limit(layout, budget) if options.method != "dense" else None,
        "schedule": options.schedule.shape,
        "cut_after": f"{100 * options.schedule.warm_share:.0f} % of the steps",
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "output": options.output,
    }


def analyze_file(options: Options) -> Sensitivity:
    """Scores of a fine-tuned model on a file, written to options.output."""
    options.check(needs_data=STATISTICS.get(options.method) is None or STATISTICS[options.method].data)
    if options.method == "dense":
        raise SensibertError(f"method is 'dense', want one of {', '.join(STATISTICS)}")
    if not STATISTICS[options.method].data:
        found = analyze(load_model(options.model), (), options.method, seed=options.seed)
    else:
        model, data = _model_and_data(options, options.train_file, "train")
        autocast = PRECISIONS[options.precision]

        def batches(samples: int):
            return micro_batches(data.train, data.collator, samples, options.micro_batch, options.seed)

        found = analyze(model, batches(options.samples), options.method, sampled_loss, options.seed, autocast)
        few = min(options.samples, RANKED_SAMPLES)
        found = replace(found, tensors=rank_tensors(model, batches(few), sampled_loss, options.seed, autocast))
    write(found.save, options.output)
    return found


def plan_file(sensitivity: str, budget: str, scope: str, length: int, step: int | None, policy: str) -> Plan:
    return allocate(Sensitivity.load(sensitivity), Budget.parse(budget, scope, length), step, policy)


def _sizes(layout: Layout, keep: dict | None, budget: Budget) -> dict:
    counts, whole = cost.counts_of(layout, keep), cost.counts_of(layout)
    sizes = {}
    for name, scope in (("encoder_params", "encoder"), ("total_params", "model")):
        sizes[f"{name}_before"] = cost.params(layout, whole, scope)
        sizes[f"{name}_after"] = cost.params(layout, counts, scope)
    for name, numbers in (("before", whole), ("after", counts)):
        sizes[f"flops_{name}"] = cost.flops(layout, numbers, budget.scope, 1, budget.length)
    return {**sizes, "flops_length": budget.length}


def plan_result(plan: Plan) -> dict:
    """The plan in the words of result.json."""
    sizes = _sizes(plan.layout, plan.keep, plan.budget)
    return {"method": plan.method, "budget": str(plan.budget), "scope": plan.budget.scope, **sizes}


def trim_folder(model: str, plan: str, output: str, layout: str, overwrite: bool, dry_run: bool) -> dict:
    """Cut the model in a folder by a plan file and export it. The plan must have been made for this very model."""
    chosen = Plan.load(plan)
    if not dry_run:
        check_output(output, overwrite)
    found, tokenizer = load(model)
    if describe(found).digest != chosen.layout.digest:
        raise SensibertError(f"plan: {plan} was made for another model than {model} (their weights or shapes differ)")
    if not dry_run:
        trim(found, chosen)
        info = {"method": chosen.method, "budget": str(chosen.budget)}
        export(found, output, tokenizer, layout=layout, overwrite=overwrite, info=info)
    return {"model": model, **plan_result(chosen), "output": None if dry_run else output}


def _task_of(model: nn.Module, options: Options) -> str:
    """The task a fine-tuned model was made for: what was asked, what its folder says, or what its head tells."""
    noted = (getattr(model.config, "sensibert", None) or {}).get("task")
    if options.task or noted:
        return options.task or noted
    name = type(model).__name__
    for head, task in _TASK_OF_HEAD.items():
        if head in name:
            return task
    if "SequenceClassification" not in name:
        raise SensibertError(f"model: {options.model} is a {name}, want a fine-tuned model with a task head")
    return "regression" if model.config.num_labels == 1 else "text-classification"


def _model_and_data(options: Options, file: str | None, role: str) -> tuple[nn.Module, TaskData]:
    """A fine-tuned model and one file for it, encoded as `train` or `validation` with the model's own labels."""
    if file is None:
        raise SensibertError(f"{role}_file is missing, want a file to read")
    examples = load_examples(file)
    model, tokenizer = load(options.model)
    if tokenizer is None:
        tokenizer = load_tokenizer(options.model)
    if base_of(model) is model:
        raise SensibertError(f"model: {options.model} has no task head, want a fine-tuned model (sensibert finetune)")
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    task = _task_of(model, options)
    data = TaskData.build(
        task,
        examples if role == "train" else None,
        examples if role == "validation" else None,
        tokenizer,
        options.max_length,
        options.doc_stride,
        options.text_column,
        options.label_column,
        names if task in ("text-classification", "token-classification") else None,
    )
    return model, data


def evaluate_folder(options: Options) -> dict:
    """Metrics of a model folder on a file."""
    started = time.perf_counter()
    model, data = _model_and_data(options, options.validation_file, "validation")
    logits = predict(model, data.validation, data.collator, autocast=PRECISIONS[options.precision])
    layout = describe(model)
    return {
        "task": data.task.name,
        "model": options.model,
        "encoder_params_after": layout.encoder_params,
        "total_params_after": layout.total_params,
        "metrics": data.compute_metrics(logits),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
    }


def inspect_folder(folder: str) -> dict:
    """Sizes, origin and layers of a trimmed model folder, in the words of result.json."""
    model, _ = load(folder)
    layout = describe(model)
    before = describe(dense(model)) if is_trimmed(model) else layout
    entry = getattr(model.config, "sensibert", None) or {}
    result_file = Path(folder) / RESULT
    known = json.loads(result_file.read_text()) if result_file.exists() else {}
    rows: dict[int, dict] = {}
    for now, then in zip(layout.sites, before.sites, strict=True):
        row = rows.setdefault(now.layer, {"layer": now.layer})
        name = "heads" if now.kind == "head" else "ffn"
        row |= {name: now.units, f"{name}_of": then.units}
    facts = {name: known.get(name, entry.get(name)) for name in ("task", "method", "budget", "seed")}
    sizes = {
        "encoder_params_before": before.encoder_params,
        "encoder_params_after": layout.encoder_params,
        "total_params_before": before.total_params,
        "total_params_after": layout.total_params,
    }
    facts = {"model": folder, "family": layout.family, **facts}
    return {**facts, **sizes, "metrics": known.get("metrics"), "layers": list(rows.values())}
