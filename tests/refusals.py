"""Commands that must be refused, and the folders they are tried on (`from tests.refusals import ...`)."""

import re
from contextlib import contextmanager
from pathlib import Path

from tests import runs
from tests.runs import command, tree


def folders(folder: Path) -> Path:
    """A base model, two fine-tuned ones, their sensitivities and a plan of the first. Nobody may change them."""
    runs.model_folder(folder / "model")
    runs.sentence_file(folder / "train.csv", 32, seed=1)
    runs.sentence_file(folder / "dev.csv", 16, seed=2)
    for name, seed in (("tuned", 0), ("other", 1)):
        runs.model_folder(folder / name, head="SequenceClassification", seed=seed, num_labels=2)
        scores = folder / f"{name}.safetensors"
        assert command("analyze", "--model", folder / name, "--method", "random", "--output", scores).code == 0
    requested = ("plan", "--sensitivity", folder / "tuned.safetensors", "--step", 4, "--output", folder / "plan")
    assert command(*requested).code == 0
    return folder


@contextmanager
def untouched(*folders):
    before = [tree(folder) for folder in folders]
    yield
    for folder, then in zip(folders, before, strict=True):
        assert tree(folder).keys() == then.keys()
        assert tree(folder) == then


def refused(message: str, *arguments) -> str:
    """Run a command that must be refused in one line that matches `message`; returns the line."""
    done = command(*arguments)
    lines = done.err.splitlines()
    assert done.code == 2, done
    assert len(lines) == 1 and lines[0].startswith("sensibert: error: ") and "Traceback" not in done.out, done
    assert re.search(message, lines[0]), lines[0]
    return lines[0]


def finetune_arguments(here, output, **changed):
    requested = {"model": here / "model", "output": output, "train-file": here / "train.csv"}
    requested |= {"validation-file": here / "dev.csv", "max-steps": 3, "batch-size": 8, "width-multiple": 4} | changed
    given = {name: value for name, value in requested.items() if value is not None}
    return ["finetune", *(part for name, value in given.items() for part in (f"--{name}", value))]
