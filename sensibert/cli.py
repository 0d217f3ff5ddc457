"""Arguments -> recipe -> printed table. Bad input ends in one line on standard error and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from .errors import SensibertError
from .options import METHODS, PRECISIONS, Options
from .schedule import SHAPES, Schedule

app = typer.Typer(
    name="sensibert",
    help="Rank the tensors of a BERT by sensitivity and trim it to a budget while it is fine-tuned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_DEFAULT = Options(model="", output="")
_SHAPE = Schedule()


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """A YAML mapping of option names gives the defaults; what stands on the command line wins."""
    if path is None or context.resilient_parsing:
        return path
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SensibertError(f"config: cannot read {path} ({str(error).splitlines()[0]})") from None
    if not isinstance(settings, dict):
        raise SensibertError(f"config: {path} holds a {type(settings).__name__}, want a mapping of option names")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    known = {parameter.name for parameter in context.command.params}
    for name in settings:
        if name not in known:
            raise SensibertError(f"config: {path} names {name!r}, want one of {', '.join(sorted(known - {'config'}))}")
    context.default_map = {**(context.default_map or {}), **settings}
    return path


Config = Annotated[Path | None, typer.Option(help="YAML file of option names.", callback=_config, is_eager=True)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
DryRun = Annotated[bool, typer.Option(help="Say what would be done, read and write nothing more.")]
Model = Annotated[str, typer.Option(help="Folder or hub name of a BERT-family model.")]
Output = Annotated[str, typer.Option(help="Folder to write; it appears when the run is complete.")]
Task = Annotated[str | None, typer.Option(help="Task or preset; guessed from the columns when left out.")]
TrainFile = Annotated[str | None, typer.Option(help="csv, tsv, jsonl, json or parquet, also .gz, or a hub name.")]
ValidationFile = Annotated[str | None, typer.Option(help="The same kinds of file.")]
TextColumn = Annotated[str | None, typer.Option(help="Input column, or two: a,b.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label.")]
BudgetText = Annotated[str, typer.Option(help="50%params, 30%flops, 5.3Mparams, 1.2Gflops: an upper bound.")]
Scope = Annotated[str, typer.Option(help="What the budget counts: encoder or model.")]
FlopsLength = Annotated[int, typer.Option(help="Tokens a sequence, for FLOPs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Step = Annotated[int | None, typer.Option(help="FFN widths become multiples of it (64, small models 32).")]
Policy = Annotated[str, typer.Option(help="global: one threshold for all layers; uniform: the same share in each.")]


def _given(kind: type, context: typer.Context) -> dict[str, Any]:
    """The command's arguments that are fields of a dataclass and were given, or have a default."""
    return {f.name: v for f in fields(kind) if (v := context.params.get(f.name)) is not None}


def _say(as_json: bool, result: dict, text: str) -> None:
    if text:
        print(text, flush=True)
    if as_json:
        print(json.dumps(result), flush=True)


