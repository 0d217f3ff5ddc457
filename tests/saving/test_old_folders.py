"""Folders written by version 0.1.0 load both ways, train on, are trimmed again and saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from sensibert import export, load, load_structure, trim
from sensibert.models import layout_of
from sensibert.models.masks import masks_of
from sensibert.models.structure import is_trimmed, structure_of
from tests import fresh
from tests.helpers import tiny_batch
from tests.plans import random_plan

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**tiny_batch()).logits


def rows(count: int = 8) -> list[dict]:
    batch = tiny_batch(count) | {"labels": torch.arange(count) % 2}
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def train(model, folder) -> None:
    arguments = TrainingArguments(str(folder), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    Trainer(model, arguments, train_dataset=rows()).train()


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_trimmed_folder_loads_in_a_fresh_process(trust_remote_code, tmp_path):
    """With its own old modeling file where sensibert is missing."""
    given = {"unit": ("AutoModelForSequenceClassification", OLD / "unit", tiny_batch())}
    actual = fresh.outputs_of(given, trust_remote_code, tmp_path)["unit"]
    torch.testing.assert_close(actual, logits(AutoModelForSequenceClassification.from_pretrained(OLD / "unit")))
    entry = json.loads((OLD / "unit" / "config.json").read_text())["sensibert"]
    assert entry["sensibert_version"] == "0.1.0" and actual.isfinite().all()


def test_it_trains_on_is_trimmed_again_saved_and_reloaded(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(OLD / "unit")
    first, units = layout_of(model), structure_of(model)
    assert is_trimmed(model)
    assert all(torch.equal(kept, load_structure(OLD / "unit")[name]) for name, kept in units.items())
    before = logits(model)
    train(model, tmp_path / "run")
    assert layout_of(model).sites == first.sites and not torch.equal(logits(model), before)
    plan = random_plan(first, seed=1)
    trim(model, plan)
    assert all(torch.equal(kept, units[name][plan.keep[name]]) for name, kept in structure_of(model).items())
    model.save_pretrained(tmp_path / "again")
    export(model, tmp_path / "exported", layout="both")
    for folder in (tmp_path / "again", tmp_path / "exported"):
        again, _ = load(folder)
        assert torch.equal(logits(again), logits(model)) and type(again) is type(model)
        assert all(torch.equal(kept, structure_of(model)[name]) for name, kept in structure_of(again).items())
    torch.testing.assert_close(logits(load(tmp_path / "exported" / "dense")[0]), logits(model))


FROM_ITS_OWN_CODE = """
import sys
import sensibert, torch, transformers
from tests.helpers import tiny_batch
from tests.plans import random_plan
from sensibert.models.structure import is_trimmed, structure_of
folder, new = sys.argv[1:]
auto = transformers.AutoModelForSequenceClassification
code = transformers.dynamic_module_utils.get_class_from_dynamic_module
kind = code("modeling_sensibert.SensibertBertForSequenceClassification", folder)
model = kind.from_pretrained(folder)
assert type(model).__module__.startswith("transformers_modules.") and is_trimmed(model)
units = structure_of(model)
plan = random_plan(sensibert.layout_of(model), seed=1)
sensibert.trim(model, plan)
assert type(model).__module__ == type(model.bert).__module__ == "sensibert.models.modeling_sensibert"
assert all(torch.equal(kept, units[name][plan.keep[name]]) for name, kept in structure_of(model).items())
model.save_pretrained(new)
with torch.no_grad():
    print(torch.equal(auto.from_pretrained(new)(**tiny_batch()).logits, model.eval()(**tiny_batch()).logits))
"""


def test_a_model_of_its_old_code_is_trimmed_into_the_class_of_today(tmp_path):
    shutil.copytree(OLD / "unit", tmp_path / "unit")
    assert fresh.run(FROM_ITS_OWN_CODE, tmp_path / "unit", tmp_path / "new", cwd=tmp_path) == "True"


def test_a_folder_masked_by_a_grid_loads_with_its_masks(tmp_path):
    model, tokenizer = load(OLD / "element")
    masks = masks_of(model)
    assert str(masks.grid) == "element" and tokenizer is not None and not is_trimmed(model)
    expected = load_structure(OLD / "element")
    assert masks.keep.keys() == expected.keep.keys()
    for name, keep in masks.keep.items():
        weight = model.get_parameter(f"bert.{name}")
        assert torch.equal(keep, expected.keep[name]) and (weight[~keep] == 0).all() and not keep.all()
    stock = AutoModelForSequenceClassification.from_pretrained(OLD / "element")
    torch.testing.assert_close(logits(model), logits(stock))
    again, _ = load(export(model, tmp_path / "again"))
    assert all(torch.equal(masks_of(again).keep[name], keep) for name, keep in masks.keep.items())
