"""Tiny models of sentence-transformers (`from tests.sentence_models import ...`); skips where it is not installed."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling

from sensibert import Budget, allocate, analyze, trim
from tests.runs import model_folder, sentences

CLASSES = {"SentenceTransformer": SentenceTransformer, "CrossEncoder": CrossEncoder, "SparseEncoder": SparseEncoder}
HEADS = {"SentenceTransformer": "", "CrossEncoder": "SequenceClassification", "SparseEncoder": "MaskedLM"}
TASKS = {"": "feature-extraction", "SequenceClassification": "sequence-classification", "MaskedLM": "fill-mask"}
TEXTS = [text for text, _ in sentences(6, seed=3)]
PROMPTS = {"query": "who wrote "}


def sentence_model(name: str, here: Path, dense: bool = False):
    """A SentenceTransformer (CLS pooling, normalized, with prompts), CrossEncoder or SparseEncoder (SPLADE)."""
    torch.manual_seed(0)
    config = {"num_labels": 1} if name == "CrossEncoder" else {}
    stock = model_folder(here / f"stock-{name}", head=HEADS[name], **config)
    first = Transformer(stock, transformer_task=TASKS[HEADS[name]])
    modules = [first]
    if name == "SentenceTransformer":
        modules += [Pooling(32, "cls"), *([Dense(32, 8)] if dense else []), Normalize()]
    if name == "SparseEncoder":
        modules.append(SpladePooling())
    model = CLASSES[name](modules=modules, device="cpu", prompts=PROMPTS)
    model.max_seq_length = 7
    return model.eval()


def sentence_folder(name: str, here: Path, dense: bool = False) -> str:
    sentence_model(name, here, dense).save_pretrained(str(here / name), create_model_card=False)
    return str(here / name)


def outputs(model) -> torch.Tensor:
    """What users get for TEXTS, with the prompt of queries where there are prompts."""
    if isinstance(model, CrossEncoder):
        return model.predict([(TEXTS[0], text) for text in TEXTS], convert_to_tensor=True).clone()
    found = model.encode(TEXTS, prompt_name="query", convert_to_tensor=True)
    return (found.to_dense() if found.is_sparse else found).clone()


def plan_of(model, budget: str = "50%params"):
    """A plan for the transformers model inside."""
    texts = [(TEXTS[0], text) for text in TEXTS] if isinstance(model, CrossEncoder) else TEXTS
    batch = {k: v for k, v in model.preprocess(texts).items() if isinstance(v, torch.Tensor)}
    return allocate(analyze(model.transformers_model, [batch], "layer-obs"), Budget.parse(budget))


def trimmed(name: str, here: Path, dense: bool = False):
    model = sentence_model(name, here, dense)
    trim(model.transformers_model, plan_of(model))
    return model
