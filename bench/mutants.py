"""Would the tests notice a fault? Changes one place at a time and runs the tests that read the file.

    PYTHONPATH=. python bench/mutants.py sensibert/core sensibert/trimming [--sample 70] [--seed 0]

A mutant is one comparison, operator, constant, default, condition, returned value or statement that is another or
gone; a random sample of them is tried. Nothing is written: each runs in a fork that compiles the changed file when it
is imported. The tests are those of the file and of files that import it, first `--seconds` of them, and for what
survives these all others. Each survivor is printed, to be read: either a test is missing, or the change makes no
difference. The last line of a package is JSON: the killed share with its 95 % interval.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARISONS |= {ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
OPERATORS |= {
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
MESSAGES = ast.Raise | ast.JoinedStr | ast.Assert  # what is in one is not changed
Change = tuple[int, str, Callable[[], object]]


def changes(node: ast.AST) -> Iterator[Change]:
    """Line, kind and the change itself, which is made in the tree."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_params") or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for place, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                put = functools.partial(replace, node, field, place)
                yield from changed(child, node, put)
                for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                if not for_types and not isinstance(child, MESSAGES):
                    yield from changes(child)


def replace(node: ast.AST, field: str, place: int, new: ast.AST) -> None:
    value = getattr(node, field)
    value.__setitem__(place, new) if isinstance(value, list) else setattr(node, field, new)


def changed(node: ast.AST, parent: ast.AST, put: Callable[[ast.AST], object]) -> Iterator[Change]:
    line = getattr(node, "lineno", getattr(parent, "lineno", 0))
    if type(node) in COMPARISONS or type(node) in OPERATORS:
        table = COMPARISONS if type(node) in COMPARISONS else OPERATORS
        yield line, type(node).__name__, lambda: put(table[type(node)]())
    elif isinstance(node, ast.Constant) and not isinstance(parent, ast.Expr):
        value = node.value
        if isinstance(value, bool | int | float | str) and value != "":
            new = not value if isinstance(value, bool) else value + ("X" if isinstance(value, str) else 1)
            yield line, f"constant {value!r:.20}", lambda: put(ast.Constant(new))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield line, "return None", lambda: put(ast.Return(ast.Constant(None)))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield line, "condition", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield line, type(node.op).__name__, lambda: put(node.operand)
    elif isinstance(node, ast.Raise | ast.AugAssign | ast.Continue | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Yield)
    ):
        yield line, "statement gone", lambda: put(ast.Pass())


def mutant(file: Path, number: int) -> tuple[ast.Module, str]:
    """The changed file, and what the change is."""
    tree = ast.parse(file.read_text())
    line, kind, change = list(changes(tree))[number]
    change()
    text = file.read_text().splitlines()[line - 1].strip()
    return ast.fix_missing_locations(tree), f"{file.relative_to(ROOT)}:{line} [{kind}] {text}"


