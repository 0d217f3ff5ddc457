"""Code in a process of its own, with or without sensibert (`from tests.fresh import ...`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

# First lines of a program in which sensibert cannot be imported.
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sensibert":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""

# First lines of a program that goes on once for each (folder, arguments) in a JSON file, after its imports, in a forked
# process with the folder as its working directory. What that says is in the file `said` there.
EACH = """
import json, os, sys
from pathlib import Path

def each():
    for folder, arguments in json.loads(Path(sys.argv[1]).read_text()):
        if not os.fork():
            os.chdir(folder)
            said = os.open("said", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            return Path(folder), arguments
        os.wait()
    os._exit(0)
"""

LOGITS = """
import sys
import torch, transformers
trust, given, written = sys.argv[1] == "trust", *sys.argv[2:]
folders, found = torch.load(given), {}
for name, (auto, folder, batch) in folders.items():
    model = getattr(transformers, auto).from_pretrained(folder, **({"trust_remote_code": True} if trust else {}))
    home = type(model).__module__.split(".")[0]
    assert home == ("transformers_modules" if trust else "sensibert"), (name, type(model))
    for parameter in model.parameters():  # a file's bytes may lie at odd addresses, where BLAS may sum in another order
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found[name] = model.eval()(**batch)[0]
assert trust != ("sensibert" in sys.modules)
torch.save(found, written)
"""


def run(code: str, *args: object, cwd: Path, isolated: bool = False) -> str:
    """The last line that a program prints. isolated: nothing of this checkout is on its path."""
    environment = os.environ | {"HF_HOME": str(cwd / "hf"), "HF_MODULES_CACHE": str(cwd / "modules")}
    environment |= {} if isolated else {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-500:], done.stderr[-3000:])
    return (done.stdout.strip().splitlines() or [""])[-1]


def run_each(code: str, requested: dict[Any, tuple[object, ...]], here: Path) -> dict[Any, str]:
    """What a program that begins with EACH says for each of several arguments. They share its imports."""
    folders = {name: here / str(number) for number, name in enumerate(requested)}
    for folder in folders.values():
        folder.mkdir()
    items = [(str(folders[name]), [str(part) for part in arguments]) for name, arguments in requested.items()]
    (here / "requested").write_text(json.dumps(items))
    run(EACH + code, here / "requested", cwd=here)
    return {name: (folder / "said").read_text() for name, folder in folders.items()}


def outputs_of(
    folders: dict[str, tuple[str, Path, dict[str, Tensor]]], trust_remote_code: bool, cwd: Path
) -> dict[str, Tensor]:
    """name -> (Auto class, folder, batch) to name -> first output, computed in a fresh process: with `import
    sensibert`, or with trust_remote_code=True and no sensibert to import."""
    given, written = cwd / f"given-{trust_remote_code}.pt", cwd / f"written-{trust_remote_code}.pt"
    torch.save({name: (auto, str(folder), batch) for name, (auto, folder, batch) in folders.items()}, given)
    first = WITHOUT if trust_remote_code else "import sensibert"
    kind = "trust" if trust_remote_code else "import"
    run(first + LOGITS, kind, given, written, cwd=cwd, isolated=trust_remote_code)
    return torch.load(written)
