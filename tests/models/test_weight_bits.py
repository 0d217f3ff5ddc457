"""Weights in 16 bits: rounded in place, or saved in half the bytes."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification as Auto

from sensibert import SensibertError, export, load
from sensibert.models.weight_bits import DTYPES, round_weights, with_weights
from tests import fresh
from tests.helpers import tiny_batch, tiny_model
from tests.saving.test_folder import output, tiny_tokenizer, trimmed

SIXTEEN = ("fp16", "bf16")
COMPUTED = """
import torch
from transformers import AutoModelForSequenceClassification as Auto
{first}
model = Auto.from_pretrained({folder!r}, dtype=torch.float32, trust_remote_code={trusted})
assert model.config.dtype == torch.float32 and model.dtype == torch.float32
with torch.no_grad():
    torch.save(model.eval()(**torch.load({batch!r}))[0], {logits!r})
"""


@pytest.mark.parametrize("weights", SIXTEEN)
def test_a_file_in_16_bits_has_half_the_bytes_and_the_logits_of_the_rounded_model(weights, tmp_path):
    model = trimmed()
    sizes = [
        (export(model, tmp_path / str(bits), weights=bits) / "model.safetensors").stat().st_size
        for bits in (None, weights)
    ]
    assert 0.5 * sizes[0] <= sizes[1] < 0.6 * sizes[0]
    assert model.dtype == torch.float32  # the one in memory is unchanged
    folder = tmp_path / weights
    name = str(DTYPES[weights]).removeprefix("torch.")
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    assert f"| data type of the weights | {name} |" in (folder / "README.md").read_text()
    assert Auto.from_pretrained(folder).dtype == DTYPES[weights]
    before, again = output(model), Auto.from_pretrained(folder, dtype=torch.float32)
    round_weights(model, weights)
    assert again.dtype == torch.float32 and torch.equal(output(again), output(model))
    eps = torch.finfo(DTYPES[weights]).eps
    assert (output(model) - before).abs().max() <= 8 * eps * before.abs().max()
    assert torch.equal(output(load(folder)[0].float()), output(model))


@pytest.mark.parametrize(
    "first, trusted", [("import sensibert", False), (fresh.WITHOUT, True)], ids=["sensibert", "trusted"]
)
def test_another_process_computes_in_32_bits_with_it(first, trusted, tmp_path):
    model = trimmed()
    folder = export(model, tmp_path / "half", tiny_tokenizer(), weights="fp16")
    torch.save(tiny_batch(), tmp_path / "batch.pt")
    places = {"batch": str(tmp_path / "batch.pt"), "logits": str(tmp_path / "logits.pt")}
    fresh.run(COMPUTED.format(first=first, trusted=trusted, folder=str(folder), **places), cwd=tmp_path)
    round_weights(model, "fp16")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), output(model))


def test_the_stock_layout_is_in_16_bits_too(tmp_path):
    model = trimmed()
    folder = export(model, tmp_path / "stock", layout="dense", weights="bf16")
    again = Auto.from_pretrained(folder, dtype=torch.float32)
    assert type(again).__name__ == "BertForSequenceClassification" and again.config.dtype == torch.float32
    round_weights(model, "bf16")
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-6)


def test_weights_that_fp16_cannot_hold_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.weight[0, 0] = 7e4
    before = model.classifier.weight.clone()
    for call in (round_weights, with_weights, lambda model, bits: export(model, tmp_path / "out", weights=bits)):
        with pytest.raises(SensibertError, match=r"classifier.weight has values beyond 65,504, the largest of fp16"):
            call(model, "fp16")
    assert torch.equal(model.classifier.weight, before) and not (tmp_path / "out").exists()
    assert with_weights(model, "bf16").dtype == torch.bfloat16
    with pytest.raises(SensibertError, match="export: weights is 'int4', want"):
        export(model, tmp_path / "out", weights="int4")
