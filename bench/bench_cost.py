"""How much time does a complete run take, compared with dense fine-tuning for the same number of steps?

    python bench/bench_cost.py --model MODEL --train-file F [--epochs 1] [--budgets 50%params 30%params]
    ... --model FOLDER --name bert-base --batch-size 128     # the row calls the model NAME

A run is warm-up, analysis, cut, recovery and saving. Measured are processor seconds (user and system) of the process
`sensibert finetune`, minus those of a run of one step, since importing, reading and saving take the same time in both.
Unlike wall time they do not depend on other processes. On a GPU wall time matters, so both are recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _harness import DEVICE, record

from sensibert.run_options import PRECISIONS, Options


def run(arguments: argparse.Namespace, *more: str) -> tuple[float, float]:
    """Processor and wall seconds of one run. Prints the seconds of its phases."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "sensibert", "finetune", "--model", arguments.model, "--quiet"]
        command += ["--train-file", arguments.train_file, "--output", str(Path(scratch) / "out")]
        command += ["--learning-rate", str(arguments.learning_rate), "--save-steps", str(10**9), *more]
        command += ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        phases = json.loads((Path(scratch) / "out" / "result.json").read_text())["seconds"]
        print(*more, *(f"{phase} {seconds:.1f}" for phase, seconds in phases.items()))
        return usage.ru_utime + usage.ru_stime, time.perf_counter() - begin


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
    arguments = parser.parse_args()
    precision = "--precision", arguments.precision
    length = "--epochs", str(arguments.epochs), *precision
    start = run(arguments, "--method", "baseline", "--max-steps", "1", *precision)
    dense = run(arguments, "--method", "baseline", *length)
    for budget in arguments.budgets:
        ours = run(arguments, "--budget", budget, *length)
        case = f"{arguments.name} " if arguments.name else ""
        case += f"{Path(arguments.train_file).parent.name} {budget} {arguments.epochs:g} epochs"
        case += f" {arguments.precision}" if arguments.precision != Options.precision else ""
        case += f" batch {arguments.batch_size}" if arguments.batch_size else ""
        metrics = ["processor_s"] + (["wall_s"] if DEVICE == "cuda" else [])
        for number, metric in enumerate(metrics):
            value, rival = ours[number] - start[number], dense[number] - start[number]
            row = record("bench_cost", case, metric, value, "s", "dense", rival)
            print(f"{case}: {row['value'] / row['rival_value']:.3f} of dense")


if __name__ == "__main__":
    main()
