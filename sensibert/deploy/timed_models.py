"""Times model folders in torch, in a process of its own: `torch.set_num_threads` called twice in a process can break
the linear algebra that comes after it (MKL, torch 2.13)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..core.errors import SensibertError
from ..saving.folder import load
from .graphs import input_names, random_inputs
from .probe_timing import clock_of, median_times


def times_in_torch(
    models: Sequence[PreTrainedModel], folder: Path, rows: int, length: int, threads: int
) -> list[float]:
    """Microseconds of a forward pass of each model, on so many threads. folder: for their files."""
    for number, model in enumerate(models):
        model.save_pretrained(folder / str(number))
    request = json.dumps([str(folder), len(models), rows, length, threads])
    done = subprocess.run(
        [sys.executable, "-m", "sensibert.deploy.timed_models", request], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SensibertError(
            f"latency: the models cannot be timed ({(done.stderr.strip() or 'killed').splitlines()[-1]})"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    folder, count, rows, length, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    models = [load(str(Path(folder) / str(number)))[0].eval() for number in range(count)]
    names = input_names(models[0], None)
    inputs = random_inputs(names, models[0].config.vocab_size, rows, length)
    inputs["attention_mask"].fill_(1)
    with torch.inference_mode():
        print(json.dumps(median_times([partial(model, **inputs) for model in models], clock_of(threads))))


if __name__ == "__main__":
    main()
