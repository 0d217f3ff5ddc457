"""`core.arguments.checked` for ops, which torch.compile traces without a graph break."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ..core import arguments

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: SensibertError for the first argument that is not of its annotated type; no check while compiling."""
    careful = arguments.checked(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else careful(*args, **kwargs)

    return call
