"""Every snippet of README.md and of the pages in docs/ runs as it stands, in a folder with the files that it names.

A page is a test; its snippets run in order. Python shares one namespace, `sensibert` runs in this process, a yaml with
a title becomes that file. `make`, `pip install`, `python FILE` and `torchrun FILE` are checked, not run; `torchrun -m
sensibert` runs in this one process. A title that begins with "not run" or "fails" says so to readers and to this test;
what is neither code nor command is marked text.
"""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import typer
from transformers import AutoModelForSequenceClassification

from sensibert import cli
from tests import runs
from tests.fresh import python_in_fork

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)


class Snippet(NamedTuple):
    language: str
    title: str
    code: str
    line: int


def snippets(text: str) -> list[Snippet]:
    return [Snippet(m[1], m[2] or "", m[3], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text)]


def commands(code: str) -> list[list[str]]:
    """The words of each line of a shell snippet, without comments; a backslash joins lines."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def complaint(words: list[str], fails: bool) -> str | None:
    """Run or check one command; what is wrong with it, or None."""
    program, *rest = words
    if program == "torchrun" and "-m" in rest:
        program, *rest = rest[rest.index("-m") + 1 :]
    if program == "sensibert":
        done = runs.command(*rest)
        if fails:
            return None if done.code == 2 and len(done.err.splitlines()) == 1 else f"exit code {done.code}: {done.err}"
        return f"exit code {done.code}: {done.err}" if done.code else None
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return None if rest[0] in targets else f"{rest[0]} is no target of the Makefile"
    if program == "pip":
        wanted = set(re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", rest[-1]))))
        return f"no extra {wanted - extras()}" if tomllib and wanted - extras() else None
    if program in ("python", "torchrun"):
        script = next((word for word in rest if word.endswith(".py")), rest[0])
        return None if (ROOT / script).exists() else f"there is no {script}"
    return f"{program} is no command that is run or checked here: mark the snippet, or teach this test"


def extras() -> set[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()


PICTURES = "quickstart"  # the page whose runs draw: that takes longer than a tiny run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model of one layer under a well-known name, and a file of each kind that pages speak of."""
    tmp_path = tmp_path_factory.mktemp("pages")
    runs.model_folder(tmp_path / "bert-base-uncased", num_hidden_layers=1)
    runs.sentence_file(tmp_path / "train.csv", 96, seed=1)
    runs.sentence_file(tmp_path / "dev.csv", 40, seed=2)
    runs.sentence_file(tmp_path / "reviews.csv", 48, header=("body", "stars"))
    runs.pair_file(tmp_path / "pairs.csv")
    runs.sentence_file(tmp_path / "votes.csv", 48)
    runs.label_file(tmp_path / "messages.jsonl", 96)
    runs.label_file(tmp_path / "messages-dev.jsonl", 24, seed=1)
    runs.label_file(tmp_path / "messages.csv", 48)
    runs.tag_file(tmp_path / "tags.jsonl")
    runs.question_file(tmp_path / "squad-train.jsonl")
    runs.question_file(tmp_path / "squad-dev.jsonl", seed=1)
    runs.embedding_folder(tmp_path / "all-MiniLM-L6-v2", num_hidden_layers=1)
    runs.text_file(tmp_path / "texts.txt")
    runs.pair_file(tmp_path / "triplets.csv", header=("anchor", "positive", "negative"))
    runs.scored_file(tmp_path / "similar.csv")
    return tmp_path


@pytest.fixture
def here(request, files, tmp_path, monkeypatch):
    """The working directory, with a copy of the files. Runs of embedding models, 3,000 steps by default, take 12."""
    page = getattr(getattr(request.node, "callspec", None), "id", "")
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sensibert.run_options.STEPS_OF_EMBEDDING", 12)
    monkeypatch.setattr("sensibert.deploy.timed_models.subprocess", SimpleNamespace(run=python_in_fork))
    if f"{PICTURES}.md" not in page:
        monkeypatch.setattr("sensibert.run_output.write_report", lambda *args: [])
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_run_in_order(page, here, one_table_of_onnx_ops):
    if page.stem == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    if page.stem == "other-runtimes":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    namespace = {"__name__": "__main__"}
    for snippet in snippets(page.read_text(encoding="utf-8")):
        where = f"{page.relative_to(ROOT)}, line {snippet.line}"
        if snippet.title.startswith("not run") or snippet.language == "text":
            continue
        if snippet.language == "python":
            exec(compile(snippet.code, where, "exec"), namespace)
        elif snippet.language == "yaml" and snippet.title:
            (here / snippet.title).write_text(snippet.code)
        elif snippet.language == "bash":
            for words in commands(snippet.code):
                wrong = complaint(words, snippet.title.startswith("fails"))
                assert wrong is None, f"{where}: {shlex.join(words)}: {wrong}"
        else:
            raise AssertionError(f"{where}: {snippet.language!r} is neither python, bash, text nor a yaml with a title")


def test_the_python_of_the_readme_saves_what_it_trimmed(here):
    (snippet,) = [s for s in snippets(PAGES[0].read_text(encoding="utf-8")) if s.language == "python"]
    namespace = {}
    exec(snippet.code, namespace)
    trimmed, saved = namespace["model"].cpu().eval(), AutoModelForSequenceClassification.from_pretrained("small").eval()
    ids = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, trimmed(ids).logits)
    whole = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
    small, large = (sum(p.numel() for p in model.bert.encoder.parameters()) for model in (saved, whole))
    assert small <= large / 2


def test_snippets_that_are_not_run_are_few():
    marked = [s for page in PAGES for s in snippets(page.read_text("utf-8")) if s.title.startswith("not run")]
    assert len(marked) <= 4


@pytest.mark.parametrize(
    "words, fails, message",
    [
        (["make", "demo"], False, None),
        (["make", "coffee"], False, "coffee is no target"),
        (["pip", "install", ".[docs,bench]"], False, None),
        (["python", "bench/nothing.py"], False, "there is no"),
        (["rm", "-r", "/"], False, "rm is no command"),
        (["sensibert", "plan", "--sensitivity", "nothing"], True, None),
        (["sensibert", "plan", "--sensitivity", "nothing"], False, "exit code 2"),
        (["sensibert", "--version"], True, "exit code 0"),
    ],
)
def test_a_wrong_command_fails_in_words(words, fails, message, here):
    wrong = complaint(words, fails)
    assert wrong is None if message is None else message in wrong


def test_commands_are_split_like_a_shell_splits_them():
    code = "# first\nsensibert trim \\\n    --model 'a b'  # then\n\nmake demo\n"
    assert commands(code) == [["sensibert", "trim", "--model", "a b"], ["make", "demo"]]


def test_the_options_in_the_tables_of_the_command_line_exist():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `--")]
    named = set(re.findall(r"--[a-z-]+", " ".join(rows)))
    parameters = typer.main.get_command(cli.app).commands["finetune"].params
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    assert len(named) > 15 and named - known == set()
