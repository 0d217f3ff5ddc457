"""How much faster is a trimmed model in other runtimes, and in 8 bits? One forward pass of each in turn, medians.

    python bench/bench_runtimes.py --model MODEL --trimmed FOLDER --name NAME [--batch 1 --length 128 --threads 1]

FOLDER is MODEL, trimmed to --budget. `torch` is the model as it is, `int8` ONNX Runtime with weights of 8 bits. The
rival is the untrimmed model in the same runtime; int8 has that in fp32 as a second one. Passes alternate, so that a
machine whose speed drifts slows all of them.
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

from sensibert.deploy import RUNTIMES
from sensibert.deploy.graphs import Trace, quantize, random_inputs, trace
from sensibert.saving.folder import load

GRAPHS = ("torch", "onnx", "int8", "openvino")


def graphs(folder: str, scratch: Path, names: list[str], threads: int) -> tuple[dict[str, nn.Module], Trace]:
    """The model of a folder in every runtime, and what it is traced with."""
    model, tokenizer = load(folder)
    traced, found = trace(model.eval(), tokenizer), {}
    for name in names:
        if name == "torch":
            found[name] = model
            continue
        runtime = RUNTIMES["onnx" if name == "int8" else name]
        file = scratch / name / Path(runtime.file).name
        file.parent.mkdir(parents=True)
        runtime.write(traced, file)
        if name == "int8":
            quantize(file, file.with_name("int8.onnx"))
            file = file.with_name("int8.onnx")
        found[name] = runtime.open(file, threads)
    return found, traced


@torch.inference_mode()
def seconds(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    begin = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--trimmed", required=True)
    parser.add_argument("--name", required=True, help="of the model, for the rows")
    parser.add_argument("--budget", default="50%params")
    parser.add_argument("--runtimes", nargs="+", choices=GRAPHS, default=GRAPHS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        models = {}
        for part in ("model", "trimmed"):
            made, traced = graphs(getattr(arguments, part), Path(scratch) / part, arguments.runtimes, arguments.threads)
            models |= {(part, name): model for name, model in made.items()}
        inputs = random_inputs(
            traced.inputs, load(arguments.model)[0].config.vocab_size, arguments.batch, arguments.length
        )
        inputs["attention_mask"].fill_(1)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
        for _ in range(arguments.rounds + 2):
            for key, model in models.items():
                times[key].append(seconds(model, inputs))
    medians = {key: 1e6 * statistics.median(values[2:]) for key, values in times.items()}
    for name in arguments.runtimes:
        case = f"{arguments.name} {arguments.budget} {name} {arguments.batch}x{arguments.length}"
        ours = medians["trimmed", name]
        record("bench_runtimes", case, "us", ours, "us", "untrimmed", medians["model", name])
        if name == "int8" and "onnx" in arguments.runtimes:
            record("bench_runtimes", case, "us", ours, "us", "untrimmed fp32", medians["model", "onnx"])


if __name__ == "__main__":
    main()
