"""RemBERT and Megatron-BERT: BERT's module names, but the number of heads is counted on, so one has to stay."""

from dataclasses import replace

from .bert import FAMILY as BERT

FAMILY = replace(BERT, model_type="rembert", aliases=("megatron-bert",), head=replace(BERT.head, minimum=1))
