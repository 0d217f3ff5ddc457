"""Arguments -> recipe or commands -> a printed table. Bad input ends in one line on standard error and exit code 2."""

from __future__ import annotations

import inspect as signatures
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer.core

from .cli_errors import run_to_exit
from .cli_options import DATA_NAMES, EXTRA, FORMER, KINDS, MEASUREMENT_NAMES, PANELS, PATHS, SHAPE_NAMES, option
from .core.arguments import at_least_one, fraction
from .core.errors import SensibertError
from .core.export_options import check_export
from .core.folder_facts import read_family
from .core.launch import launched, want_one_process
from .core.model_folder import want_model_folder
from .core.settings import settings_of
from .core.text import number_of, printable
from .core.version import version
from .run_options import OUTPUT, RESULT, Options, all_names

MODELS = {"model", "folder"}  # arguments that are a model
SIZES = ("vocabulary", "encoder_params", "total_params", "flops")

app = typer.Typer(
    name="sensibert",
    help="Trim BERT models while fine-tuning: rank attention heads and FFN neurons by sensitivity, remove the least "
    "sensitive ones to meet a budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: FORMER.get(token, token),
    },
)


def _command(
    names: Iterable[str], name: str | None = None, families: bool = False, **changed: dict[str, Any]
) -> Callable:
    """Decorator: turn a function of (context, values) into a command with these options, in this order. families:
    whether a folder may be that of several models."""

    def register(function: Callable[[typer.Context, dict[str, Any]], None]) -> Callable:
        def run(context: typer.Context, **values: Any) -> None:
            if function.__name__ != "finetune" or values["dry_run"]:
                want_one_process("finetune --dry-run" if function.__name__ == "finetune" else str(context.info_name))
            paths = {name: os.path.expanduser(values[name]) for name in PATHS if values.get(name) is not None}
            for name in MODELS & paths.keys():
                if not (families and read_family(Path(paths[name]) / RESULT)):
                    want_model_folder(paths[name], name)
            function(context, values | paths)

        own = [EXTRA[n] if n in EXTRA else option(n, **changed.get(n, {})) for n in names]
        context = signatures.Parameter("context", signatures.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        run.__signature__ = signatures.Signature([context, *own])  # type: ignore[attr-defined]
        run.__doc__, run.__name__ = function.__doc__, function.__name__
        return app.command(name)(run)

    return register


def _options(values: dict[str, Any], **more: Any) -> Options:
    given = {name: value for name, value in values.items() if name in all_names() and value is not None}
    return Options.from_settings(given | more)


def _want_alone(context: typer.Context, name: str, others: Iterable[str]) -> None:
    """SensibertError for one of the others on the command line: they belong to another way to trim than `name`."""
    given = [each for each in others if getattr(context.get_parameter_source(each), "name", "") == "COMMANDLINE"]
    if given:
        why = ": a plan has its budget" if name == "plan" else ""
        raise SensibertError(f"{given[0]} and {name} are both given, want one of them{why}")


def _show_version(requested: bool) -> None:
    if requested:
        print(f"sensibert {version()}")
        raise typer.Exit


@app.callback()
def _sensibert(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version)] = False,
) -> None:
    """Options that belong to no command."""


def _print(as_json: bool, result: dict, text: str) -> None:
    if launched().number:
        return
    print(printable(text), flush=True)
    if as_json:
        print(json.dumps(result), flush=True)


def _lines(facts: dict[str, Any]) -> str:
    """One `name: value` per line, without those that are None."""
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()}
    return "\n".join(f"{name}: {value}" for name, value in shown.items() if value is not None)


def _scores(metrics: dict[str, float]) -> str:
    return "\n".join(f"{name}: {value:.4f}" for name, value in metrics.items())


def _sizes(result: dict) -> str:
    """Sizes before and after, from the entries of result.json."""
    from .report import share, table

    pairs = [(n, result[f"{n}_before"], result[f"{n}_after"]) for n in SIZES if f"{n}_before" in result]
    rows = [(name, before, after, share(after, before)) for name, before, after in pairs]
    return table(("", "before", "after", "left"), rows)


def _written(result: dict) -> str:
    return f"\n\nwritten to {result['output']}" if result["output"] else ""


