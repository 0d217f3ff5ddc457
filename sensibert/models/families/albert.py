"""ALBERT: many depths share a group of layers, so a cut affects each of them."""

from .family import Axis, Family

FAMILY = Family(
    model_type="albert",
    layers="encoder.albert_layer_groups.*.albert_layers.*",
    head=Axis(
        produces=("attention.query", "attention.key", "attention.value"),
        consumes="attention.dense",
        counts=("attention.num_attention_heads",),
        widths=("attention.all_head_size",),
    ),
    ffn=Axis(produces=("ffn",), consumes="ffn_output"),
    head_dim="attention.attention_head_size",
    repeats=("num_hidden_layers", "num_hidden_groups"),
)
