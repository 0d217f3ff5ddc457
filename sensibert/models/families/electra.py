"""ELECTRA (the discriminator): BERT's module names, without a pooler."""

from dataclasses import replace

from .bert import FAMILY as BERT

FAMILY = replace(BERT, model_type="electra", aliases=())
