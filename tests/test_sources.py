"""How what the options name is read."""

import pytest
import torch

from sensibert import sources
from sensibert.options import Options
from sensibert.tasks import Examples
from tests.tasks.tiny import word_piece


@pytest.mark.parametrize("device, width", [("cpu", 6), ("cuda", 8)])
def test_batches_are_padded_on_to_a_multiple_on_a_gpu_alone(monkeypatch, device, width):
    monkeypatch.setattr(sources, "best_device", lambda: torch.device(device))
    texts = Examples({"text": ["a film was good", "a film was good but it was long"], "label": [0, 1]}, "train.csv")
    data = sources.encode(Options("", ""), word_piece(), texts, None)
    assert data.collator([data.train[0]])["input_ids"].shape == (1, width)
