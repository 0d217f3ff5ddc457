"""`sensibert finetune` in two processes, over gloo: it does what one does with the same batches, and tells it once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import main as torchrun
from transformers import AutoModelForSequenceClassification

from sensibert import SensibertError, finetune_and_trim
from sensibert.core.launch import Launch, launched
from tests import runs
from tests.fresh import Started
from tests.training.distributed import RUN, run, start

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A model without dropout, data, and in begun.partial the checkpoint after step 4 of 10 by one process."""
    folder = tmp_path_factory.mktemp("processes")
    runs.model_folder(folder / "model", hidden_dropout_prob=0.0)
    runs.sentence_file(folder / "train.csv", 160, seed=1)
    runs.sentence_file(folder / "dev.csv", 40, seed=2)
    runs.text_file(folder / "train.txt", 64)
    runs.scored_file(folder / "scored.csv", 16, seed=1)
    runs.embedding_folder(folder / "encoder")
    return folder


def alone(here, *more):
    given = ("--model", here / "model", "--train-file", here / "train.csv", *RUN)
    done = runs.command("finetune", *given, *more)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def whole(here):
    """The run of one process, without a break."""
    kept = ("--save-steps", 4, "--keep-checkpoints", "--save-before-cut", "--output", here / "begun")
    alone(here, *kept)
    for step in (8, 10):
        shutil.rmtree(here / f"begun.partial/checkpoint-{step}")
    (here / "begun").rename(here / "whole")
    return here / "whole"


@pytest.fixture(scope="module")
def both(here, whole):
    return run("commands", here, 2)


def same_model(ours, theirs):
    """The same kept units, and weights that differ by rounding."""
    ours, theirs = ({**load_file(folder / "model.safetensors")} for folder in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)  # AdamW enlarges gradients near 0


def test_the_plan_is_that_of_one_process_and_the_processes_end_with_the_same_bits(here, both):
    first, second = (rank["done"] for rank in both)
    assert (first["code"], second["code"]) == (0, 0) and first["digest"] == second["digest"]
    more = ("--teacher", "snapshot", "--eval-steps", 5, "--best", "--json", "--output", here / "alone")
    theirs = alone(here, "--validation-file", here / "dev.csv", *more).json
    ours = json.loads((here / "both/result.json").read_text())
    plans = [load_file(here / name / "plan.safetensors") for name in ("both", "alone")]
    assert all(torch.equal(plans[0][name], plans[1][name]) for name in plans[0].keys() | plans[1].keys())
    for name in ("encoder_params_after", "steps", "cut_step", "samples", "metrics_at_cut", "metrics", "best_step"):
        assert ours[name] == theirs[name], name
    assert ours["throughput"]["ops_per_step"].keys() == theirs["throughput"]["ops_per_step"].keys()  # packed
    same_model(here / "both", here / "alone")


def test_the_first_process_alone_prints(both):
    first, second = (rank["done"] for rank in both)
    assert json.loads(first["out"].splitlines()[-1])["output"] == "both" and "cut at step 3 of 10" in first["err"]
    assert second["out"] == "" and second["err"] == ""


def test_an_error_of_all_processes_is_told_once(both):
    first, second = (rank["wrong"] for rank in both)
    assert (first["code"], second["code"]) == (2, 2) and second["err"] == ""
    assert first["err"].count("sensibert: error:") == 1 and "nowhere" in first["err"]


def test_sigterm_to_one_process_saves_a_checkpoint_that_one_process_resumes(here, whole, both):
    assert [rank["stopped"]["code"] for rank in both] == [143, 143]
    assert [path.name for path in (here / "stopped.partial").glob("checkpoint-*")] == ["checkpoint-4"]
    given = ("--model", here / "model", "--train-file", here / "train.csv", *RUN, "--resume", "--output")
    assert runs.command("finetune", *given, here / "stopped").code == 0
    same_model(here / "stopped", whole)


