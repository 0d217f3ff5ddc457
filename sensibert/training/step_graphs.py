"""Whole training steps as CUDA graphs: one for each shape of a batch, captured when the shape comes a second time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import described
from ..nn.packed_attention import Packing

Batch = dict[str, Tensor]
Step = Callable[[Batch, Packing], tuple[Tensor, Tensor]]  # -> loss, norm of the gradients; changes the weights
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # function -> (replay, its result)


def cuda_capture() -> Capture:
    """Captures into graphs that share one memory pool, since they never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = function()
        return graph.replay, result

    return capture


class StepGraphs:
    """Runs `step`, which must not read from the device, and replays it where it can.

    The first batch of a shape runs as it is, which prepares libraries; the second is captured. Inputs are copied into
    the tensors that were captured. If a capture fails, all steps run as they are from then on, and a warning says why.
    Captured memory is freed with this object."""

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._seen: set[tuple] = set()
        self._graphs: dict[tuple, tuple[Callable[[], None], Batch, Packing, tuple[Tensor, Tensor]]] = {}
        self.failed = False

    def __call__(self, batch: Batch, packing: Packing) -> tuple[Tensor, Tensor]:
        shape = (packing.rows, packing.max_length, *((name, tuple(value.shape)) for name, value in batch.items()))
        if not self.failed and shape in self._seen and shape not in self._graphs:
            self._add(shape, batch, packing)
        self._seen.add(shape)
        if shape not in self._graphs:
            return self._step(batch, packing)
        replay, inputs, places, results = self._graphs[shape]
        for name, value in inputs.items():
            value.copy_(batch[name])
        places.cu_seq_lens.copy_(packing.cu_seq_lens)
        replay()
        return results

    def _add(self, shape: tuple, batch: Batch, packing: Packing) -> None:
        inputs = {name: value.clone() for name, value in batch.items()}
        places = replace(packing, cu_seq_lens=packing.cu_seq_lens.clone())
        try:
            replay, results = self._capture(lambda: self._step(inputs, places))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self.failed = True
            self._graphs.clear()
            logging.getLogger("sensibert").warning("finetune: steps run without CUDA graphs (%s)", described(error))
            return
        self._graphs[shape] = replay, inputs, places, results
