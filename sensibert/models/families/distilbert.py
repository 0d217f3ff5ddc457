"""DistilBERT."""

from .family import Axis, Family

FAMILY = Family(
    model_type="distilbert",
    encoder="transformer",
    layers="transformer.layer.*",
    head=Axis(
        produces=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        consumes="attention.out_lin",
        counts=("attention.n_heads",),
        widths=("attention.dim",),
    ),
    ffn=Axis(produces=("ffn.lin1",), consumes="ffn.lin2"),
    head_dim="attention.attention_head_size",
)