def test_two_processes_resume_the_checkpoint_of_one(here, whole, both):
    assert [rank["resumed"]["code"] for rank in both] == [0, 0]
    assert both[0]["resumed"]["digest"] == both[1]["resumed"]["digest"]
    same_model(here / "begun", whole)


def test_a_resume_with_other_batches_is_refused(both):
    message = "has 16 rows a step, with processes 1, and this run 8, with processes 2: want 16, 8 in each process"
    assert both[0]["rows"]["code"] == 2 and message in both[0]["rows"]["err"]


def test_an_embedding_model(here, both):
    assert [rank["embedding"]["code"] for rank in both] == [0, 0], both[0]["embedding"]["err"]
    assert both[0]["embedding"]["digest"] == both[1]["embedding"]["digest"]
    assert (here / "embedding/config.json").exists() and not (here / "embedding.partial").exists()


def test_an_error_of_one_process_ends_all(here, whole):
    processes = start("failing", here, 2)
    try:
        (first, _, lost), (second, _, unreadable) = [process.ended() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert (first, second) == (2, 2)
    assert "sensibert: error: process 1: train.csv: cannot be read here" in unreadable
    assert "process 0 lost another one" in lost and not (here / "failing").exists()


def test_torchrun(here):
    given = ("--model", "model", "--train-file", "train.csv", "--max-steps", "3", "--batch-size", "16", "--quiet")
    command = ["--standalone", "--nproc-per-node", "2", "-m", "sensibert", "finetune", *given, "--output", "launched"]
    launcher = Started(torchrun, command, cwd=here)
    status, out, err = launcher.ended()
    launcher.kill()
    assert status == 0, err[-3000:]
    assert out.count("written to launched") == 1
    assert AutoModelForSequenceClassification.from_pretrained(here / "launched").config.sensibert


@pytest.fixture
def two(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "given, message",
    [
        (("--budgets", "75,50%params"), "budgets is '75,50%params' and 2 processes were started; want one process"),
        (("--keep", "99%", "--validation-file", "dev.csv"), "keep is '99%' and 2 processes were started"),
        (("--baseline",), "baseline is True and 2 processes were started"),
        (("--budget", "8ms"), "the costs of budget 8ms are measured and 2 processes were started"),
        (("--device", "cuda:0"), "device is 'cuda:0' and 2 processes were started; want 'auto' or 'cuda'"),
        (("--batch-size", "9"), "batch_size is 9 and 2 processes were started; want a multiple of 2"),
        (("--dry-run",), "finetune --dry-run: 2 processes were started, want one"),
        ((), "WORLD_SIZE is 2 and MASTER_ADDR, MASTER_PORT missing in the environment, want torchrun"),
    ],
)
def test_what_wants_one_process_is_refused_before_a_file_is_written(given, message, tmp_path, two, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    (tmp_path / "train.csv").write_text("sentence,label\nbad,0\ngood,1\n")
    out = ("--train-file", tmp_path / "train.csv", "--output", tmp_path / "out")
    ended = runs.command("finetune", "--model", "m", *out, *given)
    assert ended.code == 2 and message in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


def test_other_commands_want_one_process(two, tmp_path):
    ended = runs.command("analyze", "--model", tmp_path, "--output", tmp_path / "scores.safetensors")
    assert ended.code == 2 and "analyze: 2 processes were started, want one" in ended.err


def test_a_bad_argument_is_told_by_the_first_process_of_a_machine(two, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Launch(2, 1, 1)
    ended = runs.command("finetune", "--model", "m", "--train-file", "t.csv", "--batch-size", "9", "--output", tmp_path)
    assert (ended.code, ended.err) == (2, "")


def test_a_script_gets_the_same_refusal(two):
    from sensibert import Options

    with pytest.raises(SensibertError, match="batch_size is 9 and 2 processes"):
        finetune_and_trim(Options(model="m", train_file="t.csv", output="o", batch_size=9))
