"""The memory that a model takes in a runtime, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from .opened import BATCHES, Place, one_pass, opened


def peak_mb(place: Place, length: int, threads: int | None) -> float | None:
    """Megabytes that loading the model and a pass of the largest of BATCHES add to the process; None on a system that
    does not tell."""
    request = json.dumps([*place, length, threads])
    done = subprocess.run(
        [sys.executable, "-m", "sensibert.deploy.peak_memory", request], capture_output=True, text=True, check=False
    )
    try:
        return float(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return None


def main() -> None:
    *place, length, threads = json.loads(sys.argv[1])
    if threads is not None:
        torch.set_num_threads(threads)
    before = _peak()
    with torch.inference_mode():
        one_pass(opened(Place(*place), threads), max(BATCHES), length)
    print(json.dumps(_peak() - before))


def _peak() -> float:
    """Megabytes of memory that this process has had at most. On Linux not by getrusage, which counts the process that
    started this one too."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