@app.command()
def finetune(
    context: typer.Context,
    model: Model,
    output: Output,
    config: Config = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    budget: BudgetText = _DEFAULT.budget,
    scope: Scope = _DEFAULT.scope,
    flops_length: FlopsLength = _DEFAULT.flops_length,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}. dense: the control without a cut.")] = "fisher",
    policy: Policy = _DEFAULT.policy,
    step: Step = None,
    samples: Annotated[int, typer.Option(help="At most so many for the analysis.")] = _DEFAULT.samples,
    micro_batch: Annotated[int, typer.Option(help="Samples whose gradient is squared at once.")] = _DEFAULT.micro_batch,
    schedule: Annotated[str, typer.Option(help=f"{' or '.join(SHAPES)}: how the cut is spread.")] = _SHAPE.shape,
    warm_share: Annotated[float, typer.Option(help="Share of the steps before the first cut.")] = _SHAPE.warm_share,
    trim_share: Annotated[float, typer.Option(help="Share of the steps the cubic takes.")] = _SHAPE.trim_share,
    milestones: Annotated[int, typer.Option(help="Cuts the cubic takes.")] = _SHAPE.milestones,
    warmup: Annotated[float, typer.Option(help="Share of the steps of learning-rate warm-up.")] = _SHAPE.warmup,
    rewarm: Annotated[float, typer.Option(help="The same after the last cut.")] = _SHAPE.rewarm,
    teacher: Annotated[str | None, typer.Option(help="Fine-tuned model to distil from, or 'snapshot'.")] = None,
    distil: Annotated[float, typer.Option(help="Weight of the distillation loss.")] = _DEFAULT.distil,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = _DEFAULT.temperature,
    epochs: Annotated[float | None, typer.Option(help="3 unless the preset says otherwise.")] = None,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps instead of epochs.")] = _DEFAULT.max_steps,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; 1e-4 unless the preset says otherwise.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="32 unless the preset says otherwise.")] = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = _DEFAULT.gradient_accumulation,
    weight_decay: Annotated[float, typer.Option()] = _DEFAULT.weight_decay,
    max_length: Annotated[int | None, typer.Option(help="Tokens; 128, for questions 384.")] = None,
    doc_stride: Annotated[int | None, typer.Option(help="Tokens two windows of a long context share.")] = None,
    precision: Annotated[str, typer.Option(help=" or ".join(PRECISIONS))] = _DEFAULT.precision,
    seed: Annotated[int, typer.Option()] = _DEFAULT.seed,
    layout: Annotated[str, typer.Option(help="trimmed, dense (zero-filled, loads everywhere) or both.")] = "trimmed",
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; an epoch if left out.")] = None,
    save_before_cut: Annotated[
        bool, typer.Option("--save-before-cut", help="A checkpoint at the last dense step.")
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="In OUTPUT.partial, after the end.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on a task and trim it to a budget on the way.

    sensibert finetune --model bert-base-uncased --train-file train.csv --validation-file dev.csv --output small

    sensibert finetune --model roberta-base --task sst2 --budget 30%flops --output small --schedule cubic
    """
    from .recipe import finetune_and_trim
    from .report import summary
    from .steps import outline

    shape = Schedule(shape=schedule, **_given(Schedule, context))
    options = Options(**{**_given(Options, context), "schedule": shape})
    if dry_run:
        result = outline(options)
        _say(as_json, result, "\n".join(f"{name}: {value}" for name, value in result.items()))
        return
    result = finetune_and_trim(options)
    _say(as_json, result, f"{summary(result)}\n\nwritten to {result['output']} (pictures in {result['output']}/report)")


@app.command()
def analyze(
    context: typer.Context,
    model: Model,
    output: Annotated[str, typer.Option(help="Sensitivity file to write (.safetensors).")],
    config: Config = None,
    train_file: TrainFile = None,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS[:-1]))] = "fisher",
    samples: Annotated[int, typer.Option()] = _DEFAULT.samples,
    micro_batch: Annotated[int, typer.Option()] = _DEFAULT.micro_batch,
    max_length: Annotated[int | None, typer.Option()] = None,
    precision: Annotated[str, typer.Option()] = _DEFAULT.precision,
    seed: Annotated[int, typer.Option()] = _DEFAULT.seed,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score every head and FFN neuron of a fine-tuned model and write the scores.

    sensibert analyze --model tuned --train-file train.csv --output tuned.sensitivity.safetensors
    """
    from .report import RANKING_HEADER, ranking_rows, table
    from .steps import analyze_file

    _refuse_existing(output, overwrite)
    sensitivity = analyze_file(Options(**_given(Options, context)))
    rows = ranking_rows(sensitivity)
    text = table(RANKING_HEADER, rows[:10]) if rows else "no ranking of whole tensors: this statistic reads no data"
    result = {
        "model": model,
        "method": method,
        "samples": sensitivity.samples,
        "seed": seed,
        "tensors": sensitivity.tensors,
        "output": output,
    }
    _say(as_json, result, f"{text}\n\nwritten to {output}")


@app.command()
def plan(
    sensitivity: Annotated[str, typer.Option(help="File of `sensibert analyze`.")],
    output: Annotated[str | None, typer.Option(help="Plan file to write (.safetensors).")] = None,
    config: Config = None,
    budget: BudgetText = _DEFAULT.budget,
    scope: Scope = _DEFAULT.scope,
    flops_length: FlopsLength = _DEFAULT.flops_length,
    step: Step = None,
    policy: Policy = _DEFAULT.policy,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Choose what survives a budget; needs no model and no data.

    sensibert plan --sensitivity tuned.sensitivity.safetensors --budget 30%flops --output tuned.plan.safetensors
    """
    from .report import STRUCTURE_HEADER, structure_rows, table
    from .steps import plan_file, plan_result, write

    if output is None and not dry_run:
        raise SensibertError("output is missing, want a file to write, or --dry-run")
    if output is not None:
        _refuse_existing(output, overwrite)
    found = plan_file(sensitivity, budget, scope, flops_length, step, policy)
    if output is not None and not dry_run:
        write(found.save, output)
    result = {**plan_result(found), "output": None if dry_run else output}
    text = [table(STRUCTURE_HEADER, structure_rows(found.layout, found.keep))]
    for name in ("encoder_params", "total_params", "flops"):
        before, after = result[f"{name}_before"], result[f"{name}_after"]
        text.append(f"{name}: {before:,} -> {after:,} ({100 * after / before:.1f} %)")
    _say(as_json, result, "\n".join(text))


@app.command()
def trim(
    model: Model,
    output: Output,
    plan: Annotated[str, typer.Option(help="File of `sensibert plan`.")],
    config: Config = None,
    layout: Annotated[str, typer.Option(help="trimmed, dense or both.")] = "trimmed",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Cut a model by a plan, without training, and write the folder.

    sensibert trim --model tuned --plan tuned.plan.safetensors --output small
    """
    from .steps import trim_folder

    result = trim_folder(model, plan, output, layout, overwrite, dry_run)
    text = f"encoder parameters {result['encoder_params_before']:,} -> {result['encoder_params_after']:,}"
    _say(as_json, result, text if dry_run else f"{text}\nwritten to {output}")


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="A trimmed or any fine-tuned model.")],
    validation_file: Annotated[str, typer.Option(help="Data to score on.")],
    config: Config = None,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    max_length: Annotated[int | None, typer.Option()] = None,
    precision: Annotated[str, typer.Option()] = _DEFAULT.precision,
    as_json: AsJson = False,
) -> None:
    """Score a model on a file.

    sensibert eval small --validation-file dev.csv --json
    """
    from .steps import evaluate_folder

    result = evaluate_folder(Options(model=folder, output="", **_given(Options, context)))
    _say(as_json, result, "\n".join(f"{name}: {value:.4f}" for name, value in result["metrics"].items()))


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A trimmed model folder.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show what is left of a trimmed model, layer by layer.

    sensibert inspect small
    """
    from .report import STRUCTURE_HEADER, table
    from .steps import inspect_folder

    result = inspect_folder(folder)
    columns = ("heads", "heads_of", "ffn", "ffn_of")
    rows = [(f"layer {row['layer']}", *(row[name] for name in columns)) for row in result["layers"]]
    facts = [f"{name}: {value}" for name, value in result.items() if name not in ("layers", "seconds")]
    _say(as_json, result, "\n".join([table(STRUCTURE_HEADER, rows), "", *facts]))


def _refuse_existing(path: str, overwrite: bool) -> None:
    if Path(path).exists() and not overwrite:
        raise SensibertError(f"output: {path} exists, want a new file or --overwrite")


def main() -> None:
    """Entry point: errors of the user become one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=False)
    except SensibertError as error:
        print(f"sensibert: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # Click's own usage errors carry an exit code and know how to show themselves; anything else is our bug.
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):
            print(f"sensibert: error: {error.format_message()}", file=sys.stderr)
            sys.exit(error.exit_code)
        raise
