"""Does a killed and resumed run give the weights of an uninterrupted one? Kills `sensibert finetune` at random moments
and compares weights.

python bench/check_resume.py --model MODEL --train-file F [--kills 3] [--steps 40] [--delay 3]
    ... --budget 30%params --precision bf16      # embeddings frozen, batches padded
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from sensibert.core.config import TrimConfig
from sensibert.run_options import PRECISIONS, Options


def command(arguments: argparse.Namespace, output: Path, *more: str) -> list[str]:
    steps = str(arguments.steps)
    run = [sys.executable, "-m", "sensibert", "finetune", "--model", arguments.model, "--output", str(output)]
    run += ["--train-file", arguments.train_file, "--max-steps", steps, "--save-steps", "5", "--quiet", *more]
    run += ["--budget", arguments.budget, "--precision", arguments.precision]
    return run


def newest(output: Path) -> int:
    """The step of a run's newest checkpoint, complete or not; 0 before the first."""
    checkpoints = Path(f"{output}.partial").glob("checkpoint-*")
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--budget", default=TrimConfig.budget)
    parser.add_argument("--precision", choices=PRECISIONS, default=Options.precision)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--delay", type=float, default=3, help="at most so many seconds after a checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        subprocess.run(command(arguments, whole), check=True, stdout=subprocess.DEVNULL)
        for number in range(arguments.kills):
            target = newest(broken) + generator.randint(1, max(1, arguments.steps // (arguments.kills + 1)))
            victim = subprocess.Popen(command(arguments, broken, "--resume"), stdout=subprocess.DEVNULL)
            while newest(broken) < target and victim.poll() is None:
                time.sleep(0.05)
            time.sleep(generator.uniform(0, arguments.delay))  # between two checkpoints, or while one is being written
            if victim.poll() is not None or broken.exists():
                raise SystemExit("the run ended before it was killed: more --steps or a smaller --delay")
            victim.kill()
            victim.wait()
            print(f"kill {number + 1}: the newest checkpoint is of step {newest(broken)}", flush=True)
        subprocess.run(command(arguments, broken, "--resume"), check=True, stdout=subprocess.DEVNULL)
        a, b = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    print(f"weights after {arguments.kills} kills: {'bit-equal' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
