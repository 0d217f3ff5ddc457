"""Settings as fields of frozen dataclasses. Each field defines default, help, choices, bounds and former names once;
the command line, YAML files, checkpoints and checks read them from there."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from .arguments import fits, in_words, one_of, show
from .errors import SensibertError
from .json_text import BITS

Bound = tuple[Callable[[Any], bool], str]  # (whether a value is valid, the valid range in words)
POSITIVE: Bound = (lambda value: 0 < value < math.inf, "more than 0")
NOT_NEGATIVE: Bound = (lambda value: 0 <= value < math.inf, "at least 0")
FRACTION: Bound = (lambda value: 0 <= value < 1, "a fraction in [0, 1)")
WEIGHT: Bound = (lambda value: 0 <= value <= 1, "a weight in [0, 1]")


def setting(
    default: Any,
    help: str,
    panel: str | None = None,
    choices: tuple[str, ...] = (),
    bound: Bound | None = None,
    was: str | None = None,
    renamed: Mapping[str, str] | None = None,
    show_default: str | None = None,
    flag: str | None = None,
) -> Any:
    """A dataclass field.

    help: one sentence for the command line. panel: the panel of the help that shows it; None: the first. choices: the
    valid values of a text. bound: the valid range of a number. was: its name in earlier versions. renamed: former
    spellings of values -> today's. show_default: the default in words, if it depends on other settings. flag: the
    option's name, if it differs from the field's."""
    metadata = {
        "help": help,
        "panel": panel,
        "choices": choices,
        "bound": bound,
        "was": was,
        "renamed": dict(renamed or {}),
        "show_default": show_default,
        "flag": flag,
    }
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(kind: type) -> dict[str, dataclasses.Field]:
    """Name -> field, for the fields made by `setting`."""
    return {f.name: f for f in dataclasses.fields(kind) if "help" in f.metadata}


def former_names(*kinds: type) -> dict[str, str]:
    """Former name -> today's name, for the settings of these classes."""
    return {f.metadata["was"]: name for kind in kinds for name, f in settings_of(kind).items() if f.metadata["was"]}


def check(settings: Any) -> None:
    """Replace former spellings of values, then raise SensibertError for the first invalid value.

    For `__post_init__` of a frozen dataclass."""
    hints = typing.get_type_hints(type(settings))
    for name, field in settings_of(type(settings)).items():
        value, choices, bound = getattr(settings, name), field.metadata["choices"], field.metadata["bound"]
        if isinstance(value, str) and value in field.metadata["renamed"]:
            value = field.metadata["renamed"][value]
            object.__setattr__(settings, name, value)
        if value is None and field.default is None:
            continue
        label = field.metadata["flag"] or name
        if choices and value not in choices:
            raise SensibertError(f"{label} is {show(value)}, {one_of(value, choices)}")
        if not fits(value, hints[name]):
            raise SensibertError(f"{label} is {show(value)}, want {in_words(hints[name])}")
        if isinstance(value, int) and abs(value) >= 2**BITS:
            raise SensibertError(f"{label} is {show(value)}, want at most {BITS} bits")
        if bound is not None and not bound[0](value):
            raise SensibertError(f"{label} is {value}, want {bound[1]}")
