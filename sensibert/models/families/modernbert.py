"""ModernBERT: q, k and v in one matrix [3 * H * D, hidden], input and gate of the FFN in another."""

from .family import Axis, Family

FAMILY = Family(
    model_type="modernbert",
    encoder="layers",
    layers="layers.*",
    head=Axis(produces=("attn.Wqkv",), consumes="attn.Wo", parts=3),
    ffn=Axis(produces=("mlp.Wi",), consumes="mlp.Wo", parts=2),
    head_dim="attn.head_dim",
)
