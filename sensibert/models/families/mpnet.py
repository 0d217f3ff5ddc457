"""MPNet: one table of relative positions for all layers, with a column per head of the untrimmed model."""

from .family import Axis, Family

FAMILY = Family(
    model_type="mpnet",
    layers="encoder.layer.*",
    head=Axis(
        produces=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        consumes="attention.attn.o",
        counts=("attention.attn.num_attention_heads",),
        widths=("attention.attn.all_head_size",),
    ),
    ffn=Axis(produces=("intermediate.dense",), consumes="output.dense"),
    head_dim="attention.attn.attention_head_size",
    position_bias="attention.attn",
)
