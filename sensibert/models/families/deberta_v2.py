"""DeBERTa-v2 and -v3. The layers reshape by attributes: with stale ones a trimmed layer is silently wrong."""

from typing import Any

from ...core.layout import Flops
from .family import Axis, Family


def _relative_flops(config: Any, head_dim: int) -> Flops:
    """FLOPs of a head for relative positions: 2 D per token, entry of the table and kind (c2p, p2c), plus the
    projections of the table, once per pass."""
    if not config.relative_attention:
        return Flops()
    buckets, longest = getattr(config, "position_buckets", -1), config.max_relative_positions
    entries = 2 * (buckets if buckets > 0 else longest if longest > 0 else config.max_position_embeddings)
    kinds = sum(kind in (config.pos_att_type or ()) for kind in ("c2p", "p2c"))
    # Shared query and key projections both run, even if only one kind is used.
    projections = 2 if getattr(config, "share_att_key", False) else kinds
    return Flops(
        token=2 * kinds * head_dim * entries, forward=2 * projections * entries * config.hidden_size * head_dim
    )


FAMILY = Family(
    model_type="deberta-v2",
    layers="encoder.layer.*",
    head=Axis(
        produces=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        tables=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        consumes="attention.output.dense",
        counts=("attention.self.num_attention_heads",),
        widths=("attention.self.all_head_size",),
        minimum=1,
    ),
    ffn=Axis(produces=("intermediate.dense",), consumes="output.dense"),
    head_dim="attention.self.attention_head_size",
    relative_flops=_relative_flops,
)
