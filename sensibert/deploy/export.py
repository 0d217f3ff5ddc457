"""A model -> a folder with its graph for a runtime, which loads without this package."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.arguments import checked
from ..core.errors import SensibertError
from ..core.export_options import check_export
from ..core.output_paths import check_output
from ..models.modules import copy_of, positions
from ..models.reloadable import stock_class, stock_config
from ..nn import restore
from ..saving.folder import new_folder
from ..saving.sentence_transformers import copy_modules, source_of
from .graphs import INT8_FILE, RUNTIMES, Graph, Trace, quantize, random_inputs, trace

HALF_TOLERANCE = 1e-2  # of the outputs with embeddings in fp16, which have 11 bits
ANY_LOSS = 0.999
RUNTIMES_OF_GRAPHS = ("onnx", "onnx-int8", "openvino")  # of a budget; its others run the folder itself
# Rows and tokens of made-up text: one row, an odd length, and one that fills a batch.
SHAPES = ((1, 7), (3, 64), (8, 33))

Score = Callable[[nn.Module], dict[str, float]]  # (model or graph) -> metrics, the main one first


@checked
def export_graph(
    model: PreTrainedModel,
    output: str,
    to: str = "onnx",
    tokenizer: PreTrainedTokenizerBase | None = None,
    int8: bool = False,
    fp16_embeddings: bool = False,
    score: Score | None = None,
    max_loss: float = 0.005,
    overwrite: bool = False,
) -> dict:
    """Write a folder with the model's graph, a stock config, its tokenizer and modules of sentence-transformers.

    to: `onnx` (onnx/model.onnx), `openvino` (openvino/openvino_model.xml), `torch` (torch/model.pt2 of torch.export) or
    `executorch` (model.pte). The outputs of the graph are compared with the model's on made-up text. fp16_embeddings:
    store embedding tables in 16 bits (onnx, openvino). int8: write onnx/model_quantized.onnx too, unless it loses more
    than the fraction max_loss of the main metric. score: metrics of a module, the main one first, for the model and
    every graph.

    Returns facts: files with their bytes, the largest difference of the outputs, metrics, and the tokens of the longest
    text where there is a limit. SensibertError for a runtime
    that is not installed, a model without a graph, or a graph that computes something else; nothing is then written."""
    check_export(to, int8, fp16_embeddings)
    if not 0 <= max_loss < 1:
        raise SensibertError(f"max_loss is {max_loss}, want a fraction from 0 to 1")
    runtime = RUNTIMES[to]
    runtime.want_packages(to)
    check_output(output, overwrite)
    modules = source_of(model)
    model = plain(model)
    traced = trace(model, tokenizer, runtime)._replace(half_tables=fp16_embeddings)
    facts: dict[str, Any] = {"to": to, "int8": False}
    with new_folder(Path(output).resolve(), overwrite) as folder:
        (folder / runtime.file).parent.mkdir(exist_ok=True)
        runtime.write(traced, folder / runtime.file)
        graph = runtime.open(folder / runtime.file, None)
        facts["difference"] = _want_same(model, graph, traced, to)
        if score is not None:
            facts["metrics"] = {"model": score(model), to: score(graph)}
        if int8:
            facts |= _with_int8(folder, traced, facts.get("metrics"), score, max_loss)
        graphs = sorted(path for path in folder.rglob("*") if path.is_file())
        facts["files"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in graphs}
        config = stock_config(model.config)
        config.architectures = [stock_class(model).__name__]
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if modules is not None:
            copy_modules(modules, folder, model.config.problem_type == "regression")
    facts |= {} if traced.longest is None else {"longest": traced.longest}
    return {**facts, "output": str(output)}


def export_for(
    runtime: str,
    model: PreTrainedModel,
    output: str,
    tokenizer: PreTrainedTokenizerBase,
    score: Score | None,
    weights: str = "fp32",
) -> dict:
    """`export_graph` for a runtime of a budget. The graph in int8 is kept whatever it loses, which the facts tell.
    weights: with fp16, embedding tables are stored in 16 bits."""
    to, _, int8 = runtime.partition("-")
    halved = weights == "fp16" and not int8
    return export_graph(model, output, to, tokenizer, bool(int8), halved, score=score, max_loss=ANY_LOSS)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in fp32 on the CPU, in eval mode, with zeros in place of masks."""
    made = restore(copy_of(model).cpu().float()).eval()
    assert isinstance(made, PreTrainedModel)  # as the model is
    return made


def _with_int8(folder: Path, traced: Trace, metrics: dict | None, score: Score | None, max_loss: float) -> dict:
    """Write the quantized graph, and delete it again if it loses too much. Returns the facts."""
    file = folder / INT8_FILE
    source = folder / RUNTIMES["onnx"].file
    if traced.half_tables:  # quantized, they are smaller still
        source = file.with_name("full.onnx")
        RUNTIMES["onnx"].write(traced._replace(half_tables=False), source)
    quantize(source, file)
    if traced.half_tables:
        source.unlink()
    if score is None or metrics is None:
        logging.getLogger("sensibert").warning(
            "export: nothing tells what int8 loses, want a validation file to measure it"
        )
        return {"int8": True}
    found = score(RUNTIMES["onnx"].open(file, None))
    name, full = next(iter(metrics["onnx"].items()))
    loss = (full - found[name]) / abs(full) if full else 0.0
    kept = loss <= max_loss
    if not kept:
        file.unlink()
        logging.getLogger("sensibert").warning(
            "export: int8 loses %.2f %% of %s (%.4f, was %.4f), more than max_loss (%.2f %%); only fp32 is written",
            100 * loss, name, found[name], full, 100 * max_loss,
        )  # fmt: skip
    return {"int8": kept, "int8_loss": loss, "metrics": metrics | {"int8": found}}


def _want_same(model: PreTrainedModel, graph: Graph, traced: Trace, to: str) -> float:
    """The largest difference of an output on made-up text, as a fraction of the largest output; SensibertError if it is
    beyond the runtime's tolerance."""
    worst = 0.0
    longest = positions(model) or max(tokens for _, tokens in SHAPES)
    for rows, tokens in ((rows, min(tokens, longest)) for rows, tokens in SHAPES):
        batch = random_inputs(traced.inputs, model.config.vocab_size, rows, tokens, seed=tokens)
        with torch.no_grad():
            wanted, found = model(**batch, return_dict=True), graph(**batch)
        for name in traced.outputs:
            worst = max(worst, _difference(wanted[name], found[name], batch["attention_mask"]))
    tolerance = HALF_TOLERANCE if traced.half_tables else RUNTIMES[to].tolerance
    if not worst <= tolerance:
        raise SensibertError(
            f"export: the outputs of the {to} graph are off by {worst:.1e} of the largest, want at most {tolerance:.0e}"
        )
    return worst


def _difference(wanted: Tensor, found: Tensor, mask: Tensor) -> float:
    """Of outputs [B, ...], or of those of real tokens [B, S, ...]; infinite for another shape or numbers that are not
    finite."""
    if wanted.shape != found.shape:
        return float("inf")
    if wanted.shape[:2] == mask.shape:
        wanted, found = wanted[mask.bool()], found[mask.bool()]
    difference = (wanted.float() - found).abs().max() / wanted.float().abs().max().clamp_min(1e-6)
    return float(difference) if difference.isfinite() else float("inf")
