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

from .core.errors import SensibertError
from .core.schedule import SHAPES, Schedule
from .core.version import version
from .run_options import AVERAGE, GRIDS, LAYOUTS, METHODS, POLICIES, PRECISIONS, SNAPSHOT, Options

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
SIZES = ("encoder_params", "total_params", "flops")


def _names(command: Any) -> dict[str, str]:
    """Option name -> parameter name of a command: they differ for --json."""
    places = {}
    for parameter in command.params:
        names = [name.lstrip("-") for name in parameter.opts if name.startswith("--")] or [parameter.name]
        places |= dict.fromkeys((name.replace("-", "_") for name in names), parameter.name)
    return places


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """A YAML mapping of option names gives the defaults; what stands on the command line wins.

    One file may serve several commands: each takes what it knows. A name that no command knows is an error, and so is
    `dry_run` for one that would write all the same."""
    if path is None or context.resilient_parsing:
        return path
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SensibertError(f"config: cannot read {path} ({reason})") from None
    if not isinstance(settings, dict):
        raise SensibertError(f"config: {path} holds a {type(settings).__name__}, want a mapping of option names")
    places = _names(context.command)
    elsewhere = {name for command in context.parent.command.commands.values() for name in _names(command)}
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    unknown = sorted(settings.keys() - (elsewhere - {"dry_run"} | places.keys()))
    if unknown:
        known = ", ".join(sorted(places.keys() - {"config", "help"}))
        raise SensibertError(f"config: {path} names {unknown[0]!r}, want one of {known}")
    for name, value in settings.items():
        if isinstance(value, list | dict):
            raise SensibertError(f"config: {path}: {name} is a {type(value).__name__}, want one value")
    settings = {places[name]: value for name, value in settings.items() if name in places}
    context.default_map = {**(context.default_map or {}), **settings}
    return path


