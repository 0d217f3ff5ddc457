"""Arguments and fields checked against their annotations, and the words of the messages."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .errors import SensibertError

P = ParamSpec("P")
R = TypeVar("R")
_PLAIN = (str, bytes, int, float, Path, type(None))
_MOST_BITS = 200  # of a number that is written out
_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "None",
    "Path": "a path",
    "Callable": "a function",
    "Module": "a model (torch.nn.Module)",
    "Tensor": "a tensor",
    "dtype": "a torch.dtype",
    "Budget": "a Budget such as Budget.parse('50%params')",
}


def show(value: object) -> str:
    """A value for a message: plain ones as Python writes them, others by their type."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write very large ones
    if isinstance(value, _PLAIN):
        text = repr(str(value) if isinstance(value, Path) else value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"the class {value.__name__}" if isinstance(value, type) else _article(type(value).__name__)


def one_of(value: object, known: Iterable[str]) -> str:
    """`want one of a, b, c`, with the one that the value resembles."""
    names = list(known)
    return f"want one of {', '.join(names)}{did_you_mean(value, names)}"


def fraction(name: str, text: str, example: str = "0.5%") -> float:
    """`0.5%` or `0.005` -> 0.005; SensibertError for anything else, or outside [0, 1)."""
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise SensibertError(f"{name} is {show(text)}, want for example {example}, at least 0% and below 100%")
    return value


def at_least_one(**values: int | None) -> None:
    """SensibertError for the first value below 1; None passes."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise SensibertError(f"{name} is {value}, want at least 1")


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """`; did you mean 'b'?` for the known name that the value resembles; without one an empty text."""
    folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(str(value).casefold(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type. bool is no number, text is no sequence; elements are not looked at."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(fits(value, kind) for kind in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is Sequence and not isinstance(value, Sequence):  # what can be listed will do, a tensor or a mapping not
        return isinstance(value, Iterable) and not isinstance(value, Mapping) and not hasattr(value, "shape")
    if kind in (Sequence, Iterable) and isinstance(value, str | bytes):
        return False
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def in_words(hint: Any) -> str:
    """An annotated type in a message."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(in_words(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple and Ellipsis not in typing.get_args(hint):
        return f"({', '.join(in_words(kind) for kind in typing.get_args(hint))})"
    name = getattr(typing.get_origin(hint) or hint, "__name__", str(hint))
    return _WORDS.get(name) or _article(name)


def want(argument: str, value: object, hint: Any) -> None:
    """SensibertError, naming the argument or its element, for a value or an element that is not of its type."""
    if not fits(value, hint):
        raise SensibertError(f"{argument} is {show(value)}, want {in_words(hint)}")
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        want(argument, value, next(kind for kind in kinds if fits(value, kind)))
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        for name, element in value.items():
            want(f"{argument}: a name", name, kinds[0])
            want(f"{argument}[{show(name)}]", element, kinds[1])
    elif origin in (list, Sequence) and isinstance(value, list | tuple):
        for number, element in enumerate(value):
            want(f"{argument}[{number}]", element, kinds[0])
    elif origin is tuple and isinstance(value, tuple) and Ellipsis not in kinds:
        if len(value) != len(kinds):
            raise SensibertError(f"{argument} has {len(value)} entries, want {in_words(hint)}")
        for number, (element, kind) in enumerate(zip(value, kinds, strict=True)):
            want(f"{argument}[{number}]", element, kind)


def want_fields(instance: Any) -> None:
    """For `__post_init__` of a dataclass: SensibertError for the first field that is not of its annotated type."""
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        want(f"{type(instance).__name__}: {field.name}", getattr(instance, field.name), hints[field.name])


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: SensibertError for the first argument that is not of its annotated type."""
    label = function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def known() -> tuple[inspect.Signature, dict[str, Any]]:
        signature = inspect.signature(function)
        single = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = {name for name, parameter in signature.parameters.items() if parameter.kind not in single}
        return signature, {name: hint for name, hint in typing.get_type_hints(function).items() if name in names}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        signature, hints = known()
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # a missing or unknown argument: Python's own message is best
            return function(*args, **kwargs)
        for name, value in given.items():
            if name in hints:
                want(f"{label}: {name}", value, hints[name])
        return function(*args, **kwargs)

    return call


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"
