"""The Python of README.md runs as it stands, on a model small enough for a test; its list of models is the real one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from sensibert.models import families

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def names(tmp_path):
    """What the examples take as given: model, args, data, batches, output."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    ids = torch.randint(5, 64, (24, 8))
    data = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids)]
    batches = [{"input_ids": ids[i : i + 4], "labels": torch.arange(4) % 3} for i in range(0, 24, 4)]
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, max_steps=9, disable_tqdm=True, report_to="none")
    given = {"args": args, "data": data, "batches": batches, "output": str(tmp_path / "small")}
    return given | {"model": BertForSequenceClassification(config)}


def encoder_params(model):
    return sum(p.numel() for p in model.bert.encoder.parameters())


def test_the_callback_trims_under_a_plain_trainer(names):
    before = encoder_params(names["model"])
    exec(BLOCKS[0], names)
    assert encoder_params(names["model"]) <= before / 2


def test_the_verbs_trim_and_the_folder_reloads(names):
    before, dense = encoder_params(names["model"]), names["model"]
    exec(BLOCKS[1], names)
    assert encoder_params(dense) <= before / 2
    exec(BLOCKS[2], names)
    ids = torch.randint(5, 64, (2, 8))
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(ids).logits, dense.eval()(ids).logits)


def test_the_list_of_models_is_complete():
    listed = re.search(r"## Models\n(.*?), with any task head", README, flags=re.DOTALL)[1]
    assert sorted(re.split(r",\s+", listed)) == sorted(families())
