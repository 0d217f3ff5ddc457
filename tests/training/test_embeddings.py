import numpy as np
import pytest
import torch

from sensibert.data.batching import Collator
from sensibert.data.encode import Features
from sensibert.models.embedding import EmbeddingModel
from sensibert.models.pooling import Pooling
from sensibert.training import embeddings
from sensibert.training.embeddings import saved_embeddings
from tests.helpers import tiny_model


@pytest.fixture
def texts():
    lengths = np.array([3, 9, 4, 7, 5])
    return Features({"input_ids": np.arange(5, 5 + lengths.sum())}, {}, lengths)


def test_they_are_computed_part_by_part_and_read_again(texts, tmp_path, monkeypatch):
    model = EmbeddingModel(tiny_model(head=""), Pooling(normalize=True))
    whole = saved_embeddings(tmp_path / "a.npy", model, texts, Collator(0))
    one = model(input_ids=torch.tensor([texts[2]["input_ids"]]))["logits"][0]
    assert whole.shape == (5, 32) and np.allclose(whole[2], one.detach().numpy(), atol=1e-6)
    assert not isinstance(whole, np.memmap)
    monkeypatch.setattr(embeddings, "CHUNK", 2)
    monkeypatch.setattr(embeddings, "IN_MEMORY", 0)
    parts = saved_embeddings(tmp_path / "b.npy", model, texts, Collator(0))
    assert isinstance(parts, np.memmap) and np.allclose(parts, whole, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "b.npy", "a.npy.sha256", "b.npy.sha256"}
    monkeypatch.setattr(embeddings, "predict", None)  # nothing is computed again
    assert np.array_equal(saved_embeddings(tmp_path / "a.npy", model, texts, Collator(0)), whole)


def test_an_interrupted_file_is_not_taken_for_a_complete_one(texts, tmp_path, monkeypatch):
    model = EmbeddingModel(tiny_model(head=""), Pooling())
    monkeypatch.setattr(embeddings, "CHUNK", 2)
    real, calls = embeddings.predict, []

    def predict(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(embeddings, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        saved_embeddings(tmp_path / "a.npy", model, texts, Collator(0))
    assert not (tmp_path / "a.npy").exists()
    assert len(saved_embeddings(tmp_path / "a.npy", model, texts, Collator(0))) == 5 and len(calls) == 5


def test_a_damaged_file_is_made_again(texts, tmp_path, caplog):
    model, file = EmbeddingModel(tiny_model(head=""), Pooling()), tmp_path / "a.npy"
    whole = np.array(saved_embeddings(file, model, texts, Collator(0)))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert np.array_equal(saved_embeddings(file, model, texts, Collator(0)), whole)
    assert "a.npy is damaged; it is made again" in caplog.text