def _all_settings() -> list[str]:
    """Flat names in the order of the help: those without a panel first."""
    fields = [(f.metadata["flag"] or n, f.metadata["panel"]) for kind in KINDS for n, f in settings_of(kind).items()]
    return [name for name, _ in sorted(fields, key=lambda field: PANELS.index(field[1]))]


@_command([*_all_settings(), *("config", "dry_run", "as_json")])
def finetune(context: typer.Context, values: dict[str, Any]) -> None:
    """Fine-tune a model on a task, and trim it to a budget while it learns.

    \b
    Examples:
      sensibert finetune --model bert-base-uncased --train-file train.csv \\
          --validation-file dev.csv --budget 50%params --output small
      sensibert finetune --model roberta-base --task sst2 --budget 30%flops \\
          --schedule cubic --output small
      sensibert finetune --config recipe.yaml --seed 1 --output small-1
    """
    for name in ("budgets", "keep"):
        if values[name] is not None:
            _want_alone(context, name, ["budget"])
    options = _options(values)
    options.want_data()
    options.want_validation_data()
    if values["dry_run"]:
        from .dry_run import described, outline

        result = outline(options)
        return _print(values["as_json"], result, _lines(described(result)))
    from .recipe import finetune_and_trim
    from .report import family_table, summary

    result = finetune_and_trim(options)
    written = f"written to {result['output']} (pictures in {result['output']}/report)"
    shown = family_table(result) if options.budgets else summary(result)
    _print(values["as_json"], result, f"{shown}\n\n{written}")


@_command(
    [
        *("model", "output", "train_file", "config", "method", "grid", "samples", "micro_batch", *DATA_NAMES, "seed"),
        *("overwrite", "as_json"),
    ],
    output={"help": "Sensitivity file to write (.safetensors)."},
)
def analyze(context: typer.Context, values: dict[str, Any]) -> None:
    """Score every head and FFN neuron of a fine-tuned model, or the blocks of a grid, and write the scores.

    \b
    Examples:
      sensibert analyze --model tuned --train-file train.csv --output scores.safetensors
      sensibert analyze --model tuned --method magnitude --output scores.safetensors
    """
    options = _options(values)
    from .commands import analyze_file
    from .report import ranking

    result, sensitivity = analyze_file(options)
    no_ranking = f"no ranking of whole tensors: {result['method']} reads no data"
    text = ranking(sensitivity) if sensitivity.tensors else no_ranking
    _print(values["as_json"], result, f"{text}{_written(result)}")


@_command(
    [
        *("sensitivity", "output", "budget", "config", "scope", "flops_length", "width_multiple", "allocation"),
        *("latency_table", "overwrite", "dry_run", "why", "as_json"),
    ],
    output={"help": "Plan file to write (.safetensors).", "default": None},
    latency_table={"help": "File of `sensibert latency`, for a budget of ms or MB.", "show_default": None},
)
def plan(context: typer.Context, values: dict[str, Any]) -> None:
    """Choose what to keep under a budget; needs no model and no data.

    \b
    Examples:
      sensibert plan --sensitivity scores.safetensors --budget 30%flops \\
          --output plan.safetensors
      sensibert plan --sensitivity scores.safetensors --budget 9Mparams --dry-run
    """
    config, dry_run = _options(values, output="").trim, values["dry_run"]
    from .allocation import explain
    from .planning import plan_file

    result, made, scores = plan_file(values["sensitivity"], values["output"], config, values["overwrite"], dry_run)
    explained = f"\n\n{explain(made, scores)}" if values["why"] else ""
    _print(values["as_json"], result, f"{made.table()}{explained}\n\n{_sizes(result)}{_written(result)}")


OF_ONE_STEP = (
    *("train_file", "budget", "method", "scope", "flops_length", "width_multiple", "allocation", "grid", "samples"),
    *("micro_batch", "compensate", *MEASUREMENT_NAMES, *DATA_NAMES, "seed"),
)


