"""Trimming in several processes, over gloo: the same plan as in one process, the same weights in every process."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transformers.training_args import ParallelMode

from sensibert import SensibertError, TrimConfig
from sensibert.models.modules import weights_digest
from sensibert.start_checks import check_parallel
from sensibert.training.checkpoints import check_checkpoint
from sensibert.training.manifest import MANIFEST
from tests.helpers import tiny_model
from tests.training.distributed import Training, run, sentences, several
from tests.training.distributed import resumed as resume

CASES = ("adamw", "sgd", "uneven", "accumulated", "checkpointing", "blocks", "bf16")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(here):
    (here / "alone").mkdir()
    return json.loads(json.dumps(several(Training(here / "alone"))))


@pytest.fixture(scope="module")
def both(here, alone):  # whose checkpoint it resumes
    return run("several", here / "both", 2)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_decide_what_one_would_and_end_with_the_same_bits(alone, both, case):
    first, second = (found[case] for found in both)
    assert first == second and first["wrapper"] == "DistributedDataParallel" and first["step"] == 6
    if case != "bf16":  # a sum in another order may round to another number
        assert first["kept"] == alone[case]["kept"]


def test_weights_are_those_of_one_process_but_for_rounding_and_the_saved_folder_reloads(alone, both, here):
    ours, theirs = (load_file(here / name / "small/model.safetensors") for name in ("both", "alone"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)  # AdamW enlarges gradients near 0
    again = AutoModelForSequenceClassification.from_pretrained(here / "both/small")
    assert weights_digest(again) == both[0]["sgd"]["digest"]


def test_gradient_checkpointing_changes_no_weight(both):
    assert both[0]["checkpointing"]["digest"] == both[0]["adamw"]["digest"]


def test_only_the_first_process_tells_of_the_cut(both):
    assert both[0]["errors"].count("cut at step 2 of 6") > len(CASES) and "cut at" not in both[1]["errors"]


def test_four_processes(alone, here):
    found = run("one", here / "four", 4)
    assert all(rank["digest"] == found[0]["digest"] and rank["kept"] == alone["adamw"]["kept"] for rank in found)


def test_checkpoints_are_complete_and_resume_to_the_same_bits(both, here):
    for rank in both:
        assert rank["from 1"]["digest"] == rank["from 4"]["digest"] == both[0]["saved"]["digest"]
    for step in (1, 2, 4):
        assert check_checkpoint(here / f"both/run/checkpoint-{step}")
    listed = json.loads((here / "both/run/checkpoint-4" / MANIFEST).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= listed.keys()


def test_one_process_resumes_the_checkpoints_of_two_and_two_those_of_one(both, here):
    saved = both[0]["saved"]
    for found in (resume(Training(here / "both")), both[0]["from one"]):
        assert found["step"] == 6 and found["kept"] == saved["kept"]
    assert both[0]["from one"] == both[1]["from one"]


def test_a_resume_with_another_number_of_rows_a_step_is_refused(both, here):
    found = resume(Training(here / "both"), per_device_train_batch_size=4)
    message = "has 8 rows a step, with processes 2, and this run 4, with processes 1: want 8, 8 in each process"
    assert found["step"] == 4 and message in found["error"]
    assert "and this run 16, with processes 2: want 8, 4 in each process" in both[0]["more rows"]["error"]


def test_processes_with_other_weights_are_named_before_the_cut(both):
    message = "TrimCallback: at the cut at step 2, the weights of process 1 are not those of process 0; want"
    for rank in both:
        assert rank["other weights"]["step"] == 2 and rank["other weights"]["error"].startswith(message)


def test_an_error_of_the_first_process_reaches_the_others(both):
    assert [rank["no plan"]["error"] for rank in both] == ["no plan today", "process 0: no plan today"]


def test_the_state_of_an_optimizer_loads_on_a_cpu_with_a_number():
    """As transformers 5.14 asks for it in several processes."""
    file = io.BytesIO()
    torch.save({"step": torch.ones(2)}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, map_location=torch.device("cpu:0"))["step"], torch.ones(2))


@pytest.mark.parametrize("case", ["dying", "stopping"])
def test_a_lost_process_ends_the_others(case, here):
    (found,) = run(case, here / case, 2, ending=1)
    assert found["step"] == 2 and "process 0 lost another one, which ended or did not answer" in found["error"]


def test_trainers_of_sentence_transformers(here):
    pytest.importorskip("sentence_transformers")
    (here / "trainers").mkdir()
    (here / "trainer").mkdir()
    alone, (first, second) = sentences(Training(here / "trainer")), run("sentences", here / "trainers", 2)
    assert {**first, "errors": ""} == {**second, "errors": ""}
    for kind in ("scores", "pairs", "cached", "splade", "reranker", "lists"):
        assert first[kind]["step"] == 6 and first[kind]["wrapper"] == "DistributedDataParallel", kind
    for kind in ("scores", "reranker"):  # the other losses compare the rows of a process
        assert first[kind]["kept"] == {name: list(kept) for name, kept in alone[kind]["kept"].items()}
    assert "weights of the loss, outside of the SentenceTransformer ((2, 96), (2,))" in first["classes"]["error"]
    assert "a loss that runs the model as its attribute `model`" in first["texts"]["error"]
    assert "ddp_find_unused_parameters is None and the model is a CrossEncoder" in first["unused"]["error"]
    assert all(first[kind]["step"] == 0 for kind in ("classes", "texts", "unused"))


USUAL = {"fsdp": None, "deepspeed": None, "n_gpu": 1, "world_size": 2, "parallel_mode": ParallelMode.DISTRIBUTED}
SGD = torch.optim.SGD([torch.zeros(1)])
USUAL |= {"torch_compile": False, "parallelism_config": None, "save_on_each_node": False}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"fsdp": "full_shard"}, "training uses fsdp, which divides every tensor"),
        ({"deepspeed": "ds.json"}, "training uses deepspeed, which divides every tensor"),
        ({"n_gpu": 2, "world_size": 1}, "n_gpu is 2: DataParallel in one process is not supported"),
        ({"parallel_mode": ParallelMode.TPU}, "world_size is 2 without torch.distributed"),
        ({"torch_compile": True}, "torch_compile is set and world_size is 2, want it unset"),
        ({"save_on_each_node": True}, "save_on_each_node is set and world_size is 2"),
    ],
)
def test_other_parallel_training_is_refused_in_words(changed, message, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SensibertError, match=message):
        check_parallel(SimpleNamespace(**USUAL | changed), tiny_model(), TrimConfig(), SGD)


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SensibertError, match="2 processes were started, and each would train alone"):
        check_parallel(SimpleNamespace(**USUAL | {"world_size": 1}), tiny_model(), TrimConfig(), SGD)


def test_costs_that_are_measured_want_one_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SensibertError, match="costs of budget 8ms are measured and world_size is 2; want one process"):
        check_parallel(SimpleNamespace(**USUAL), tiny_model(), TrimConfig("8ms"), SGD)
    check_parallel(SimpleNamespace(**USUAL), tiny_model(), TrimConfig(), SGD)
