"""What people see of a run: in a terminal, in a file, and with --quiet."""

import os
import pty
import re
import sys

import pytest
import torch

from sensibert import cli, run_training
from tests import runs
from tests.runs import command

PHASES = ["load", "warm-up", "evaluate", "analyze", "cut", "recover", "evaluate", "measure", "write"]
CUT = r"cut at step 4 of 12: encoder 17\.1K -> 8\.\dK parameters, 8 -> \d heads, FFN 128 -> \d+ neurons"
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("console"))


def arguments(here, output, *more):
    files = ("--train-file", here / "train.csv", "--validation-file", here / "dev.csv", "--output", output)
    speed = ("--max-steps", 12, "--batch-size", 16, "--learning-rate", 3e-3, "--width-multiple", 4)
    return [str(each) for each in ("finetune", "--model", here / "model", *files, *speed, *more)]


def in_terminal(*requested) -> str:
    """What a terminal receives from a command."""
    child, end = pty.fork()
    if child == 0:  # forked: it need not import everything once more
        try:
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
            sys.argv = ["sensibert", *requested]
            cli.main()
            sys.stdout.flush()
        finally:
            os._exit(0)
    text = b""
    try:
        while part := os.read(end, 65536):
            text += part
    except OSError:  # the terminal closed
        pass
    os.waitpid(child, 0)
    return text.decode()


def assert_without_trainer(text: str) -> None:
    for wrong in ("{'", "train_runtime", "Loading weights", "it/s", "%|"):
        assert wrong not in text, wrong


def finished(lines) -> list[str]:
    """The phases that lines tell the seconds of."""
    label = re.compile(r"([a-z-]+) +(?:[\d,]+ [a-z-]+, )?\d+\.\d s\b")
    return [match[1] for line in lines if (match := label.match(line))]


def test_a_file_receives_plain_lines_with_every_phase_and_the_cut(here, tmp_path):
    done = command(*arguments(here, tmp_path / "out"), shown=True)
    assert done.code == 0 and "\r" not in done.err and "\x1b" not in done.err
    assert_without_trainer(done.err + done.out)
    lines = [re.fullmatch(r"\[\d:\d\d:\d\d\] (.*)", line)[1] for line in done.err.splitlines()]
    assert [line.split()[0] for line in lines if " ..." in line] == PHASES == finished(lines)
    assert len([line for line in lines if re.match(CUT, line)]) == 1
    assert any(line.startswith("recover ") and "loss 0." in line and "lr " in line for line in lines)
    assert any(line.startswith("evaluate ") and "accuracy 0." in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use a CUDA context")
def test_a_terminal_shows_one_moving_line_below_the_finished_phases(here, tmp_path):
    text = in_terminal(*arguments(here, tmp_path / "out"))
    assert_without_trainer(text)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    assert finished(plain.splitlines()) == PHASES
    assert len(set(re.findall(CUT, plain))) == 1 == len(re.findall(CUT, plain))
    assert "\x1b[2K" in text  # the line that moves is erased
    assert re.search(r"load +━+ 0:00:0\d", plain) and "encoder parameters" in plain


def test_quiet_leaves_the_last_table(here, tmp_path):
    done = command(*arguments(here, tmp_path / "out", "--quiet"), shown=True)
    assert (done.code, done.err) == (0, "") and done.out.startswith("text-classification, 50%params by obs\n")
    for shown in ("model file, MB", "latency of 1 x 16 tokens, ms", "thread", "Seconds: load ", "warm-up "):
        assert shown in done.out, shown


def test_an_error_is_the_last_line_and_a_line_of_its_own(here, tmp_path):
    done = command(*arguments(here, tmp_path / "out", "--max-length", 2), shown=True)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("sensibert: error: max_length")


def test_scores_during_a_training_are_shown_and_kept(here, tmp_path):
    done = command(*arguments(here, tmp_path / "out", "--eval-steps", 5, "--json"), shown=True)
    result = done.json
    assert [each["step"] for each in result["evaluations"]] == [5, 10, 12]
    assert all(each.keys() == {"step", *result["metrics"]} for each in result["evaluations"])
    assert result["metrics"] == {name: result["evaluations"][-1][name] for name in result["metrics"]}
    told = re.findall(r"\] step (\d+): accuracy (\d\.\d{4})", done.err)
    assert told == [(str(each["step"]), f"{each['accuracy']:.4f}") for each in result["evaluations"][:-1]]
    again = command("eval", tmp_path / "out", "--validation-file", here / "dev.csv", "--json").json
    assert again["metrics"] == result["metrics"]


def test_trackers_receive_losses_scores_and_the_name_of_the_run(here, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(args.run_name)

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr("sensibert.trainer_arguments.get_available_reporting_integrations", lambda: ["wandb"])
    done = command(*arguments(here, tmp_path / "out", "--eval-steps", 6, "--report-to", "wandb"))
    assert done.code == 0 and seen[0] == "out"
    assert any("loss" in names for names in seen[1:]) and sum("eval_accuracy" in names for names in seen[1:]) == 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("--device", "gpu"), "device is gpu, want auto, cpu, cuda or cuda:0"),
        (("--device", "cuda:99"), "device is 'cuda:99', which is not there, want one of auto, cpu"),
        (("--report-to", "tensorbord"), "report_to is 'tensorbord', want one of .*did you mean 'tensorboard'"),
        (("--report-to", "none,wandb"), "report_to is 'none', want one of"),
        (("--report-to", "clearml"), "report_to is 'clearml', which is not installed; want it installed, or none"),
        (("--best",), "best is True, but eval_steps is missing; want the steps between two evaluations"),
        (("--eval-steps", 0), "eval_steps is 0, want more than 0"),
        (("--eval-steps", 2, "--best", "--save-steps", 4), "save_steps is 4, but best saves at every evaluation"),
    ],
)
def test_what_a_run_cannot_have_is_refused_before_it_begins(here, tmp_path, wrong, message):
    done = command(*arguments(here, tmp_path / "out", *wrong))
    assert done.code == 2 and len(done.err.splitlines()) == 1 and re.search(message, done.err), done.err
    assert not list(tmp_path.iterdir())


def test_evaluations_without_a_file_are_refused(here, tmp_path):
    requested = ("finetune", "--model", here / "model", "--train-file", here / "train.csv", "--output", tmp_path / "o")
    for more in (("--eval-steps", 2), ("--eval-steps", 2, "--best"), ("--eval-steps", 2, "--dry-run")):
        done = command(*requested, *more)
        assert done.code == 2 and "eval_steps is 2, but validation_file is missing" in done.err
    assert not list(tmp_path.iterdir())


def test_the_processor_can_be_chosen(here, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(
        run_training, "finetune", lambda model, train, collator, args, *_, **__: used.append(args) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        command(*arguments(here, tmp_path / "out", "--device", "cpu"))
    assert used[0].device == torch.device("cpu") and used[0].use_cpu
