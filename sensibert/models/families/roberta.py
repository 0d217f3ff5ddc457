"""RoBERTa and models with the same module names, which are those of BERT."""

from dataclasses import replace

from .bert import FAMILY as BERT

FAMILY = replace(
    BERT,
    model_type="roberta",
    aliases=("xlm-roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "roberta-prelayernorm"),
)
