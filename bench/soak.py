"""Does a run survive being killed at any moment, and does a long one leak? Runs of a tiny model.

    python bench/soak.py [--kills 100] [--seed 0] [--steps 2000]

First, runs are killed at random moments, and resumed. Moments are spread over a whole run: loading, training, analysis,
cut, checkpoints, reports and publishing. After every kill the output must be missing or complete, and the run must
resume; its weights in the end must be those of a run that was not killed, bit for bit.

Then each training loop takes `--steps` steps: six cuts after a third of them, an evaluation and a checkpoint every 100.
Before and after the cuts memory must not grow, and as many files and threads must be open at the end as in the middle.

Prints a line of figures as JSON for the kills and for each long run; the exit code tells whether all held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from safetensors.torch import load_file
from transformers.utils import logging

from sensibert.callback import TrimCallback
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import Options
from sensibert.saving.folder import load
from sensibert.training.checkpoints import latest_checkpoint, partial_folder
from tests import runs

STEPS = 24
KILLED = {"max_steps": STEPS, "save_steps": 2, "teacher": "snapshot", "samples": 64, "resume": True}
SAMPLES = 100  # of a long run
GROWTH_MB = 4  # from the middle to the end of a phase; allocators keep what fragments


def child(place: Path, output: Path, settings: Mapping[str, Any] = KILLED, before: Callable[[], object] = list) -> int:
    """A process that trains, or goes on where it was killed; its number."""
    if number := os.fork():
        return number
    try:
        with open(place / "log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        before()
        places = {"train_file": "train.csv", "validation_file": "dev.csv", "model": "model"}
        files = {name: str(place / file) for name, file in places.items()}
        finetune_and_trim(Options.from_settings(output=str(output), quiet=True, **files, **settings))
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc(file=open(place / "log", "a"))
        os._exit(1)


def wait(number: int) -> int:
    """The exit code; minus the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def moment(output: Path) -> str:
    """Where a killed run was, by what it left."""
    partial = partial_folder(output)
    if output.exists():
        return "after the output was written"
    if not partial.exists():
        return "loading"
    if (partial / "final").exists():
        return "writing the output"
    newest = latest_checkpoint(partial)
    if newest is None:
        return "before the first checkpoint"
    incomplete = [path for path in partial.glob("checkpoint-*") if not complete(path)]
    where = "after" if (newest / "structure.safetensors").exists() else "before"
    return "while a checkpoint was written" if incomplete else f"{where} the cut"


def complete(checkpoint: Path) -> bool:
    return (checkpoint / "sensibert_manifest.json").exists()


def kills(place: Path, count: int, seed: int) -> dict[str, Any]:
    generator, moments, faults, done = random.Random(seed), Counter(), [], 0
    begin = time.perf_counter()
    assert wait(child(place, place / "whole")) == 0, (place / "log").read_text()
    seconds, made = time.perf_counter() - begin, 0
    while made < count:
        output = place / f"run-{done}"
        number = child(place, output)
        time.sleep(generator.uniform(0, seconds))
        os.kill(number, signal.SIGKILL)
        killed = wait(number) == -signal.SIGKILL
        if killed:
            made += 1
            moments[moment(output)] += 1
        if output.exists():
            load(str(output))  # raises for a folder that is not whole
        if not killed or made == count:
            code = 0 if output.exists() and not killed else wait(child(place, output))
            if code or not same(place / "whole", output):
                faults.append({"run": done, "code": code})
            shutil.rmtree(output, ignore_errors=True)
            done += 1
    return {"kills": made, "runs": done, "faults": faults, "killed": moments, "seconds_a_run": round(seconds, 1)}


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def sample(file: TextIO, step: int) -> None:
    """Append what this process holds: step, seconds, memory in MB, open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    file.write(f"{step} {time.process_time()} {pages * os.sysconf('SC_PAGE_SIZE') / 2**20} {files} {threads}\n")
    file.flush()


def long_run(place: Path, steps: int, packing: str) -> dict[str, Any]:
    """One run; its figures by phase, of each its third quarter and its last: CPU ms a step, MB, files, threads."""
    noted = place / f"samples-{packing}"

    def watch() -> None:
        file, step_end, every = open(noted, "w"), TrimCallback.on_step_end, max(1, steps // SAMPLES)

        def sampled(self, args, state, control, **kwargs):
            step_end(self, args, state, control, **kwargs)
            if state.global_step % every == 0:
                sample(file, state.global_step)

        TrimCallback.on_step_end = sampled

    settings = {"max_steps": steps, "schedule": "cubic", "packing": packing, "save_steps": 100, "eval_steps": 100}
    code = wait(child(place, place / f"long-{packing}", settings, watch))
    rows = [tuple(map(float, line.split())) for line in noted.read_text().splitlines()]
    figures: dict[str, Any] = {"packing": packing, "steps": steps, "faults": [] if code == 0 else [f"exit code {code}"]}
    phases = {"before the cuts": (0, steps / 3), "after the cuts": (0.54 * steps, steps)}  # cubic: 1/3 to 1/3 + 0.2
    for phase, (begin, end) in phases.items():
        inside = [row for row in rows if begin < row[0] < end]
        quarter = len(inside) // 4
        parts = inside[2 * quarter : 3 * quarter], inside[-quarter:]
        _, _, mb, files, threads = zip(*(map(median, zip(*part)) for part in parts))
        ms = [round(1000 * (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0]), 2) for part in parts]
        figures[phase] = {"ms_a_step": ms, "mb": [round(m, 1) for m in mb], "files": files, "threads": threads}
        if mb[1] - mb[0] > GROWTH_MB or len(set(files)) > 1 or len(set(threads)) > 1:
            figures["faults"].append(phase)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    faults = False
    with tempfile.TemporaryDirectory() as scratch:
        place = runs.workplace(Path(scratch))
        parts = [lambda: kills(place, arguments.kills, arguments.seed)] if arguments.kills else []
        parts += [partial(long_run, place, arguments.steps, way) for way in ("on", "off") if arguments.steps]
        for part in parts:
            figures = part()
            print(json.dumps(figures), flush=True)
            faults |= bool(figures["faults"])
    sys.exit(faults)


if __name__ == "__main__":
    main()
