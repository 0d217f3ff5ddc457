"""BERT and models with the same module names."""

from .family import Axis, Family

FAMILY = Family(
    model_type="bert",
    aliases=("ernie", "roc_bert"),
    layers="encoder.layer.*",
    head=Axis(
        produces=("attention.self.query", "attention.self.key", "attention.self.value"),
        consumes="attention.output.dense",
        counts=("attention.self.num_attention_heads",),
        widths=("attention.self.all_head_size",),
    ),
    ffn=Axis(produces=("intermediate.dense",), consumes="output.dense"),
    head_dim="attention.self.attention_head_size",
)
