"""The options of the commands, generated from the settings of `Options`, `TrimConfig` and `Schedule`, and what a YAML
file of options sets."""

from __future__ import annotations

import inspect as signatures
import typing
from pathlib import Path
from typing import Annotated, Any

import typer.core
import yaml

from .core.arguments import fits, in_words, one_of
from .core.config import MEASUREMENT, TRIMMING, TrimConfig, current_names
from .core.errors import SensibertError
from .core.schedule import RECOVERY, SCHEDULE, Schedule
from .core.settings import former_names, settings_of
from .run_options import DATA, DISTILLATION, OUTPUT, TRAINING, Options

KINDS = (Options, TrimConfig, Schedule)
PANELS = (None, TRIMMING, MEASUREMENT, SCHEDULE, RECOVERY, DATA, TRAINING, DISTILLATION, OUTPUT)
FORMER = {old.replace("_", "-"): new.replace("_", "-") for old, new in former_names(*KINDS).items()}


def option(name: str, **changed: Any) -> signatures.Parameter:
    """The parameter of a command for a setting, by its flat name. changed: help, panel or default of this command."""
    kind, field = next((k, f) for k in KINDS for n, f in settings_of(k).items() if name in (n, f.metadata["flag"]))
    hint, known = typing.get_type_hints(kind)[field.name], {**field.metadata, "default": field.default, **changed}
    required, flag = known["default"] == "", [f"--{name.replace('_', '-')}"] if hint is bool else []
    option = typer.Option(
        *flag,
        help=known["help"],
        rich_help_panel=known["panel"],
        metavar=choices if 0 < len(choices := "|".join(known["choices"])) < 20 else None,
        show_default=known["show_default"] or not isinstance(known["default"], bool | None),
    )
    default = signatures.Parameter.empty if required else known["default"]
    return _parameter(name, hint, option, default)


def _parameter(name: str, hint: Any, option: Any, default: Any = signatures.Parameter.empty) -> signatures.Parameter:
    return signatures.Parameter(
        name, signatures.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


def _names(command: Any) -> dict[str, str]:
    """Option name -> parameter name of a command: they differ for --json."""
    parameters: dict[str, str] = {}
    for parameter in command.params:
        names = [name.lstrip("-") for name in parameter.opts if name.startswith("--")] or [parameter.name]
        parameters |= dict.fromkeys((name.replace("-", "_") for name in names), parameter.name)
    return parameters


def _hints() -> dict[str, Any]:
    """Flat name of a setting -> its type."""
    hints = {kind: typing.get_type_hints(kind) for kind in KINDS}
    return {f.metadata["flag"] or n: hints[kind][n] for kind in KINDS for n, f in settings_of(kind).items()}


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """Use a YAML mapping of option names as defaults; options on the command line take precedence.

    Several commands may share a file: each reads the names it has. A name that no command has is an error, and so is
    `dry_run` for a command without that option, which would write its output."""
    if path is None or context.resilient_parsing:
        return path
    path = path.expanduser()
    settings = _read_yaml(path)
    own = _names(context.command)
    group = context.parent.command if context.parent is not None else None
    assert isinstance(group, typer.core.TyperGroup)  # only its commands take a config
    elsewhere = {name for command in group.commands.values() for name in _names(command)}
    unknown = sorted(settings.keys() - ((elsewhere - {"dry_run"} | own.keys()) - {"config", "help"}))
    if unknown:
        known = sorted(own.keys() - {"config", "help"})
        raise SensibertError(f"config: {path} names {unknown[0]!r}, {one_of(unknown[0], known)}")
    for name, value in settings.items():
        if isinstance(value, list | dict):
            raise SensibertError(f"config: {path}: {name} is a {type(value).__name__}, want one value")
        if isinstance(value, bool) and not fits(value, hint := _hints().get(name, bool)):
            raise SensibertError(f"config: {path}: {name} is {value}, want {in_words(hint)}")
    settings = {own[name]: value for name, value in settings.items() if name in own}
    context.default_map = {**(context.default_map or {}), **settings}
    return path


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice: YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [str(self.construct_object(name, deep=True)).replace("-", "_") for name, _ in node.value]
        for number, name in enumerate(names):
            if name in names[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file under today's names. SensibertError for a file that is not a mapping of names."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # PyYAML lets errors of Python out for a malformed date or number.
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, OverflowError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            mark = error.problem_mark
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise SensibertError(f"config: cannot read {path} ({reason})") from None
    if not isinstance(settings, dict):
        came = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise SensibertError(f"config: {path} {came}, want a mapping of option names")
    return current_names({str(name).replace("-", "_"): value for name, value in settings.items()})


# Parameters of the commands that are not settings.
EXTRA = {
    "config": _parameter(
        "config",
        Path | None,
        typer.Option(
            help="YAML file with options by name; the recipe.json of a run is one.", callback=_config, is_eager=True
        ),
        None,
    ),
    "dry_run": _parameter(
        "dry_run",
        bool,
        typer.Option("--dry-run", help="Print what would be done; write nothing.", rich_help_panel=OUTPUT),
        False,
    ),
    "as_json": _parameter(
        "as_json",
        bool,
        typer.Option("--json", help="Print one JSON object as the last line.", rich_help_panel=OUTPUT),
        False,
    ),
    "folder": _parameter("folder", str, typer.Argument(help="A model folder, trimmed or not.")),
    "folders": _parameter("folders", list[Path], typer.Argument(help="Model folders, exported or not.")),
    "length": _parameter("length", int, typer.Option(help="Tokens of every text."), 128),
    "threads": _parameter(
        "threads", int | None, typer.Option(help="Threads of a pass.", show_default="those of torch"), None
    ),
    "rounds": _parameter("rounds", int, typer.Option(help="Passes of every model; medians are shown."), 20),
    "save": _parameter("save", str | None, typer.Option(help="Table to write (.json)."), None),
    "probes": _parameter(
        "probes", str | None, typer.Option(help="Folder to write, with probes for another device."), None
    ),
    "plan": _parameter(
        "plan", str | None, typer.Option(help="Plan file of `sensibert plan`; without one, a training file."), None
    ),
    "to": _parameter("to", str, typer.Option(help="Runtime: onnx, openvino, torch or executorch."), "onnx"),
    "int8": _parameter(
        "int8", bool, typer.Option("--int8", help="Write a second graph, with weights in 8 bits (onnx only)."), False
    ),
    "fp16_embeddings": _parameter(
        "fp16_embeddings", bool, typer.Option("--fp16-embeddings", help="Store embedding tables in 16 bits."), False
    ),
    "max_loss": _parameter(
        "max_loss", str, typer.Option(help="Largest loss of the main metric by --int8, in % of it."), "0.5%"
    ),
    "why": _parameter(
        "why",
        bool,
        typer.Option("--explain", help="Say why each layer keeps what it keeps.", rich_help_panel=OUTPUT),
        False,
    ),
    "sensitivity": _parameter("sensitivity", str, typer.Option(help="Sensitivity file of `sensibert analyze`.")),
}
# In which ~ is the home folder; Options has others.
PATHS = ("folder", "model", "output", "plan", "sensitivity", "vocabulary", "save", "probes", "latency_table")
DATA_NAMES = ("task", "text_column", "label_column", "label_names", "max_length", "doc_stride", "precision")
SHAPE_NAMES = ("runtime", "latency_shape", "latency_threads")
MEASUREMENT_NAMES = (*SHAPE_NAMES, "latency_table")
