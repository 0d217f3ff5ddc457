"""How much faster is a trimmed model in other runtimes, and in 8 bits? One forward pass of each in turn, medians.

    python bench/bench_runtimes.py [--model MODEL --trimmed FOLDER --name NAME] [--batch 1 --length 128 --threads 1]

FOLDER is MODEL, trimmed to --budget. Without them: BERT-base with random weights, cut uniformly. `torch` is the model
as it is, `int8` ONNX Runtime with weights of 8 bits. The rival is the untrimmed model in the same runtime; int8 has
that in fp32 as a second one. Models take turns, so that a machine whose speed drifts slows all of them; of two passes
the second is measured, since the first wakes threads and fills the caches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _harness import record
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from sensibert import allocate, analyze, trim
from sensibert.deploy import RUNTIMES
from sensibert.deploy.graphs import input_names, quantize, random_inputs, trace
from sensibert.deploy.opened import IDLE_S
from sensibert.saving.folder import load

GRAPHS = ("torch", "onnx", "int8", "openvino")


def bert_base(budget: str) -> dict[str, PreTrainedModel]:
    """With random weights: how long a pass takes depends on shapes alone."""
    torch.manual_seed(0)
    whole = BertModel(BertConfig(), add_pooling_layer=False).eval()
    plan = allocate(analyze(whole, method="magnitude"), budget, allocation="uniform")
    return {"model": whole, "trimmed": trim(whole, plan, copy_model=True)}


def graphs(model: PreTrainedModel, scratch: Path, names: list[str], threads: int) -> dict[str, nn.Module]:
    """A model in every runtime."""
    model, found = model.eval(), {}
    for name in names:
        if name == "torch":
            found[name] = model
            continue
        runtime = RUNTIMES["onnx" if name == "int8" else name]
        file = scratch / name / Path(runtime.file).name
        file.parent.mkdir(parents=True)
        runtime.write(trace(model, None, runtime), file)
        if name == "int8":
            quantize(file, file.with_name("int8.onnx"))
            file = file.with_name("int8.onnx")
        found[name] = runtime.open(file, threads)
    return found


@torch.inference_mode()
def seconds(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    time.sleep(IDLE_S)
    model(**inputs)  # wakes its threads
    begin = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--trimmed")
    parser.add_argument("--name", help="of the model, for the rows")
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--runtimes", nargs="+", choices=GRAPHS, default=GRAPHS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    if not (bool(arguments.model) == bool(arguments.trimmed) == bool(arguments.name)):
        parser.error("want --model, --trimmed and --name, or none of them")
    torch.set_num_threads(arguments.threads)
    if arguments.model:
        both = {part: load(getattr(arguments, part))[0] for part in ("model", "trimmed")}
    else:
        both = bert_base(arguments.budget)
    name = arguments.name or "bert-base"
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for part, model in both.items():
            made = graphs(model, Path(scratch) / part, arguments.runtimes, arguments.threads)
            models |= {(part, runtime): module for runtime, module in made.items()}
        whole = both["model"]
        inputs = random_inputs(input_names(whole, None), whole.config.vocab_size, arguments.batch, arguments.length)
        inputs["attention_mask"].fill_(1)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
        for _ in range(arguments.rounds + 2):
            for key, model in models.items():
                times[key].append(seconds(model, inputs))
    medians = {key: 1e6 * statistics.median(values[2:]) for key, values in times.items()}
    for runtime in arguments.runtimes:
        case = f"{name} {arguments.budget} {runtime} {arguments.batch}x{arguments.length}"
        ours = medians["trimmed", runtime]
        record("bench_runtimes", case, "us", ours, "us", "untrimmed", medians["model", runtime])
        if runtime == "int8" and "onnx" in arguments.runtimes:
            record("bench_runtimes", case, "us", ours, "us", "untrimmed fp32", medians["model", "onnx"])


if __name__ == "__main__":
    main()
