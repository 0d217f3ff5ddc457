"""How much time does a complete run take, compared with dense fine-tuning for the same number of steps?

    python bench/bench_cost.py --model MODEL --train-file F [--epochs 1] [--budgets 50%params 30%params]
    ... --model FOLDER --name bert-base --batch-size 128     # the row calls the model NAME
    ... --options=--freeze-embeddings                        # of the trimming run; the row names them

A run is warm-up, analysis, cut, recovery and saving. Measured are processor seconds (user and system) of the process
`sensibert finetune`, minus those of a run of one step, since importing, reading and saving take the same time in both.
Unlike wall time they hardly depend on other processes. What they do depend on, such as the clock of a shared machine,
changes with time and from core to core, so on a CPU the runs that are compared run side by side, each on a core of its
own, and then again with the cores exchanged; the means count. Let OMP_NUM_THREADS be 1. On a GPU, where one follows the
other, wall time matters, so both are recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _harness import DEVICE, record

from sensibert.run_options import PRECISIONS, Options


class Run:
    """A run in a process of its own, on one core if that is given, which has begun."""

    def __init__(self, arguments: argparse.Namespace, *more: str, core: int | None = None) -> None:
        self.more, self.scratch = more, tempfile.TemporaryDirectory()
        self.command = [sys.executable, "-m", "sensibert", "finetune", "--model", arguments.model, "--quiet"]
        self.command += ["--train-file", arguments.train_file, "--output", str(Path(self.scratch.name) / "out")]
        self.command += ["--learning-rate", str(arguments.learning_rate), "--save-steps", str(10**9), *more]
        self.command += ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
        self.begin = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})

    def end(self) -> tuple[float, float]:
        """Processor and wall seconds. Prints the seconds of its phases."""
        _, status, usage = os.wait4(self.process.pid, 0)
        seconds = time.perf_counter() - self.begin
        if status:
            raise SystemExit(f"{' '.join(self.command)} failed")
        phases = json.loads((Path(self.scratch.name) / "out" / "result.json").read_text())["seconds"]
        print(*self.more, *(f"{phase} {value:.1f}" for phase, value in phases.items()), flush=True)
        self.scratch.cleanup()
        return usage.ru_utime + usage.ru_stime, seconds


def side_by_side(*runs: Callable[..., Run]) -> list[tuple[float, float]]:
    """Processor and wall seconds of runs. On a GPU one follows the other. On a CPU they run at the same time, once for
    each way to exchange their cores, and the means are returned."""
    if DEVICE == "cuda":
        return [begin().end() for begin in runs]
    cores = sorted(os.sched_getaffinity(0))[: len(runs)]
    if len(cores) < len(runs):
        raise SystemExit(f"{len(cores)} core, want {len(runs)}: runs that are compared run side by side")
    turns = []
    for first in range(len(runs)):
        begun = [begin(core=cores[(first + number) % len(runs)]) for number, begin in enumerate(runs)]
        turns.append([run.end() for run in begun])
    return [tuple(map(statistics.mean, zip(*of_run, strict=True))) for of_run in zip(*turns, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--name", help="of the model, for the row")
    parser.add_argument("--precision", choices=PRECISIONS, default=Options.precision)
    parser.add_argument("--budgets", nargs="+", default=["50%params"])
    parser.add_argument("--options", default="", help="of `sensibert finetune`, for the run that trims")
    arguments = parser.parse_args()
    precision = "--precision", arguments.precision
    length = "--epochs", str(arguments.epochs), *precision
    baseline = "--method", "baseline"
    (start,) = side_by_side(partial(Run, arguments, *baseline, "--max-steps", "1", *precision))
    for budget in arguments.budgets:
        trimming = "--budget", budget, *shlex.split(arguments.options)
        dense, ours = side_by_side(
            partial(Run, arguments, *baseline, *length), partial(Run, arguments, *trimming, *length)
        )
        case = f"{arguments.name} " if arguments.name else ""
        case += f"{Path(arguments.train_file).parent.name} {budget} {arguments.epochs:g} epochs"
        case += f" {arguments.precision}" if arguments.precision != Options.precision else ""
        case += f" batch {arguments.batch_size}" if arguments.batch_size else ""
        case += f" {arguments.options}" if arguments.options else ""
        metrics = ["processor_s"] + (["wall_s"] if DEVICE == "cuda" else [])
        for number, metric in enumerate(metrics):
            value, rival = ours[number] - start[number], dense[number] - start[number]
            row = record("bench_cost", case, metric, value, "s", "dense", rival)
            print(f"{case}: {row['value'] / row['rival_value']:.3f} of dense")


if __name__ == "__main__":
    main()