Config = Annotated[Path | None, typer.Option(help="YAML file of option names.", callback=_config, is_eager=True)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; nothing is written.")]
Model = Annotated[str, typer.Option(help="Folder or hub name of a BERT-family model.")]
Output = Annotated[str, typer.Option(help="Folder to write; it appears when the run is complete.")]
Task = Annotated[
    str | None,
    typer.Option(
        help="text-classification, regression, question-answering, token-classification, or a preset: mnli, qqp, qnli, "
        "sst2, squad. Guessed from the columns, or the model, when left out."
    ),
]
TrainFile = Annotated[str | None, typer.Option(help="csv, tsv, jsonl, json or parquet, also .gz, or a hub name.")]
ValidationFile = Annotated[str | None, typer.Option(help="The same kinds of file.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens; 128, for questions 384.")]
DocStride = Annotated[int | None, typer.Option(help="Tokens two windows of a long context share.")]
Samples = Annotated[int, typer.Option(help="At most so many for the analysis.")]
MicroBatch = Annotated[int, typer.Option(help="Samples whose gradient is squared at once.")]
Precision = Annotated[str, typer.Option(help=" or ".join(PRECISIONS))]
Seed = Annotated[int, typer.Option(help="Of everything drawn by chance.")]
Layout = Annotated[str, typer.Option(help=f"{', '.join(LAYOUTS)}. dense: zero-filled, loads everywhere.")]
TextColumn = Annotated[str | None, typer.Option(help="Input column, or two: a,b.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label.")]
BudgetText = Annotated[str, typer.Option(help="50%params, 30%flops, 5.3Mparams, 1.2Gflops: an upper bound.")]
GridName = Annotated[str, typer.Option(help=f"What is dropped: {', '.join(GRIDS)}. unit: heads and neurons.")]
Scope = Annotated[str, typer.Option(help="What the budget counts: encoder, or model (with embeddings and head).")]
FlopsLength = Annotated[int, typer.Option(help="Tokens a sequence, for FLOPs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")]
Step = Annotated[int | None, typer.Option(help="FFN widths become multiples of it (64, small models 32).")]
Policy = Annotated[str, typer.Option(help=f"{', '.join(POLICIES)}: one threshold for all layers, equal shares, or DP.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"sensibert {version()}")
        raise typer.Exit


@app.callback()
def _sensibert(
    version: Annotated[bool, typer.Option("--version", help="Say which one this is.", callback=_version)] = False,
) -> None:
    """Options of no command."""


def _given(kind: type, context: typer.Context) -> dict[str, Any]:
    """The command's arguments that are fields of a dataclass and were given, or have a default."""
    return {f.name: v for f in fields(kind) if (v := context.params.get(f.name)) is not None}


def _say(as_json: bool, result: dict, text: str) -> None:
    print(text, flush=True)
    if as_json:
        print(json.dumps(result), flush=True)


def _lines(facts: dict[str, Any]) -> str:
    """`name: value` a line; what is not known is left out."""
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()}
    return "\n".join(f"{name}: {value}" for name, value in shown.items() if value is not None)


def _scores(metrics: dict[str, float]) -> str:
    return "\n".join(f"{name}: {value:.4f}" for name, value in metrics.items())


def _left(result: dict) -> str:
    """Sizes before and after, in the words of result.json."""
    from .report import share, table

    pairs = [(name, result[f"{name}_before"], result[f"{name}_after"]) for name in SIZES]
    rows = [(name, before, after, share(after, before)) for name, before, after in pairs]
    return table(("", "before", "after", "left"), rows)


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
    grid: GridName = _DEFAULT.grid,
    scope: Scope = _DEFAULT.scope,
    flops_length: FlopsLength = _DEFAULT.flops_length,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)} (blocks: fisher). dense: the control without a cut.")
    ] = None,
    policy: Policy = _DEFAULT.policy,
    step: Step = None,
    samples: Samples = _DEFAULT.samples,
    micro_batch: MicroBatch = _DEFAULT.micro_batch,
    schedule: Annotated[str, typer.Option(help=f"{' or '.join(SHAPES)}: how the cut is spread.")] = _SHAPE.shape,
    warm_share: Annotated[
        float, typer.Option(help="Share of the steps before the first cut.", show_default="1/3")
    ] = _SHAPE.warm_share,
    trim_share: Annotated[float, typer.Option(help="Share of the steps the cubic takes.")] = _SHAPE.trim_share,
    milestones: Annotated[int, typer.Option(help="Cuts the cubic takes.")] = _SHAPE.milestones,
    warmup: Annotated[float, typer.Option(help="Share of the steps of learning-rate warm-up.")] = _SHAPE.warmup,
    rewarm: Annotated[float, typer.Option(help="The same after the last cut.")] = _SHAPE.rewarm,
    recovery: Annotated[
        str | None,
        typer.Option(
            help="After the last cut. lifted: up to 1.6 times the learning rate, without dropout; "
            "plain: dropout as it was, and so the rate unless less than half is left.",
            show_default="plain for question answering, else lifted",
        ),
    ] = None,
    recover_peak: Annotated[
        float | None, typer.Option(help="Another peak after the last cut, times the learning rate.")
    ] = None,
    recover_dropout: Annotated[float | None, typer.Option(help="Another dropout after the last cut.")] = None,
    freeze_embeddings: Annotated[
        bool | None,
        typer.Option(help="They learn no more after the last cut.", show_default="where less than half is left"),
    ] = None,
    compensate: Annotated[
        bool | None,
        typer.Option(
            help="Let the kept units take over by least squares what the dropped ones gave. With obs, layer-obs: yes."
        ),
    ] = None,
    search: Annotated[
        int, typer.Option(help="Trials of a search for the shares of the layers by the true loss.")
    ] = _DEFAULT.search,
    teacher: Annotated[
        str | None,
        typer.Option(help=f"Fine-tuned model to distil from, {SNAPSHOT} (at the cut) or {AVERAGE} (of the weights)."),
    ] = None,
    distil: Annotated[float, typer.Option(help="Weight of the distillation loss.")] = _DEFAULT.distil,
    distil_hidden: Annotated[float, typer.Option(help="Weight of the loss on hidden states.")] = (
        _DEFAULT.distil_hidden
    ),
    distil_until: Annotated[
        float | None, typer.Option(help="Share of the recovery in which the teacher fades out.", show_default="stays")
    ] = _SHAPE.distil_until,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = _DEFAULT.temperature,
    average_decay: Annotated[float, typer.Option(help=f"Of the teacher {AVERAGE}, per step.")] = (
        _DEFAULT.average_decay
    ),
    epochs: Annotated[float | None, typer.Option(help="3 unless the preset says otherwise.")] = None,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps instead of epochs.")] = _DEFAULT.max_steps,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; 1e-4 unless the preset says otherwise.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="32 unless the preset says otherwise.")] = None,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = _DEFAULT.gradient_accumulation,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = _DEFAULT.weight_decay,
    max_length: MaxLength = None,
    doc_stride: DocStride = None,
    precision: Precision = _DEFAULT.precision,
    seed: Seed = _DEFAULT.seed,
    layout: Layout = _DEFAULT.layout,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; an epoch if left out.")] = None,
    save_before_cut: Annotated[
        bool, typer.Option("--save-before-cut", help="A checkpoint at the last dense step.")
    ] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="In OUTPUT.partial, after the end.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    overwrite: Overwrite = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="No progress bars; nor are there any where standard error is not a terminal."),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on a task and trim it to a budget on the way.

    \b
    Examples:
      sensibert finetune --model bert-base-uncased --train-file train.csv \\
          --validation-file dev.csv --budget 50%params --output small
      sensibert finetune --model roberta-base --task sst2 --budget 30%flops \\
          --schedule cubic --output small
      sensibert finetune --config recipe.yaml --seed 1 --output small-1
    """
    from .commands import outline
    from .recipe import finetune_and_trim
    from .report import summary

    shape = Schedule(shape=schedule, **_given(Schedule, context))
    quiet = quiet or not sys.stderr.isatty()
    options = Options(**{**_given(Options, context), "schedule": shape, "quiet": quiet})
    if dry_run:
        result = outline(options)
        return _say(as_json, result, _lines(result))
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
    method: Annotated[str | None, typer.Option(help=f"{', '.join(METHODS[:-1])} (blocks: fisher).")] = None,
    grid: GridName = _DEFAULT.grid,
    samples: Samples = _DEFAULT.samples,
    micro_batch: MicroBatch = _DEFAULT.micro_batch,
    max_length: MaxLength = None,
    doc_stride: DocStride = None,
    precision: Precision = _DEFAULT.precision,
    seed: Seed = _DEFAULT.seed,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score every head and FFN neuron of a fine-tuned model, or the blocks of a grid, and write the scores.

    \b
    Examples:
      sensibert analyze --model tuned --train-file train.csv --output scores.safetensors
      sensibert analyze --model tuned --method magnitude --output scores.safetensors
    """
    from .commands import analyze_file
    from .report import ranking

    result, sensitivity = analyze_file(Options(**_given(Options, context)))
    text = (
        ranking(sensitivity)
        if sensitivity.tensors
        else f"no ranking of whole tensors: {result['method']} reads no data"
    )
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

    \b
    Examples:
      sensibert plan --sensitivity scores.safetensors --budget 30%flops \\
          --output plan.safetensors
      sensibert plan --sensitivity scores.safetensors --budget 9Mparams --dry-run
    """
    from .commands import plan_file
    from .core.budget import Budget

    asked = Budget.parse(budget, scope, flops_length)
    result, found = plan_file(sensitivity, output, asked, step, policy, overwrite, dry_run)
    _say(as_json, result, f"{found.table()}\n\n{_left(result)}{_written(result)}")


@app.command()
def trim(
    model: Model,
    output: Output,
    plan: Annotated[str, typer.Option(help="File of `sensibert plan`.")],
    config: Config = None,
    layout: Layout = _DEFAULT.layout,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Cut a model by a plan, without training, and write the folder.

    \b
    Example:
      sensibert trim --model tuned --plan plan.safetensors --output small
    """
    from .commands import trim_folder

    result = trim_folder(model, plan, output, layout, overwrite, dry_run)
    _say(as_json, result, f"{_left(result)}{_written(result)}")


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="A trimmed or any fine-tuned model.")],
    validation_file: ValidationFile = None,
    config: Config = None,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    max_length: MaxLength = None,
    doc_stride: DocStride = None,
    precision: Precision = _DEFAULT.precision,
    as_json: AsJson = False,
) -> None:
    """Score a model on a file.

    \b
    Examples:
      sensibert eval small --validation-file dev.csv --json
      sensibert eval small --task sst2
    """
    from .commands import evaluate_folder

    result = evaluate_folder(Options(model=folder, output="", **_given(Options, context)))
    _say(as_json, result, _scores(result["metrics"]))


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A trimmed model folder.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show what is left of a trimmed model, layer by layer.

    \b
    Example:
      sensibert inspect small
    """
    from .commands import inspect_folder
    from .core.artifacts import BlockPlan, UnitPlan
    from .report import share, table

    result = inspect_folder(folder)
    columns = ("heads", "heads_of", "ffn", "ffn_of")
    rows = [(f"layer {row['layer']}", *(row[name] for name in columns)) for row in result["layers"]]
    told = ("model", "family", "task", "method", "budget", "grid", "seed", "steps")
    facts, layers = _lines({name: result[name] for name in told}), table(UnitPlan.table_header, rows)
    if result["tensors"]:
        left = [(row["tensor"], row["kept"], row["of"], share(row["kept"], row["of"])) for row in result["tensors"]]
        layers = table(BlockPlan.table_header, left)
    parts = [facts, layers, _left(result), _scores(result["metrics"] or {})]
    _say(as_json, result, "\n\n".join(filter(None, parts)))


def _written(result: dict) -> str:
    return f"\n\nwritten to {result['output']}" if result["output"] else ""


INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Entry point: errors of the user and of the system become one line and exit code 2."""
    # Read when transformers is imported: its warnings, and bars where no one watches, would bury that line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer makes a code of Ctrl-C
            _fail("stopped; finetune --resume goes on from the last whole checkpoint, if there is one", INTERRUPTED)
        if code:
            sys.exit(code)
    except (SensibertError, OSError) as error:
        _fail(str(error), 2)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Click's own usage errors carry an exit code and know how to show themselves; anything else is our bug.
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), error.exit_code)


def _fail(message: str, code: int) -> None:
    if message:  # empty where nothing was asked for and the help has been shown
        print(f"sensibert: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
