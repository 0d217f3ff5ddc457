"""Does a killed run end where an unbroken one does? Kills `sensibert finetune` at random moments and compares weights.

python bench/check_resume.py --model MODEL --train-file F [--kills 3] [--steps 40]
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


def command(arguments: argparse.Namespace, output: Path, *more: str) -> list[str]:
    steps = str(arguments.steps)
    run = [sys.executable, "-m", "sensibert", "finetune", "--model", arguments.model, "--output", str(output)]
    run += ["--train-file", arguments.train_file, "--max-steps", steps, "--save-steps", "5", "--quiet", *more]
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        begin = time.monotonic()
        subprocess.run(command(arguments, whole), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - begin
        for number in range(arguments.kills):
            victim = subprocess.Popen(command(arguments, broken, "--resume"), stdout=subprocess.DEVNULL)
            try:
                victim.wait(seconds * chance.uniform(0.3, 0.8))
                raise SystemExit("the run ended before it was killed: more --steps")
            except subprocess.TimeoutExpired:
                victim.kill()
                victim.wait()
            found = sorted(p.name for p in Path(f"{broken}.partial").glob("checkpoint-*"))
            print(f"kill {number + 1}: checkpoints {', '.join(found) or 'none'}", flush=True)
        subprocess.run(command(arguments, broken, "--resume"), check=True, stdout=subprocess.DEVNULL)
        a, b = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    print(f"weights after {arguments.kills} kills: {'bit-equal' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
