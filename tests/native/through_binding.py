"""A pytest plugin, and what programs import: CPU tensors go through the binding and kernel of $SENSIBERT_TEST_BINDING,
not the reference."""

import os

import torch

torch.ops.load_library(os.environ["SENSIBERT_TEST_BINDING"])


def refused(message: str, op, *arguments) -> None:
    """The binding must not take these arguments, and say why."""
    try:
        op(*arguments)
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")
