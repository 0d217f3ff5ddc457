"""Code in a process of its own, with or without sensibert (`from tests.fresh import ...`).

Importing torch and transformers takes five seconds, most of what a short program takes. So these processes are forked
from one that has imported them, and nothing of sensibert. Tests of imports ask for a new interpreter.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FORKED = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "torch.distributed", "transformers.trainer", "pytest", "sentence_transformers"]
FORKED.set_forkserver_preload(PRELOADED)

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


class Started:
    """A function in a forked process, with its own working directory and environment."""

    def __init__(self, function: Callable[..., None], *args: object, cwd: Path, **environment: str) -> None:
        self.said = Path(tempfile.mkdtemp())
        given = (function, args, self.said, cwd, {**os.environ, **environment})
        self.process = FORKED.Process(target=_enter, args=given)
        self.process.start()

    def ended(self, timeout: float = 600) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        out, err = ((self.said / name).read_text() for name in ("out", "err"))
        return self.process.exitcode, out, err

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.said)


def _enter(function: Callable[..., None], args: tuple, said: Path, cwd: Path, environment: Mapping[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    function(*args)


def _program(code: str, args: list[str], modules: str, isolated: bool) -> None:
    for module in [*sys.modules.values()]:  # transformers has read its environment already
        if "HF_MODULES_CACHE" in vars(module):  # hasattr would import what is lazy
            module.HF_MODULES_CACHE = modules
    sys.argv = ["-c", *args]
    sys.path[:] = [folder for folder in sys.path if folder and Path(folder).resolve() != ROOT]
    sys.path[:0] = [] if isolated else [str(ROOT)]
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})


def run(code: str, *args: object, cwd: Path, isolated: bool = False, interpreter: bool = False) -> str:
    """The last line that a program prints. isolated: nothing of this checkout is on its path. interpreter: in a new
    one, which has imported nothing."""
    words = [*map(str, args)]
    if interpreter:
        caches = {"HF_HOME": str(cwd / "hf"), "HF_MODULES_CACHE": str(cwd / "modules")}
        environment = os.environ | caches | ({} if isolated else {"PYTHONPATH": str(ROOT)})
        command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        status, out, err = forked(code, *args, cwd=cwd, isolated=isolated)
    assert status == 0, (out[-500:], err[-3000:])
    return (out.strip().splitlines() or [""])[-1]


def forked(code: str, *args: object, cwd: Path, isolated: bool = False, **environment: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a program in a forked process."""
    started = Started(_program, code, [*map(str, args)], str(cwd / "modules"), isolated, cwd=cwd, **environment)
    ended = started.ended()
    started.kill()
    return ended


def run_each(
    code: str, requested: dict[Any, tuple[object, ...]], here: Path, interpreter: bool = False
) -> dict[Any, str]:
    """What a program that begins with EACH says for each of several arguments. They share its imports."""
    folders = {name: here / str(number) for number, name in enumerate(requested)}
    for folder in folders.values():
        folder.mkdir()
    items = [(str(folders[name]), [str(part) for part in arguments]) for name, arguments in requested.items()]
    (here / "requested").write_text(json.dumps(items))
    run(EACH + code, here / "requested", cwd=here, interpreter=interpreter)
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


def python_in_fork(command: list[str], check: bool = False, **_: object) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run` of `python -m MODULE ...` or `python FILE ...`, with what it prints as text."""
    started = Started(_python, command[1:], cwd=Path.cwd())
    done = subprocess.CompletedProcess(command, *started.ended())
    started.kill()
    if check:
        done.check_returncode()
    return done


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__")
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
