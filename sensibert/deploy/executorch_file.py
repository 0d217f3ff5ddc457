"""A traced model as a program of ExecuTorch, for the XNNPACK kernels of phones and other ARM and x86 processors.

Memory is planned when the file is written, so a program takes one text, of at most LONGEST tokens. Names of inputs and
outputs, and that length, are constants in the file, as methods without arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST = 512  # tokens of a text: memory is reserved for attention scores of their square
CONSTANTS = ("get_inputs", "get_outputs", "get_max_seq_len")  # the last as ExecuTorch's own runners name it


def write(
    program: torch.export.ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...], longest: int, file: Path
) -> None:
    """Write a program traced with inputs [1, S]. What XNNPACK lacks is run by ExecuTorch's own kernels."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    constants = dict(zip(CONSTANTS, (" ".join(inputs), " ".join(outputs), longest)))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=constants)
    file.write_bytes(lowered.to_executorch().buffer)


class Opened(NamedTuple):
    """run: (int64 [1, S] by name) -> outputs, in memory that the next call writes to again."""

    run: Callable[[dict[str, Tensor]], list[Tensor]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    longest: int


def opened(file: Path, threads: int | None) -> Opened:
    """A file of `write`. threads: of all programs in this process."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(file)
    inputs, outputs, longest = (program.load_method(name).execute([])[0] for name in CONSTANTS)
    method = program.load_method("forward")
    names = tuple(inputs.split())

    def run(values: dict[str, Tensor]) -> list[Tensor]:
        return method.execute([values[name] for name in names])

    return Opened(run, names, tuple(outputs.split()), longest)
