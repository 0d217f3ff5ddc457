"""RemBERT and Megatron-BERT: BERT's module names, but their code fails without heads, so one is kept."""

from dataclasses import replace

from .bert import FAMILY as BERT

FAMILY = replace(BERT, model_type="rembert", aliases=("megatron-bert",), head=replace(BERT.head, minimum=1))
