"""Does a run survive being killed at any moment? Kills runs of a tiny model at random moments, and resumes them.

    python bench/soak.py [--kills 100] [--seed 0]

Moments are spread over a whole run: loading, training, analysis, cut, checkpoints, reports and publishing. After every
kill the output must be missing or complete, and the run must resume; its weights in the end must be those of a run that
was not killed, bit for bit. Prints one line of figures as JSON; the exit code tells whether all held.
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
from pathlib import Path

from safetensors.torch import load_file
from transformers.utils import logging

from sensibert.recipe import finetune_and_trim
from sensibert.run_options import Options
from sensibert.saving.folder import load
from sensibert.training.checkpoints import latest_checkpoint, partial_folder
from tests import runs

STEPS = 24


def child(place: Path, output: Path) -> int:
    """A process that trains, or goes on where it was killed; its number."""
    if number := os.fork():
        return number
    try:
        with open(place / "log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        files = {"train_file": str(place / "train.csv"), "validation_file": str(place / "dev.csv")}
        settings = {"max_steps": STEPS, "save_steps": 2, "teacher": "snapshot", "samples": 64, "quiet": True}
        finetune_and_trim(
            Options.from_settings(model=str(place / "model"), output=str(output), resume=True, **files, **settings)
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    generator, moments, faults, done = random.Random(arguments.seed), Counter(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        place = runs.workplace(Path(scratch))
        begin = time.perf_counter()
        assert wait(child(place, place / "whole")) == 0, (place / "log").read_text()
        seconds, kills = time.perf_counter() - begin, 0
        while kills < arguments.kills:
            output = place / f"run-{done}"
            number = child(place, output)
            time.sleep(generator.uniform(0, seconds))
            os.kill(number, signal.SIGKILL)
            killed = wait(number) == -signal.SIGKILL
            if killed:
                kills += 1
                moments[moment(output)] += 1
            if output.exists():
                load(str(output))  # raises for a folder that is not whole
            if not killed or kills == arguments.kills:
                code = 0 if output.exists() and not killed else wait(child(place, output))
                if code or not same(place / "whole", output):
                    faults.append({"run": done, "code": code})
                shutil.rmtree(output, ignore_errors=True)
                done += 1
    figures = {
        "kills": kills,
        "runs": done,
        "faults": faults,
        "killed": dict(moments),
        "seconds_a_run": round(seconds, 1),
    }
    print(json.dumps(figures))
    sys.exit(bool(faults))


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


if __name__ == "__main__":
    main()
