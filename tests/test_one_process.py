"""Gradient checkpointing, and torchrun with one process: the same weights as without."""

import json

import pytest

from tests import fresh

TRAIN = """
import json, os, sys
from pathlib import Path
from transformers import Trainer, TrainingArguments
from sensibert import SensibertError, TrimCallback, TrimTrainer
from sensibert.models.modules import weights_digest
from tests.helpers import tiny_model
from tests.training.test_trainer import Collator, Rows

found, place = {}, Path(sys.argv[1])

def train(name, kind=TrimTrainer, **changed):
    usual = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "seed": 0}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "log_level": "error"}
    args = TrainingArguments(str(place), **usual, **quiet, **changed)
    model = tiny_model()
    trainer = kind(model, args, train_dataset=Rows(), data_collator=Collator(0), callbacks=[TrimCallback("50%params")])
    try:
        trainer.train()
        found[name] = type(trainer.model_wrapped).__name__, weights_digest(model)
    except SensibertError as error:
        found[name] = trainer.state.global_step, str(error)

train("plain")
train("plain Trainer", Trainer)
train("checkpointing", gradient_checkpointing=True)
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import torch.distributed
torch.distributed.init_process_group("gloo", init_method=f"file://{place}.store", rank=0, world_size=1)
train("ddp", ddp_backend="gloo")
train("ddp, plain Trainer", Trainer, ddp_backend="gloo")
train("both", ddp_backend="gloo", gradient_checkpointing=True)
train("both, told to", ddp_backend="gloo", gradient_checkpointing=True, ddp_find_unused_parameters=True)
print(json.dumps(found))
os._exit(0)  # gloo may wait
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("one") / "run"
    return json.loads(fresh.run(TRAIN, place, cwd=place.parent))


def test_gradient_checkpointing_changes_no_weight(found):
    assert found["checkpointing"] == found["plain"] and found["plain"][0].startswith("SensibertBert")


SAME = {"ddp": "plain", "ddp, plain Trainer": "plain Trainer", "both": "plain", "both, told to": "plain"}


@pytest.mark.parametrize("name, same", SAME.items())
def test_one_process_under_ddp_trains_the_same_weights(found, name, same):
    assert found[name] == ["DistributedDataParallel", found[same][1]]
