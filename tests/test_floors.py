"""The stairs of docs/design.md: imports only go down, verbs never meet outside recipe.py, kernels do not know torch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sensibert"
FLOORS = {
    "errors": 0,  # the cellar: any floor may use it
    "artifacts": 0.5,
    "_native": 2,
    "ops": 3,
    **dict.fromkeys(
        (
            "nn",
            "models",
            "cost",
            "solver",
            "optim",
            "tasks",
            "report",
            "schedule",
            "options",
            "sources",
            "checkpoints",
            "distil",
            "search",
            "surgeon",
            "_register",
        ),
        4,
    ),
    "pipeline": 5,
    "recipe": 6,
    "steps": 6.5,  # the verbs one at a time, on files
    "cli": 7,
    "__main__": 8,
    "": 9,  # sensibert/__init__.py, the front door: it may name everything and nobody inside walks through it
}
NEIGHBOURS = {4}  # floors whose rooms may import one another
VERBS = {"analyze", "allocate", "trim", "finetune", "export"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """sensibert/ops/x.py -> "ops.x"; an __init__ is its folder; the front door is "" (the empty name)."""
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
            for alias in node.names:  # `from sensibert.pipeline import trim` names a module, `... import Grid` does not
                name = f"{base}.{alias.name}".strip(".")
                path_of = package / name.replace(".", "/")
                found.add(name if path_of.is_dir() or path_of.with_suffix(".py").exists() else base)
    return found


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "sensibert"


def verb(module: str) -> str | None:
    room, _, stem = module.partition(".")
    return stem if room == "pipeline" and stem in VERBS else None


def complaint(path: Path, package: Path = PACKAGE) -> str | None:
    """The first broken rule of a file as a sentence, or None."""
    module, targets = module_of(path, package), imports(path, package)
    room = module.split(".")[0]
    if room not in FLOORS:
        return f"{module} stands on no floor: add it to FLOORS"
    for target in sorted(targets):
        other = target.split(".")[0]
        if other not in FLOORS:
            return f"{module} imports {target}, which stands on no floor"
        same_floor = room == other or (FLOORS[room] == FLOORS[other] and FLOORS[room] in NEIGHBOURS)
        if FLOORS[other] > FLOORS[room] or (FLOORS[other] == FLOORS[room] and not same_floor):
            return f"{module} (floor {FLOORS[room]}) imports {target or 'sensibert'} (floor {FLOORS[other]})"
    verbs = {v for v in map(verb, targets) if v} - {verb(module)}
    if verbs and room == "pipeline" and module != "pipeline":
        return f"{module} imports the verb {min(verbs)}: verbs meet only in recipe"
    if len(verbs) > 1 and room not in ("recipe", "steps", "") and module != "pipeline":
        return f"{module} imports the verbs {', '.join(sorted(verbs))}: only recipe knows their order"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: module_of(p) or "sensibert")
def test_imports_only_go_down(path):
    assert complaint(path) is None, complaint(path)


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("ops/x.py", "def f():\n    from ..nn import layer", r"ops.x \(floor 3\) imports nn \(floor 4\)"),
        ("artifacts.py", "import sensibert.cost", "artifacts .* imports cost"),
        ("errors.py", "from sensibert import artifacts", "errors .* imports artifacts"),
        ("nn/x.py", "from sensibert import Grid", r"nn.x \(floor 4\) imports sensibert \(floor 9\)"),
        ("pipeline/trim.py", "from . import analyze", "the verb analyze: verbs meet only in recipe"),
        ("pipeline/other.py", "from .trim import cut", "the verb trim: verbs meet only in recipe"),
        ("cli.py", "from .pipeline import analyze, trim", "only recipe knows"),
        ("attic.py", "", "attic stands on no floor"),
        ("recipe.py", "from .pipeline import analyze, trim\nfrom .pipeline.finetune import x", None),
        ("optim.py", "from sensibert.cost import params\nfrom sensibert.ops.x import y", None),
    ],
)
def test_a_crossed_floor_is_named(file, text, said, tmp_path):
    package = tmp_path / "sensibert"
    for name in [file, "artifacts.py", "nn/__init__.py", *(f"pipeline/{v}.py" for v in VERBS)]:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / file).write_text(text)
    found = complaint(package / file, package)
    assert found is None if said is None else found and re.search(said, found), found


def test_kernels_know_no_torch():
    torch_header = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11)/')
    guilty = [p for p in (ROOT / "csrc" / "kernels").rglob("*.*") if torch_header.search(p.read_text(encoding="utf-8"))]
    assert not guilty, f"floor 1 includes a torch header: {guilty}"
