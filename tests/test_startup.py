"""What a command imports before it works or refuses: the libraries that take seconds are left out where not needed."""

import subprocess
import sys

import pytest

from tests import fresh, runs
from tests.fresh import ROOT
from tests.helpers import tiny_model

OF_TRAINING = {"datasets", "pandas", "pyarrow", "sklearn", "matplotlib", "transformers.trainer"}
SLOW = OF_TRAINING | {"torch", "transformers", "numpy", "scipy", "accelerate", "torch._dynamo"}

PROGRAM = """
import sys
from sensibert.cli import main
try:
    main()
finally:
    print("imported:", *sys.modules)
"""


def imported(*arguments: object) -> tuple[set[str], int]:
    """The modules that a command has imported at its end, and its exit code."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("imported:"), done.stderr
    return set(last.split()[1:]), done.returncode


def test_inspect_imports_no_trainer_and_nothing_that_reads_data(tmp_path):
    modules, code = imported("inspect", runs.model_folder(tmp_path / "model", head="SequenceClassification"))
    assert code == 0 and "transformers" in modules
    if found := OF_TRAINING & modules:  # transformers 5.14 imports scikit-learn and pandas with its models
        theirs = "import sys; from transformers import BertModel; print(*sys.modules)"
        found -= set(fresh.run(theirs, cwd=tmp_path, interpreter=True).split())
    assert not found


def test_plan_imports_no_transformers(tmp_path):
    from sensibert.sensitivity import analyze

    analyze(tiny_model(), method="magnitude").save(tmp_path / "scores.safetensors")
    modules, code = imported(
        "plan", "--sensitivity", tmp_path / "scores.safetensors", "--budget", "50%params", "--dry-run"
    )
    assert code == 0 and "torch" in modules and not (SLOW - {"torch", "numpy"}) & modules


WRONG = [
    "plan --sensitivity x --budget 5 --dry-run",
    "finetune --model m --train-file t --output o --grid element --budget 50%flops",
    "finetune --model m --train-file t --output o --epochs -1",
    "finetune --model m --train-file t --output o --no-such-option",
    "finetune --model m --output o",
    "finetune --model no/such/folder --train-file t --output o",
    "analyze --model m --train-file t --output o --method fihser",
    "trim --model m --plan p --output o --layout small",
    "trim --model m --plan p --output o --budget 50%params",
    "eval no/such/folder --validation-file v",
    "report no/such/folder",
    "export m --output o --to onxn",
    "export m --output o --max-loss much",
    "bench m --rounds 0",
    "inspect no/such/folder",
]
ONCE = """
from sensibert.cli import main

_, arguments = each()
sys.argv = ["sensibert", *arguments]
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
print()
print(code, *sys.modules, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    requested, here = {wrong: wrong.split() for wrong in WRONG}, tmp_path_factory.mktemp("wrong")
    return fresh.run_each(ONCE, requested, here, interpreter=True)


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_option_is_refused_before_anything_slow_is_imported(refused, arguments):
    code, *modules = refused[arguments].splitlines()[-1].split()
    assert code == "2" and "sensibert.cli" in modules and not SLOW & set(modules), refused[arguments][-3000:]