@_command(
    [
        *("model", "output", "plan", "vocabulary", *OF_ONE_STEP, "weights", "config", "layout", "overwrite", "dry_run"),
        "as_json",
    ],
    weights={"panel": OUTPUT, "show_default": "as they are"},
    vocabulary={
        "help": "File of texts: keep only the pieces of the vocabulary that they need.",
        "panel": None,
        "show_default": "all",
    },
)
def trim(context: typer.Context, values: dict[str, Any]) -> None:
    """Trim a model without training, by a plan, or to a budget on a training file, and write the folder.

    \b
    Examples:
      sensibert trim --model tuned --plan plan.safetensors --output small
      sensibert trim --model all-MiniLM-L6-v2 --train-file texts.txt \\
          --budget 50%params --output small
      sensibert trim --model small --vocabulary texts.txt --output smaller
    """
    if values["vocabulary"] is not None:
        _want_alone(context, "vocabulary", (*OF_ONE_STEP, "plan", "layout"))
    elif values["plan"] is not None:
        _want_alone(context, "plan", OF_ONE_STEP)
    options = _options(values)
    from .commands import trim_folder, trim_on_data, trim_vocabulary_of

    def of(*names: str) -> list[Any]:
        return [values[name] for name in names]

    if values["vocabulary"] is not None:
        result = trim_vocabulary_of(*of("model", "vocabulary", "output", "overwrite", "dry_run", "weights"))
    elif values["plan"] is None:
        result = trim_on_data(options, values["dry_run"])
    else:
        result = trim_folder(*of("model", "plan", "output", "layout", "overwrite", "dry_run", "weights"))
    _print(values["as_json"], result, f"{_sizes(result)}{_written(result)}")


@_command(["folder", "validation_file", "config", *DATA_NAMES, "as_json"], name="eval")
def evaluate(context: typer.Context, values: dict[str, Any]) -> None:
    """Score a model on a file.

    \b
    Examples:
      sensibert eval small --validation-file dev.csv --json
      sensibert eval small --task sst2
    """
    options = _options(values, model=values["folder"])
    from .commands import evaluate_folder

    result = evaluate_folder(options)
    _print(values["as_json"], result, _scores(result["metrics"]))


EXPORTED = ("to", "int8", "fp16_embeddings")


@_command(
    [
        *("folder", "output", "to", "fp16_embeddings", "int8", "max_loss", "validation_file", "config"),
        *(name for name in DATA_NAMES if name != "precision"),  # of a graph it is fp32
        *("overwrite", "as_json"),
    ],
    name="export",
    output={"help": "Folder to write."},
)
def export_(context: typer.Context, values: dict[str, Any]) -> None:
    """Write a model as a graph for another runtime, which loads without sensibert.

    \b
    Examples:
      sensibert export small --to onnx --int8 --validation-file dev.csv --output small-onnx
      sensibert export small --to openvino --output small-openvino
    """
    options, wanted = _options(values, model=values["folder"]), {name: values[name] for name in EXPORTED}
    check_export(**wanted)
    max_loss = fraction("max_loss", values["max_loss"])
    from .commands import export_folder
    from .report import table

    result = export_folder(options, **wanted, max_loss=max_loss)
    files = table(("", "MB"), [(name, f"{size / 1e6:.1f}") for name, size in result["files"].items()])
    scores = result.get("metrics", {})
    rows = [(metric, *(f"{found[metric]:.4f}" for found in scores.values())) for metric in scores.get("model", ())]
    parts = [files, table(("", *scores), rows) if rows else "", f"largest difference: {result['difference']:.1e}"]
    _print(values["as_json"], result, "\n\n".join(filter(None, parts)) + _written(result))


@_command(["folders", "length", "threads", "rounds", "as_json"])
def bench(context: typer.Context, values: dict[str, Any]) -> None:
    """Time one forward pass of model folders, side by side, in every runtime that they have a file for.

    \b
    Example:
      sensibert bench bert-base-uncased small small-onnx --threads 1
    """
    at_least_one(**{name: values[name] for name in ("length", "threads", "rounds")})
    from .deploy import measure
    from .report import table

    folders = [os.path.expanduser(folder) for folder in values["folders"]]
    machine, rows = measure(folders, values["length"], values["threads"], values["rounds"])
    timed = [name for name in rows[0] if name.startswith("batch_")]
    header = (
        "",
        "runtime",
        "MB",
        "load s",
        "peak MB",
        *(f"{n.removesuffix('_ms').replace('_', ' ')}: ms (p10, p90)" for n in timed),
    )
    lines = []
    for row in rows:
        spreads = (row[name] for name in timed)
        cells = (f"{each['median']:.1f} ({each['p10']:.1f}, {each['p90']:.1f})" for each in spreads)
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        lines.append((row["folder"], row["runtime"], f"{row['mb']:.1f}", f"{row['load_s']:.2f}", peak, *cells))
    shown = f"{machine['processor']}, {number_of(machine['threads'], 'thread')}, texts of {machine['length']} tokens"
    _print(values["as_json"], {"machine": machine, "rows": rows}, f"{table(header, lines)}\n\n{shown}")


