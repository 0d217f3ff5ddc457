"""RoBERTa: BERT's module names; the models that copied them from here come along."""

from dataclasses import replace

from .bert import FAMILY as BERT

FAMILY = replace(
    BERT,
    model_type="roberta",
    aliases=("xlm-roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "roberta-prelayernorm"),
)
