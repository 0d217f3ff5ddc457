"""Broken runs resume to the weights of unbroken ones, and only with the same settings and inputs."""

import contextlib
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from sensibert.callback import TrimCallback
from sensibert.core.errors import SensibertError, Terminated
from sensibert.recipe import finetune_and_trim
from tests import runs
from tests.test_recipe import options

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("resume"))


def same_weights(a, b) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Killed(BaseException):
    """Not an Exception: nothing on the way may swallow it."""


def short(kind="oneshot", **changed) -> dict:
    """Two epochs of five steps, cut after step 3 (cubic: 3 and 5), a checkpoint at every second step."""
    shape, more = {"schedule": "cubic" if kind == "cubic" else "oneshot", "milestones": 2}, {"teacher": "snapshot"}
    if kind == "frozen":  # embeddings are frozen after so deep a cut; in bf16 batches are padded to multiples
        more = {"budget": "30%params", "precision": "bf16"}
    return {"batch_size": 32, "save_steps": 2, **shape, **more, **changed}


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """kind of run -> folder of the unbroken run, made on first use."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / kind
            finetune_and_trim(options(here, made[kind], **short(kind)))
        return made[kind]

    return run


@pytest.mark.parametrize("step", [3, 6, 9])  # from a dense checkpoint; between two cuts, mid-epoch; near the end
@pytest.mark.parametrize("kind", ["oneshot", "cubic", "frozen"])
def test_a_broken_run_resumes_to_the_same_weights(here, tmp_path, whole, step, kind, monkeypatch):
    step_end = TrimCallback.on_step_end

    def dies(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(TrimCallback, "on_step_end", dies)
    with pytest.raises(Killed):
        finetune_and_trim(options(here, tmp_path / "broken", **short(kind)))
    monkeypatch.undo()
    assert not (tmp_path / "broken").exists()
    with pytest.raises(SensibertError, match="unfinished run, want --resume or --overwrite"):
        finetune_and_trim(options(here, tmp_path / "broken", **short(kind)))
    result = finetune_and_trim(options(here, tmp_path / "broken", resume=True, **short(kind)))
    assert result["metrics_at_cut"] is not None
    assert same_weights(whole(kind), tmp_path / "broken")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use a CUDA context")
def test_runs_killed_by_the_system_resume_to_the_same_weights(here, tmp_path, whole):
    """Three times SIGKILL, each a little later in what is left of the run."""
    requested, partial = short(save_steps=1), tmp_path / "killed.partial"
    for number in (1, 4, 7):
        victim = os.fork()
        if victim == 0:  # forked: it need not import everything once more
            with contextlib.suppress(BaseException):
                finetune_and_trim(options(here, tmp_path / "killed", resume=True, **requested))
            os._exit(1)
        deadline = time.monotonic() + 120
        while not (partial / f"checkpoint-{number}").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))  # somewhere: while a checkpoint is written, or in a step
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        assert os.WIFSIGNALED(status) and not (tmp_path / "killed").exists()
    result = finetune_and_trim(options(here, tmp_path / "killed", resume=True, **requested))
    assert result["steps"] == 10
    assert same_weights(whole("oneshot"), tmp_path / "killed")


def test_runs_can_branch_from_the_last_step_before_the_cut(here, tmp_path):
    requested = {"save_before_cut": True, "keep_checkpoints": True, "save_steps": 100}
    finetune_and_trim(options(here, tmp_path / "first", max_steps=9, **requested))
    (saved,) = (tmp_path / "first.partial").glob("checkpoint-2")
    other = {"budget": "30%params", "method": "magnitude", "max_steps": 9}
    finetune_and_trim(options(here, tmp_path / "alone", **other))
    (tmp_path / "branch.partial").mkdir()
    shutil.copytree(saved, tmp_path / "branch.partial" / saved.name)
    finetune_and_trim(options(here, tmp_path / "branch", resume=True, **other))
    assert same_weights(tmp_path / "alone", tmp_path / "branch")


def test_the_checkpoint_before_the_cut_outlives_later_ones(here, tmp_path):
    finetune_and_trim(options(here, tmp_path / "out", **short(epochs=3, save_before_cut=True, keep_checkpoints=True)))
    found = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "out.partial").glob("checkpoint-*")}
    assert {4, 14} <= found  # the cut comes after step 5 of 15


@pytest.mark.parametrize(
    "requested, message",
    [
        ({"seed": 5}, "has seed 0, and this run 5: want the same"),
        ({"batch_size": 8}, "has batch_size 16, and this run 8"),
        ({"gradient_accumulation": 2}, "has gradient_accumulation_steps 1, and this run 2"),
        ({"learning_rate": 1e-3}, "has learning_rate 0.003, and this run 0.001"),
        ({"weight_decay": 0.5}, "has weight_decay 0.01, and this run 0.5"),
        ({"precision": "bf16"}, "has bf16 False, and this run True"),
        ({"max_steps": 9}, r"has cuts after step 2 \(100 %\), and this run after step 3"),
        ({"budget": "30%params"}, "has budget 50%params of the encoder, and this run 30%params of the encoder"),
        ({"method": "fisher"}, "has method obs, and this run fisher"),
        ({"allocation": "uniform"}, "has allocation global, and this run uniform"),
        ({"compensate": False}, "has compensate True, and this run False"),
        ({"trim_start": 0.9}, r"has cuts after step 2 \(100 %\), and this run none"),
        ({"schedule": "cubic", "milestones": 1}, None),
        ({"schedule": "cubic", "milestones": 2}, r"this run after step 2 \(50 %\), after step 3 \(100 %\)"),
        ({"recovery": "continue"}, "has recovery rewarm, and this run continue"),
        ({"freeze_embeddings": False}, "has freeze_embeddings True, and this run False"),
    ],
    ids=lambda value: " ".join(map(str, next(iter(value.items()))))[:40] if isinstance(value, dict) else "",
)
def test_a_run_resumes_only_with_the_settings_of_its_checkpoint(begun, tmp_path, requested, message):
    here, run = begun
    shutil.copytree(run, tmp_path / "out.partial")
    shutil.rmtree(tmp_path / "out.partial" / "checkpoint-6")
    usual = {"save_steps": 3, "keep_checkpoints": True, "max_steps": 6}
    if message is None:  # in other words the same
        assert finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual | requested))["steps"] == 6
        return
    with pytest.raises(SensibertError, match=message):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual | requested))
    assert {path.name for path in (tmp_path / "out.partial").glob("checkpoint-*")} == {"checkpoint-3"}


def _rows(change):
    """A change of the training file, as a test parameter."""

    def changed(here, folder):
        header, *rows = (here / "train.csv").read_text().splitlines()
        (folder / "train.csv").write_text("\n".join([header, *change(rows)]) + "\n")
        return {"train_file": str(folder / "train.csv")}

    return changed


def _model(here, folder):
    return {"model": runs.model_folder(folder / "other", seed=1)}


def _teacher(here, folder):
    names = {"num_labels": 2, "id2label": {0: "0", 1: "1"}}
    return {"teacher": runs.model_folder(folder / "teacher", head="SequenceClassification", **names)}


@pytest.mark.parametrize(
    "change, message",
    [
        (_rows(lambda rows: [*rows, rows[0]]), "has train_file 160 rows with digest .*, and this run 161 rows"),
        (_rows(lambda rows: rows[::-1]), "has train_file 160 rows with digest .*, and this run 160 rows"),
        (_rows(lambda rows: [row.replace("great", "good") for row in rows]), "has train_file 160 rows with digest"),
        (_rows(lambda rows: [f"{row[:-1]}{'ny'[int(row[-1])]}" for row in rows]), "labels 0, 1, and this run n, y"),
        (lambda here, folder: {"max_length": 5}, "has max_length 128, and this run 5"),
        (lambda here, folder: {"validation_file": str(here / "train.csv")}, "has validation_file 40 rows"),
        (lambda here, folder: {"validation_file": None}, "validation_file 40 rows with digest .*, and this run none"),
        (_model, "has model weights with digest .*, and this run weights with digest"),
        (_teacher, "has teacher None, and this run weights with digest"),
        (lambda here, folder: {"teacher": "snapshot"}, "has teacher None, and this run snapshot"),
    ],
    ids=["more rows", "other order", "other texts", "names", "length", "dev", "no dev", "model", "teacher", "snapshot"],
)
def test_a_run_resumes_only_from_what_its_checkpoint_was_made_from(begun, tmp_path, change, message):
    here, run = begun
    shutil.copytree(run, tmp_path / "out.partial")
    usual = {"save_steps": 3, "keep_checkpoints": True, "max_steps": 6, "resume": True}
    if "labels" in message:
        dev = (here / "dev.csv").read_text().replace(",0", ",n").replace(",1", ",y")
        (tmp_path / "dev.csv").write_text(dev)
        usual["validation_file"] = str(tmp_path / "dev.csv")
    before = runs.tree(tmp_path / "out.partial")
    with pytest.raises(SensibertError, match=message):
        finetune_and_trim(options(here, tmp_path / "out", **usual | change(here, tmp_path)))
    assert runs.tree(tmp_path / "out.partial") == before
    assert not (tmp_path / "out").exists()


def test_flops_are_counted_at_the_length_of_the_checkpoint(here, tmp_path):
    usual = {"save_steps": 3, "keep_checkpoints": True, "overwrite": True, "max_steps": 6, "budget": "50%flops"}
    finetune_and_trim(options(here, tmp_path / "out", **usual))
    message = "has budget 50%flops of the encoder at 128 tokens, and this run 50%flops of the encoder at 8 tokens"
    with pytest.raises(SensibertError, match=message):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, flops_length=8, **usual))


def test_a_cubic_between_its_cuts_is_not_taken_for_one_that_has_arrived(here, tmp_path):
    usual = {"save_steps": 4, "keep_checkpoints": True, "overwrite": True, "max_steps": 8}
    finetune_and_trim(options(here, tmp_path / "out", schedule="cubic", milestones=4, **usual))
    shutil.rmtree(tmp_path / "out.partial" / "checkpoint-8")
    with pytest.raises(SensibertError, match=r"3 \(25 %\), after step 4 \(75 %\), and this run after step 3 \(100 %\)"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual))


def test_a_baseline_checkpoint_from_after_the_cut_is_not_taken_for_a_trimmed_one(here, tmp_path):
    usual = {"save_steps": 3, "keep_checkpoints": True, "overwrite": True, "max_steps": 6}
    finetune_and_trim(options(here, tmp_path / "out", method="baseline", **usual))
    with pytest.raises(SensibertError, match=r"has cuts none, and this run after step 2 \(100 %\)"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, **usual))


@pytest.fixture(scope="module")
def begun(here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    finetune_and_trim(options(here, folder / "out", save_steps=3, keep_checkpoints=True, max_steps=6))
    return here, folder / "out.partial"


def finished_again(begun, folder) -> dict:
    """A copy of the run of `begun` with its checkpoints, in folder/out: its result."""
    for name in ("out", "out.partial"):
        shutil.copytree(begun[1].with_name(name), folder / name)
    return json.loads((folder / "out" / "result.json").read_text())


def test_a_damaged_checkpoint_is_skipped_and_if_all_are_it_is_said(here, tmp_path, begun):
    requested = {"save_steps": 3, "keep_checkpoints": True, "max_steps": 6}
    first = finished_again(begun, tmp_path)
    newest, older = (tmp_path / "out.partial" / f"checkpoint-{n}" for n in (6, 3))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    os.truncate(newest / "model.safetensors", 100)
    again = finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True, **requested))
    assert older.exists() and again["metrics"] == first["metrics"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    for checkpoint in (tmp_path / "out.partial").glob("checkpoint-*"):
        os.truncate(checkpoint / "optimizer.pt", 10)
    with pytest.raises(SensibertError, match="truncated checkpoint, optimizer.pt has 10 bytes, want"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True, **requested))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"])
def test_a_checkpoint_with_a_file_of_zeros_is_passed_over(here, tmp_path, begun, name):
    """That is what a power cut can leave."""
    requested = {"save_steps": 3, "keep_checkpoints": True, "max_steps": 6}
    first = finished_again(begun, tmp_path)
    file = tmp_path / "out.partial" / "checkpoint-6" / name
    file.write_bytes(bytes(file.stat().st_size))
    again = finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True, **requested))
    assert again["metrics"] == first["metrics"] and any(file.read_bytes())


def test_an_unfinished_run_stays_until_the_inputs_have_been_read(here, tmp_path, begun):
    shutil.copytree(begun[1], tmp_path / "out.partial")
    before = runs.tree(tmp_path / "out.partial")
    for wrong in ({"model": str(tmp_path / "nowhere")}, {"train_file": str(tmp_path / "no.csv")}, {"max_length": 2}):
        with pytest.raises(SensibertError):
            finetune_and_trim(options(here, tmp_path / "out", overwrite=True, **wrong))
        assert runs.tree(tmp_path / "out.partial") == before


def test_a_run_resumes_only_with_the_config_of_its_model(here, tmp_path, begun):
    shutil.copytree(begun[1], tmp_path / "out.partial")
    shutil.copytree(here / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_name_or_path": "moved"}))
    usual = {"save_steps": 3, "keep_checkpoints": True, "max_steps": 6, "resume": True}
    usual["model"] = str(tmp_path / "model")
    finetune_and_trim(options(here, tmp_path / "out", **usual))  # the same in another place
    for name, value in {"hidden_act": "relu", "layer_norm_eps": 1.0, "num_attention_heads": 2}.items():
        file.write_text(json.dumps(config | {name: value}))
        with pytest.raises(SensibertError, match=f"has config.{name} .*, and this run {value}"):
            finetune_and_trim(options(here, tmp_path / "out", overwrite=True, **usual))


def test_if_the_optimizer_of_every_checkpoint_is_damaged_it_is_named(here, tmp_path, begun):
    requested = {"save_steps": 3, "keep_checkpoints": True, "max_steps": 6}
    finished_again(begun, tmp_path)
    for checkpoint in (tmp_path / "out.partial").glob("checkpoint-*"):
        file = checkpoint / "optimizer.pt"
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(SensibertError, match="checkpoint-6: damaged checkpoint, optimizer.pt has other content"):
        finetune_and_trim(options(here, tmp_path / "out", resume=True, overwrite=True, **requested))


def test_distillation_changes_the_result_whoever_teaches(here, tmp_path, whole):
    """The snapshot cannot change what is cut: it is made at the cut. A teacher from outside can."""
    plain = finetune_and_trim(options(here, tmp_path / "plain", **short(teacher=None, save_steps=100)))
    taught = json.loads((whole("oneshot") / "result.json").read_text())
    assert plain["metrics_at_cut"] == taught["metrics_at_cut"]
    assert plain["encoder_params_after"] == taught["encoder_params_after"]
    assert not same_weights(tmp_path / "plain", whole("oneshot"))
    outside = short(teacher=str(tmp_path / "plain"), distil=0.9, save_steps=100)
    finetune_and_trim(options(here, tmp_path / "outside", **outside))
    assert not same_weights(tmp_path / "plain", tmp_path / "outside")


@pytest.mark.parametrize("step", [1, 3, 7])  # before the cut, at it, after it
def test_a_run_that_is_asked_to_end_saves_a_checkpoint_first(here, tmp_path, whole, monkeypatch, step):
    done = TrimCallback.on_step_begin

    def asked(self, args, state, control, **more):
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return done(self, args, state, control, **more)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TrimCallback, "on_step_begin", asked)
    with pytest.raises(Terminated, match="^stopped by SIGTERM; a checkpoint is saved, and --resume continues from it$"):
        finetune_and_trim(options(here, tmp_path / "out", **short()))
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / f"checkpoint-{step}").is_dir()
    monkeypatch.undo()
    finetune_and_trim(options(here, tmp_path / "out", **short(), resume=True))
    assert same_weights(tmp_path / "out", whole("oneshot"))


def test_a_run_that_is_killed_while_its_checkpoints_are_deleted_is_finished(here, tmp_path, monkeypatch, caplog):
    output, real = tmp_path / "out", shutil.rmtree

    def killed(path, *args, **more):
        if "checkpoint-" in str(path) and output.exists():
            (path / "model.safetensors").unlink()  # half deleted
            raise Killed
        return real(path, *args, **more)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        finetune_and_trim(options(here, output, **short()))
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "checkpoint-10").is_dir()
    result = finetune_and_trim(options(here, output, **short(), resume=True))
    assert "is of this run, which is finished" in caplog.text and not (tmp_path / "out.partial").exists()
    assert result == json.loads((output / "result.json").read_text())
