"""A run or a trim that is killed at any moment of its publishing leaves the output whole, or as it was."""

import pytest

from tests import fresh, runs

# Forks at the beginning of publishing. Each child goes on and kills itself at one more call to the file system.
KILLED = """
import shutil, signal
from sensibert import cli, commands, recipe, run_output
from sensibert.saving import publish as publishing
from sensibert.training.checkpoints import latest_checkpoint
from tests.runs import tree

place, (existing, *arguments) = each()
output, partial, kept = place / "out", place / "out.partial", place / "kept"
if existing:
    shutil.copytree(existing, output)
    arguments.append("--overwrite")
run_output.write_report = lambda *args: None
EVENTS = {"os." + name for name in "rename remove rmdir mkdir link chmod symlink truncate".split()} | {"shutil.rmtree"}

class Calls:
    active, made, last, names = False, 0, 10**9, []

    def count(self, name):
        if self.active:
            self.made += 1
            self.names.append(name)
            if self.made > self.last:
                os.kill(os.getpid(), signal.SIGKILL)

calls = Calls()

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event in EVENTS or writes:
        calls.count(event)

sys.addaudithook(watch)
for module, name in ((os, "fsync"), (publishing, "_exchange")):
    original = getattr(module, name)
    setattr(module, name, lambda *a, _original=original, _name=name: (calls.count(_name), _original(*a))[1])

def content():
    # The header of safetensors is a dict in any order.
    if not output.exists():
        return None
    files = tree(output)
    if "result.json" in files:
        files["result.json"] = json.loads(files["result.json"]) | {"seconds": None}  # those of writing differ
    for name in [name for name in files if name.endswith(".safetensors")]:
        end = 8 + int.from_bytes(files[name][:8], "little")
        files[name] = json.loads(files[name][8:end]), files[name][end:]
    return files

def restore():
    for path, name in ((output, "output"), (partial, "partial")):
        shutil.rmtree(path, ignore_errors=True)
        if (kept / name).exists():
            shutil.copytree(kept / name, path, symlinks=True)
    for path in place.glob(".out*"):
        shutil.rmtree(path)

def forked(original):
    def run(*args, **options):
        for path, name in ((output, "output"), (partial, "partial")):
            if path.exists():
                shutil.copytree(path, kept / name, symlinks=True)
        before, whole, killed = content(), None, 0
        for last in (10**9, *range(0, 10**6, 5)):  # the first child is not killed
            child = os.fork()
            if not child:
                calls.last, calls.active = last, True
                return original(*args, **options)  # and on to the end of the command
            code = os.waitpid(child, 0)[1]
            after = content()
            if whole is None:
                assert code == 0 and after != before, code
                whole = after
                assert not existing or whole["notes.txt"] == b"mine"
            elif after != before and after != whole:
                now = after or {}
                print("after", last, "calls:", {n for n in whole.keys() | now.keys() if whole.get(n) != now.get(n)})
                os._exit(1)
            elif after == before and partial.exists() and latest_checkpoint(partial) is None:
                print("after", last, "calls: no checkpoint to resume from")
                os._exit(2)
            restore()
            if code == 0 and last != 10**9:
                break
            killed += code == signal.SIGKILL
        print(killed)
        sys.stdout.flush()
        os._exit(0)
    return run

if arguments[0] == "finetune":
    recipe._publish = forked(recipe._publish)
else:
    commands.export = forked(commands.export)
sys.argv = ["sensibert", *arguments, "--output", str(output)]
try:
    cli.main()
finally:
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    runs.model_folder(folder / "model")
    runs.sentence_file(folder / "train.csv", 32, seed=1)
    runs.model_folder(folder / "tuned", head="SequenceClassification", num_labels=2)
    scores, plan = folder / "scores.safetensors", folder / "plan.safetensors"
    assert runs.command("analyze", "--model", folder / "tuned", "--method", "magnitude", "--output", scores).code == 0
    assert runs.command("plan", "--sensitivity", scores, "--width-multiple", 4, "--output", plan).code == 0
    return folder


@pytest.fixture(scope="module")
def said(here, tmp_path_factory):
    runs.model_folder(here / "existing", head="SequenceClassification", seed=1, num_labels=2)
    (here / "existing" / "notes.txt").write_text("mine")
    commands = {
        "finetune": ["--model", here / "model", "--train-file", here / "train.csv", "--max-steps", 3]
        + ["--batch-size", 8, "--width-multiple", 4, "--save-steps", 2],
        "trim": ["--model", here / "tuned", "--plan", here / "plan.safetensors", "--layout", "both"],
    }
    requested = {
        (verb, existing): (here / existing if existing else "", verb, *arguments)
        for verb, arguments in commands.items()
        for existing in ("", "existing")
    }
    return fresh.run_each(KILLED, requested, tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("existing", ["", "existing"], ids=["new", "existing"])
@pytest.mark.parametrize("verb", ["finetune", "trim"])
def test_a_kill_at_any_call_leaves_the_output_whole_or_as_it_was(said, verb, existing):
    number = said[verb, existing].strip().splitlines()[-1]
    assert number.isdigit(), said[verb, existing][-3000:]
    assert int(number) > 5
