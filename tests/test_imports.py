"""The order of docs/design.md: a module imports what stands above it, verbs do not import one another, and kernels do
not know torch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sensibert"
# From the bottom up: what stands later may import what stands earlier, never the other way round. Modules of one line
# may not import one another; those of a package may, without a circle.
ORDER = (
    ("core",),
    ("_native",),
    ("ops",),
    ("nn",),
    ("optim",),
    ("models",),
    ("_register",),
    ("sensitivity", "allocation", "trimming", "data", "training", "saving"),  # the verbs
    ("report", "deploy"),
    ("run_options",),
    ("cli_options",),
    ("trainer_arguments",),
    ("inputs",),
    ("decide",),
    ("size_choice",),
    ("run_inputs",),
    ("start_checks",),
    ("run_budget",),
    ("callback",),
    ("branches",),
    ("family",),
    ("floor",),
    ("run_output",),
    ("run_form",),
    ("run_training",),
    ("recipe",),
    ("planning",),
    ("inspection",),
    ("dry_run",),
    ("commands",),
    ("compare",),
    ("cli_errors",),
    ("cli",),
    ("__main__",),
    ("",),  # sensibert/__init__.py names everything, and nobody inside imports it
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Compensation solves with the factors that the analysis collected.
ALLOWED = {("trimming.compensate", "sensitivity.kfac_obs")}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """sensibert/ops/x.py -> "ops.x"; an __init__ is its folder; sensibert/__init__.py is the empty name."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Every module of the package that a file imports anywhere in it, inside functions too, as in module_of."""
    module, found = module_of(path, package).split("."), set()
    here = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sensibert").lstrip(".") for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])]).strip(".")
            elif is_ours(node.module or ""):
                base = node.module.removeprefix("sensibert").lstrip(".")
            else:
                continue
            for alias in node.names:  # `from sensibert.core import cost` names a module, `... import Grid` does not
                name = f"{base}.{alias.name}".strip(".")
                path_of = package / name.replace(".", "/")
                found.add(name if path_of.is_dir() or path_of.with_suffix(".py").exists() else base)
    return found


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "sensibert"


def complaint(path: Path, package: Path = PACKAGE) -> str | None:
    """The first broken rule of a file as a sentence, or None."""
    module, targets = module_of(path, package), imports(path, package)
    part = module.split(".")[0]
    if part not in RANK:
        return f"{module} has no place in the order: add it to ORDER"
    for target in sorted(targets):
        other = target.split(".")[0]
        if other not in RANK:
            return f"{module} imports {target}, which has no place in the order"
        if other == part or (module, target) in ALLOWED:
            continue
        if RANK[other] == RANK[part]:
            return f"{module} imports {target}: verbs do not import one another"
        if RANK[other] > RANK[part]:
            return f"{module} imports {target or 'sensibert'}, which stands above it"
    return None


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a ring, or None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := visit(module, []))), None)


def arrows() -> dict[str, set[str]]:
    """Module -> the modules it imports, without packages that a module of theirs imports back as a whole."""
    return {module_of(path): imports(path) - {module_of(path)} for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: module_of(p) or "sensibert")
def test_imports_follow_the_order(path):
    assert complaint(path) is None, complaint(path)


def test_no_modules_import_one_another():
    assert circle(arrows()) is None


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("ops/x.py", "def f():\n    from ..nn import layer", r"ops.x imports nn, which stands above it"),
        ("core/artifacts.py", "import sensibert.ops", "core.artifacts imports ops"),
        ("core/errors.py", "from sensibert import models", "core.errors imports models"),
        ("nn/x.py", "from sensibert import Grid", r"nn.x imports sensibert, which stands above it"),
        ("trimming/trim.py", "from ..allocation import allocate", "trimming.trim imports allocation: verbs do not"),
        ("training/x.py", "from ..sensitivity.kfac_obs import y", "verbs do not import one another"),
        ("trimming/compensate.py", "from ..sensitivity.kfac_obs import y", None),
        ("attic.py", "", "attic has no place"),
        ("cli.py", "from .attic import x", None),
        ("recipe.py", "from .sensitivity import analyze\nfrom .trimming.trim import trim", None),
        ("optim/x.py", "from sensibert.core.cost import params\nfrom sensibert.ops.x import y", None),
    ],
)
def test_a_broken_rule_is_named(file, text, message, tmp_path):
    package = tmp_path / "sensibert"
    for name in [file, "core/__init__.py", "nn/__init__.py", "models/__init__.py", "ops/x.py"]:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / file).write_text(text)
    found = complaint(package / file, package)
    if file == "cli.py":
        assert found and "attic, which has no place" in found, found
        return
    assert found is None if message is None else found and re.search(message, found), found


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None


def test_kernels_know_no_torch():
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11)/')
    guilty = [p for p in (ROOT / "csrc" / "kernels").rglob("*.*") if torch_header.search(p.read_text(encoding="utf-8"))]
    assert not guilty, f"a kernel includes a torch header: {guilty}"
