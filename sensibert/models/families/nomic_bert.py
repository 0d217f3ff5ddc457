"""Nomic BERT, GTE, EuroBERT and UltraBERT: rotary encoders with a gated FFN in three matrices."""

from .family import Axis, Family

FAMILY = Family(
    model_type="nomic_bert",
    aliases=("gte", "eurobert", "ultrabert"),
    encoder="layers",
    layers="layers.*",
    head=Axis(produces=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), consumes="self_attn.o_proj"),
    ffn=Axis(produces=("mlp.gate_proj", "mlp.up_proj"), consumes="mlp.down_proj"),
    head_dim="self_attn.head_dim",
)
