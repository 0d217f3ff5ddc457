"""What several test files share (`from tests.helpers import ...`): the error bound, dtype names, tiny models."""

import pytest
import torch
from torch import Tensor

from sensibert.ops.masked_linear.dispatch import built

# In place of those of sensibert.deploy.bench: one measured pass over a few tokens, and no process for the memory.
FEW_LATENCIES = {"ROUNDS": 1, "LENGTH": 16, "peak_mb": lambda *args: None}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dtype_id(dtype: torch.dtype) -> str:
    return {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def assert_no_worse(ours: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, label: str = "result") -> None:
    """Our largest error against `exact` (float64) may be at most `factor` times that of `plain`, the same mathematics
    in plain PyTorch at the same dtype, plus one rounding of the largest value."""
    assert ours.shape == plain.shape == exact.shape, f"{label}: {ours.shape}, {plain.shape}, {exact.shape}"
    assert ours.dtype == plain.dtype, f"{label}: ours is {ours.dtype}, plain is {plain.dtype}"
    assert exact.dtype == torch.float64, f"{label}: the truth is {exact.dtype}, want float64"
    if not ours.numel():
        return
    mine, theirs = (float((t.double() - exact).abs().max()) for t in (ours, plain))
    floor = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    assert mine <= factor * theirs + floor, f"{label}: error {mine:.3g}, plain {theirs:.3g}, rounding {floor:.3g}"


def needs_hopper(path: str) -> pytest.MarkDecorator:
    """Skips a test of a path of masked_linear whose kernel runs on sm_90 only."""
    missing = path not in built() or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)
    return pytest.mark.skipif(missing, reason="no Hopper GPU, or the kernel was not built")


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
TINY |= {"pad_token_id": 0, "embedding_size": 32}
TINY |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
TINY_OWN_NAMES = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 64, "pad_token_id": 0}
    | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    "modernbert": TINY
    | {"local_attention": 8, "attn_implementation": "eager"}
    | {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
}


def tiny_config(model_type: str = "bert", **overrides):
    """A config of that family: 2 layers, hidden 32, 4 heads, FFN 64, 64 words, no dropout."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **(TINY_OWN_NAMES.get(model_type, TINY) | overrides))


def tiny_model(model_type: str = "bert", head: str = "SequenceClassification", seed: int = 0, **overrides):
    """A model of that family, random weights, eval mode; `head` names the AutoModel class ("" for the encoder)."""
    import transformers

    torch.manual_seed(seed)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto.from_config(tiny_config(model_type, **overrides)).eval()


def tiny_batch(batch: int = 3, tokens: int = 7, vocab_size: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S]; the last row is padded on the right."""
    rng = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(batch, tokens, dtype=torch.long)
    attention_mask[-1, tokens - tokens // 3 :] = 0
    input_ids = torch.randint(5, vocab_size, (batch, tokens), generator=rng) * attention_mask
    return {"input_ids": input_ids, "attention_mask": attention_mask}
