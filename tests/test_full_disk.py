"""A disk that is full at any write, rename or sync ends a command in one line and exit code 2, and nothing is lost."""

import pytest

from tests import fresh, runs

# At every write point a forked process meets a full disk there; the process itself goes on.
FULL = """
import errno, io, re, shutil, traceback
from collections import Counter

import safetensors.torch, torch, transformers
from transformers import modeling_utils

from sensibert import cli, recipe, run_output
from sensibert.training.checkpoints import latest_checkpoint

folder, arguments = each()
place = folder / "place"
place.mkdir()
output, partial, kept = place / "out", place / "out.partial", folder / "kept"
run_output.write_report = lambda folder, *args: folder.mkdir() or (folder / "summary.txt").write_text("")
points, calls, full = [], Counter(), False
SENTENCE = os.strerror(errno.ENOSPC)

def copied(one, other):
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(one, other, symlinks=True)

def point(name, error):
    \"\"\"Fork: the child sees the error here, and at every later write.\"\"\"
    global full, active
    if full:
        raise error
    kind = re.sub(r"[0-9]+|\\.[^/]*\\.[0-9a-z_]{8}(?=/|$)|tmp[0-9a-z_]{8}", "N", name)
    if not os.path.isabs(name.rpartition(" ")[2]):  # a call: its first ones, and of many some
        calls[name] += 1
        kind += str(calls[name] if calls[name] < 4 else calls[name] // 16)
    if kind in points:
        return  # one like it was tried
    active = False
    points.append(kind)
    sys.stderr.flush()
    sys.stdout.flush()
    copied(place, kept)
    read, write = os.pipe()
    if not (child := os.fork()):
        full = active = True
        os.dup2(write, 2)
        os.dup2(write, 1)
        raise error
    os.close(write)
    with open(read, "rb") as said:
        lines = said.read().decode().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors = [line for line in lines if line.startswith("sensibert: error: ")]
    if code != 2 or len(errors) != 1 or any("Traceback" in line for line in lines) or len(lines) > 3:
        print(f"at {name}: code {code}", *lines[-40:], sep="\\n", flush=True)
        os._exit(1)
    if output.exists() and not (kept / "out").exists():
        print(f"at {name}: a part of the output is there", flush=True)
        os._exit(1)
    whole = partial.exists() and latest_checkpoint(partial)
    before = {path.name for path in kept.glob("out.partial/checkpoint-*/sensibert_manifest.json")}
    if before and not whole:
        print(f"at {name}: the checkpoints are lost", flush=True)
        os._exit(1)
    shutil.rmtree(place)
    copied(kept, place)
    os.chdir(place)
    active = True

def ours(path):
    return active and isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(str(place))

def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if ours(arguments[0]) and not str(arguments[0]).endswith((".sensibert-run", "out.partial")):  # of the lock
            point(f"open {arguments[0]}", OSError(errno.ENOSPC, SENTENCE, str(arguments[0])))
    elif event == "os.mkdir" and os.path.exists(arguments[0]):
        return  # nothing is written
    elif event in ("os.mkdir", "os.rename", "os.link") and ours(arguments[0]):
        point(f"{event} {arguments[0]}", OSError(errno.ENOSPC, SENTENCE, str(arguments[0])))

active = False
sys.addaudithook(watch)

def failing(module, name, error):
    original = getattr(module, name)
    def call(*args, **options):
        if active and not any(isinstance(value, io.BytesIO) for value in args):
            point(name, error)
        return original(*args, **options)
    setattr(module, name, call)

rust = f"{SENTENCE} (os error 28)"
failing(torch, "save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
failing(safetensors.torch, "save_file", safetensors.SafetensorError(f"I/O error: {rust}"))
for name in ("safe_save_file", "save_file"):
    if hasattr(modeling_utils, name):
        failing(modeling_utils, name, safetensors.SafetensorError(f"I/O error: {rust}"))
save = transformers.PreTrainedTokenizerFast.save_pretrained
def save_tokenizer(self, *args, **options):
    if active:
        point("tokenizer", Exception(rust))
    return save(self, *args, **options)
transformers.PreTrainedTokenizerFast.save_pretrained = save_tokenizer
failing(os, "fsync", OSError(errno.EIO, os.strerror(errno.EIO)))
sys.argv = ["sensibert", *arguments, "--output", str(output)]
active, code = True, 0
try:
    cli.main()
except SystemExit as end:
    code = end.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
active = False
if not full:
    print(len(points))
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # quickly: there are many processes
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    runs.workplace(folder)
    runs.embedding_folder(folder / "embeds")
    runs.text_file(folder / "texts.txt", 40)
    runs.model_folder(folder / "tuned", head="SequenceClassification", num_labels=2)
    scores, plan = folder / "scores.safetensors", folder / "plan.safetensors"
    assert runs.command("analyze", "--model", folder / "tuned", "--method", "magnitude", "--output", scores).code == 0
    assert runs.command("plan", "--sensitivity", scores, "--width-multiple", 4, "--output", plan).code == 0
    return folder


TRAINS = ("--max-steps", 3, "--batch-size", 8, "--width-multiple", 4, "--save-steps", 2)
COMMANDS = {
    "finetune": ("--model", "model", "--train-file", "train.csv", "--teacher", "snapshot", *TRAINS),
    "finetune embeddings": ("--model", "embeds", "--train-file", "texts.txt", "--task", "embedding", *TRAINS),
    "trim": ("--model", "tuned", "--plan", "plan.safetensors", "--layout", "both"),
    "plan": ("--sensitivity", "scores.safetensors", "--width-multiple", 4),
    "export": ("tuned", "--to", "torch"),
}


@pytest.fixture(scope="module")
def said(here, tmp_path_factory):
    def words(name):
        parts = (name.split()[0], *COMMANDS[name])
        return [here / part if isinstance(part, str) and (here / part).exists() else part for part in parts]

    return fresh.run_each(FULL, {name: words(name) for name in COMMANDS}, tmp_path_factory.mktemp("disks"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_at_any_write_ends_in_one_line(said, name):
    number = said[name].strip().splitlines()[-1]
    assert number.isdigit(), said[name][-3000:]
    assert int(number) >= {"finetune": 20, "trim": 12}.get(name.split()[0], 2)
