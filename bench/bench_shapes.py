"""Why is a training step of a trimmed model slower than its number of operations suggests?

    python bench/bench_shapes.py [--model FOLDER --name NAME | --small] [--groups cuts multiples settings] [--profile]

Layers of a trimmed model have different widths, so each new length brings many new matrix shapes. A step whose length
came before (`again_ms`) shows what the shapes cost by themselves; a step of a first-seen length (`first_ms`) adds what
libraries spend to prepare them. The rows:

    ms                 mean per step, against the dense model (cuts) or the tapered cut without changes (other groups)
    first_ms, again_ms median of the steps of a first-seen and of a repeated length
    mallocs            allocations of GPU memory during the steps (GPU only)

The groups of cases:

    cuts        dense, uniform (each layer has half of its units) and tapered (0.2 to 0.8 of them); all batches of one
                length, and lengths distributed as in squad
    multiples   tapered, lengths as in squad padded to multiples of 8 and of 64
    settings    tapered, lengths as in squad, with a setting of the libraries: the number of cuBLASLt heuristics kept,
                all kernels loaded at the start, expandable segments of memory; on a CPU the primitives oneDNN keeps

Each case is a process of its own. Times are wall time on a GPU, which is synchronized after each step, and processor
time on a CPU. --profile prints what the first-seen and the repeated steps of the squad lengths spend their time on.
The CPU settings matter in bf16 only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from _harness import DEVICE, record
from bench_step import random_batch, tapered, train_step
from transformers import AutoConfig, AutoModelForQuestionAnswering, BertConfig

from sensibert.run_options import PRECISIONS
from sensibert.trimming.trim import trim

CUTS = {"dense": None, "uniform": 0.0, "tapered": 0.6}  # the slope of bench_step.tapered
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "cuda": {
        "cublaslt cache 262144": {"CUBLASLT_HEURISTICS_CACHE_CAPACITY": "262144"},  # 8,192 by default
        "cublaslt cache 0": {"CUBLASLT_HEURISTICS_CACHE_CAPACITY": "0"},
        "eager loading": {"CUDA_MODULE_LOADING": "EAGER"},
        "expandable segments": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    },
    "cpu": {
        "onednn cache 1024": {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"},  # the default
        "onednn cache 40000": {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "40000"},
    },
}
SMALL = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)  # MiniLM
WARM_UP = 5  # steps that are not counted; the first has the greatest length, and so allocates the most


class Case(NamedTuple):
    cut: str
    regime: str  # one, squad, squad x8, squad x64
    setting: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, self))


GROUPS = {
    "cuts": [Case(cut, regime) for regime in ("squad", "one") for cut in ("dense", "tapered", "uniform")],
    "multiples": [Case("tapered", "squad x8"), Case("tapered", "squad x64")],
    "settings": [Case("tapered", "squad", setting) for setting in SETTINGS[DEVICE]],
}


def lengths(regime: str, longest: int, steps: int) -> list[int]:
    """One length per step. squad: log-normal, as the longest rows of its batches, with a mean of 0.45 times longest."""
    kind, _, multiple = regime.partition(" x")
    if kind == "one":
        return [round(longest * 160 / 384)] * steps
    source = random.Random(0)
    drawn = [longest, *(int(longest / 384 * source.lognormvariate(5.08, 0.42)) for _ in range(steps - 1))]
    return [min(longest, n + -n % int(multiple or 1)) for n in drawn]


def measure(queue, config, arguments: argparse.Namespace, case: Case) -> None:
    """Put the metrics on the queue."""
    torch.manual_seed(0)
    device, bf16 = torch.device(DEVICE), arguments.precision == "bf16"
    model = AutoModelForQuestionAnswering.from_config(config).to(device).train()
    slope = CUTS[case.cut]
    if slope is not None:
        trim(model, tapered(model, slope=slope))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time  # not affected by other processes

    def step(length: int) -> float:
        """Milliseconds."""
        batch = random_batch(arguments.batch, length, config.vocab_size, device)
        wait()
        begin = clock()
        train_step(model, optimizer, batch, bf16)
        wait()
        return 1e3 * (clock() - begin)

    seen: set[int] = set()
    first, again, mallocs = [], [], 0
    for number, length in enumerate(lengths(case.regime, arguments.longest, WARM_UP + arguments.steps)):
        if number == WARM_UP:
            mallocs = allocations()
        elapsed = step(length)
        if number >= WARM_UP:
            (again if length in seen else first).append(elapsed)
        seen.add(length)
    facts = {"ms": statistics.mean(first + again)}
    facts |= {f"{name}_ms": statistics.median(times) for name, times in (("first", first), ("again", again)) if times}
    if DEVICE == "cuda":
        facts["mallocs"] = allocations() - mallocs
    print(f"{case}: {len(first)} steps of a first-seen length, {len(again)} of a repeated one", flush=True)
    if arguments.profile and case.regime == "squad" and not case.setting:
        unseen = [n for n in range(arguments.longest // 6, arguments.longest) if n not in seen]
        for name, chosen in (("first-seen", unseen[:4]), ("repeated", sorted(seen)[:4])):
            with torch.profiler.profile() as profile:
                for length in chosen:
                    step(length)
            averages = profile.key_averages()
            print(f"{case}: {len(chosen)} {name} steps, lengths {chosen}")
            print(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60), flush=True)
    queue.put(facts)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def allocations() -> int:
    return torch.cuda.memory_stats()["num_device_alloc"] if DEVICE == "cuda" else 0


def in_a_process(config, arguments: argparse.Namespace, case: Case) -> dict[str, float] | None:
    """The metrics of a case, None if its process failed. The libraries read their settings at the start."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(queue, config, arguments, case))
    with mock.patch.dict(os.environ, SETTINGS[DEVICE].get(case.setting, {})):
        process.start()
    process.join()
    return None if process.exitcode else queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--model", help="folder or hub name; its config alone is read. Default: BERT-base")
    shape.add_argument("--small", action="store_true", help="6 layers of width 384, as MiniLM")
    parser.add_argument("--name", help="of the model, for the rows")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--longest", type=int, default=384, help="tokens of the longest batch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}, want 1 or more")
    config = (
        AutoConfig.from_pretrained(arguments.model) if arguments.model else SMALL if arguments.small else BertConfig()
    )
    default = Path(arguments.model).name if arguments.model else "minilm-l6" if arguments.small else "bert-base"
    about = f"{arguments.batch}x{arguments.longest} {arguments.precision} x {arguments.steps}"
    means: dict[str, float] = {}
    failed = []
    for case in (case for group in GROUPS if group in arguments.groups for case in GROUPS[group]):
        facts = in_a_process(config, arguments, case)
        if facts is None:
            print(f"{case}: the process failed", file=sys.stderr)
            failed.append(case)
            continue
        means[str(case)] = facts["ms"]
        plain = Case(case.cut, case.regime) in GROUPS["cuts"] and not case.setting
        rival = f"dense {case.regime}" if plain else "tapered squad"
        for metric, value in facts.items():
            compared = (rival, means[rival]) if metric == "ms" and rival in means and rival != str(case) else ()
            unit = "1" if metric == "mallocs" else "ms"
            record("bench_shapes", f"{arguments.name or default} {case} {about}", metric, value, unit, *compared)
    if failed:
        raise SystemExit(f"{len(failed)} cases failed: {', '.join(map(str, failed))}")


if __name__ == "__main__":
    main()