@_command(["model", "save", "probes", *SHAPE_NAMES, "config", "overwrite", "as_json"])
def latency(context: typer.Context, values: dict[str, Any]) -> None:
    """Measure what layers cost by their heads and neurons in a runtime, for budgets in ms.

    \b
    Examples:
      sensibert latency --model bert-base-uncased --runtime onnx --save laptop.json
      sensibert latency --model bert-base-uncased --runtime onnx --probes probes
    The second writes graphs and a script that measures on a device that has only the runtime.
    """
    from .commands import measure_latency
    from .report import table

    save, probes = values["save"], values["probes"]
    result = measure_latency(_options(values, output="").trim, values["model"], save, probes, values["overwrite"])
    text = f"written to {save or probes}"
    if save is not None:
        names = {"heads": "heads", "ffn": "neurons"}
        rows = [(n, units, f"{cost / 1e3:.3f}") for kind, n in names.items() for units, cost in result[kind]]
        rows.append(("all else", "", f"{result['rest'] / 1e3:.3f}"))
        text = f"{table(('', 'of one layer', 'ms'), rows)}\n\n{result['of']}\n\n{text}"
    _print(values["as_json"], result, text)


@_command(["folders", "validation_file", "config", *DATA_NAMES, "seed", "length", "threads", "rounds", "as_json"])
def compare(context: typer.Context, values: dict[str, Any]) -> None:
    """Compare model folders on one file: scores with a paired test against the first folder, sizes and speed.

    \b
    Example:
      sensibert compare tuned small smaller --validation-file dev.csv
    """
    from .compare import compare_folders, comparison

    folders = [os.path.expanduser(folder) for folder in values["folders"]]
    speed = [values[name] for name in ("length", "threads", "rounds")]
    result = compare_folders(folders, _options(values, model=""), *speed)
    _print(values["as_json"], result, comparison(result))


@_command(
    ["folder", "output", "as_json"],
    families=True,
    output={"help": "HTML file to write. Without it: report/report.html in the folder.", "default": None},
)
def report(context: typer.Context, values: dict[str, Any]) -> None:
    """Write one HTML page about a trimmed model: what was cut, sizes, scores, sensitivity, and how to use it. Or about
    the models of several budgets: scores against size and latency.

    \b
    Example:
      sensibert report small
    """
    from .inspection import report_folder

    result = report_folder(values["folder"], values["output"])
    _print(values["as_json"], result, f"written to {result['output']}")


@_command(["folder", "config", "as_json"], families=True)
def inspect(context: typer.Context, values: dict[str, Any]) -> None:
    """Show what is left of a trimmed model, layer by layer, or the models of a run with several budgets.

    \b
    Example:
      sensibert inspect small
    """
    from .core.artifacts import BlockPlan, UnitPlan
    from .inspection import inspect_family, inspect_folder
    from .report import family_table, share, table

    if (family := inspect_family(values["folder"])) is not None:
        folders = "\n".join(os.path.join(values["folder"], row["folder"]) for row in family["rows"])
        return _print(values["as_json"], family, f"{family_table(family)}\n\nIts models:\n{folders}")
    result = inspect_folder(values["folder"])
    columns = ("heads", "heads_of", "ffn", "ffn_of")
    rows = [(f"layer {row['layer']}", *(row[name] for name in columns)) for row in result["layers"]]
    shown = ("model", "family", "task", "method", "budget", "weights", "grid", "seed", "steps")
    facts, layers = _lines({name: result[name] for name in shown}), table(UnitPlan.table_header, rows)
    if result["tensors"]:
        left = [(row["tensor"], row["kept"], row["of"], share(row["kept"], row["of"])) for row in result["tensors"]]
        layers = table(BlockPlan.table_header, left)
    parts = [facts, layers, _sizes(result), _scores(result["metrics"] or {})]
    _print(values["as_json"], result, "\n\n".join(filter(None, parts)))


def main() -> None:
    """Entry point. Errors of the user and of the system become one line and exit code 2.

    Of several processes the first one prints: results, and the errors that it has too."""
    # transformers reads these when it is imported. Its warnings and progress bars would hide that line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launched().count > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # advice to programmers, from every process
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    run_to_exit(app)