@functools.cache
def tests_of(file: Path) -> list[Path]:
    """First the file's own, then those that import it or a public name of it, then those of files that import it."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    names = [n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    public = "|".join([rf"{module}\b", *(rf"import [^\n]*\b{name}\b" for name in names if name[0] != "_")])
    readers = [path for path in (ROOT / "sensibert").rglob("*.py") if module in imports(path)]
    tests = [
        path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name not in ("native", "examples", "bench")
    ]
    own, indirect = test_of(file), {test_of(reader) for reader in readers}
    found = [path for path in tests if path in indirect | {own} or re.search(public, path.read_text())]
    return sorted(found, key=lambda path: (path != own, path in indirect, path.parent != own.parent, path))


@functools.cache
def imports(file: Path) -> set[str]:
    """The modules that a file of ours imports relatively."""
    place, found = file.relative_to(ROOT).parts, set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*place[: -node.level], *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def test_of(file: Path) -> Path:
    return ROOT / "tests" / file.relative_to(ROOT / "sensibert").parent / f"test_{file.stem}.py"


def run(
    tests: list[Path], seconds: int, file: Path | None = None, tree: ast.Module | None = None
) -> tuple[bool, float]:
    """Do the tests pass, in a process that has so many seconds and that changed file? With the seconds it took."""
    number = os.fork()
    if not number:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(10 * seconds)  # for one that waits and computes nothing
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 2)
        compiled = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(tree, str(file), "exec") if self.path == str(file) else compiled(self, name))  # fmt: skip
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *map(str, tests)]))
    _, code, used = os.wait4(number, 0)
    return code == 0, used.ru_utime + used.ru_stime


@functools.cache
def seconds_of(test: Path, most: int) -> float:
    """The CPU seconds that a test file takes; for one that fails or takes more than `most`, infinity."""
    passed, seconds = run([test], most)
    return seconds if passed else math.inf


def chosen(file: Path, most: int) -> tuple[list[Path], float]:
    """Tests of at most so many seconds, and their seconds. Only own tests may take longer, up to 90."""
    tests, total = [], 0.0
    for test in tests_of(file):
        seconds = seconds_of(test, most if test != test_of(file) else 90)
        if total + seconds <= most or not tests and seconds < math.inf:
            tests.append(test)
            total += seconds
        if total > most / 2:
            break
    return tests, total


def fails(test: Path, file: Path, tree: ast.Module) -> bool:
    """Whether a test file fails because of the change."""
    return not run([test], 60, file, tree)[0] and run([test], 60)[0]


def interval(hits: int, tries: int) -> tuple[float, float]:
    """Wilson's interval of a share."""
    z, share = 1.96, hits / tries
    middle, half = share + z * z / (2 * tries), z * math.sqrt(share * (1 - share) / tries + (z / tries / 2) ** 2)
    return tuple(round((middle + sign * half) / (1 + z * z / tries), 3) for sign in (-1, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, nargs="+")
    parser.add_argument("--sample", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=math.inf, help="a package; the rest of its sample is left")
    arguments = parser.parse_args()
    warm_up()
    for package in arguments.packages:
        end, killed, tried = time.monotonic() + 60 * arguments.minutes, 0, 0
        files = sorted(package.resolve().rglob("*.py")) if package.is_dir() else [package.resolve()]
        every = [(file, n) for file in files for n in range(len(list(changes(ast.parse(file.read_text())))))]
        for file, number in random.Random(arguments.seed).sample(every, min(arguments.sample, len(every))):
            if time.monotonic() > end:
                break
            tests, total = chosen(file, arguments.seconds)
            tree, text = mutant(file, number)
            survives = not tests or run(tests, int(3 * total + 5), file, tree)[0]
            survives = survives and not any(fails(test, file, tree) for test in tests_of(file) if test not in tests)
            killed, tried = killed + (not survives), tried + 1
            print("SURVIVES" if survives else "killed", text, f"({len(tests)} files)", flush=True)
        counts = {"package": str(package), "mutants": len(every), "sample": tried, "seed": arguments.seed}
        share = {"killed": killed, "share": round(killed / tried, 3), "interval": interval(killed, tried)}
        print(json.dumps(counts | share), flush=True)


def warm_up() -> None:
    """Import once what every test needs, but nothing of ours: a fork then starts in a fraction of a second."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    ours = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "sensibert").rglob("[a-z]*.py")]
    code = f"import importlib, sys\nfor name in {ours}: importlib.import_module(name)\nprint(*sys.modules)"
    for name in subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.split():
        if name.split(".")[0] not in ("sensibert", "__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    import hypothesis
    import pytest

    pytest.main(["--version", "-p", "no:cacheprovider"])  # loads its own plugins
    hypothesis.settings.register_profile("quick", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    hypothesis.settings.load_profile("quick")
    assert not any(name.split(".")[0] == "sensibert" for name in sys.modules)
    gc.freeze()


if __name__ == "__main__":
    main()
