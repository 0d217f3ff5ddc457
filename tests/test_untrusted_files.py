"""Nothing in a file is run: no pickle is read without a list of what it may hold, and continuous integration may not
write."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [*(ROOT / "sensibert").rglob("*.py"), *(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")]
)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    value = next((each.value for each in call.keywords if each.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle_is_read(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    for call in calls(path):
        name = ast.unparse(call.func)
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, f"line {call.lineno}"
        assert not keyword(call, "allow_pickle"), f"line {call.lineno}"
        if name.startswith("yaml.load"):
            assert "Loader" in ast.unparse(call), f"line {call.lineno}"
        own = path.name == "check_alone.py"  # loads only folders that it has written
        if keyword(call, "trust_remote_code") is not None and not own:
            assert keyword(call, "trust_remote_code") is False, f"line {call.lineno}"


def test_programs_in_texts_read_no_pickle_either():
    for path in SOURCES:
        for given in re.findall(r"torch\.load\(([^()]*)\)", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in given, path


def test_workflows_may_only_read_the_repository():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}, path
