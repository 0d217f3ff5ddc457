"""Every family, every task head: the table agrees with the model's shapes, outputs and costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sensibert.core import cost
from sensibert.models import families, layout_of, sites
from sensibert.trimming.self_check import silenced
from sensibert.trimming.trim import trim
from tests.helpers import tiny_model
from tests.plans import batch_for, outputs, random_plan

HEADS = ["", "SequenceClassification", "QuestionAnswering", "TokenClassification", "MultipleChoice", "MaskedLM"]
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "modernbert", "mpnet"]
RELATIVE = {
    "relative_attention": True,
    "position_buckets": 4,
    "max_relative_positions": 6,
    "norm_rel_ebd": "layer_norm",
}
# DeBERTa-v3 as it is published, and the other ways its positions can be read.
DEBERTA = RELATIVE | {"pos_att_type": "p2c|c2p", "share_att_key": True, "position_biased_input": False}
SMALL_TABLES = {"pronunciation_vocab_size": 8, "shape_vocab_size": 8}
OTHERS = [
    pytest.param("deberta-v2", {}, id="deberta-v2-absolute"),
    pytest.param("deberta-v2", RELATIVE | {"pos_att_type": ["c2p"]}, id="deberta-v2-own-c2p"),
    pytest.param("deberta-v2", RELATIVE | {"pos_att_type": ["p2c", "c2p"]}, id="deberta-v2-own-both"),
    pytest.param("deberta-v2", DEBERTA | {"pos_att_type": ["p2c"]}, id="deberta-v2-shared-p2c"),
    pytest.param("deberta-v2", DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu"}, id="deberta-v2-convolution"),
    pytest.param("albert", {"embedding_size": 16}, id="albert-narrow-embeddings"),
    pytest.param("albert", {"num_hidden_layers": 5, "num_hidden_groups": 2, "inner_group_num": 2}, id="albert-groups"),
    pytest.param("electra", {"embedding_size": 16}, id="electra-narrow-embeddings"),
    pytest.param("modernbert", {"mlp_bias": True, "attention_bias": True}, id="modernbert-biases"),
    pytest.param("ernie", {}, id="ernie"),
    pytest.param("roc_bert", SMALL_TABLES, id="roc_bert"),
    pytest.param("data2vec-text", {}, id="data2vec-text"),
    pytest.param("xlm-roberta-xl", {}, id="xlm-roberta-xl"),
    pytest.param("roberta-prelayernorm", {}, id="roberta-prelayernorm"),
    pytest.param("rembert", {"embedding_size": 16}, id="rembert"),
    pytest.param("megatron-bert", {}, id="megatron-bert"),
    pytest.param("nomic_bert", {}, id="nomic_bert"),
    pytest.param("gte", {}, id="gte"),
    pytest.param("eurobert", {"bos_token_id": 1, "eos_token_id": 2}, id="eurobert-late-pooling"),
    pytest.param("eurobert", {"bos_token_id": 1, "eos_token_id": 2, "classifier_pooling": "mean"}, id="eurobert"),
    pytest.param("ultrabert", {}, id="ultrabert"),
    pytest.param("ultrabert", {"classifier_pooling": "mean"}, id="ultrabert-mean"),
]
ROTARY = ("modernbert", "nomic_bert", "gte", "eurobert", "ultrabert")


def make(family: str, head: str, **overrides):
    try:
        model = tiny_model(family, head, **({"attn_implementation": "eager"} | overrides))
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        pytest.skip(f"this transformers has no {family}")
    return model.requires_grad_(False)  # the counter trips over a parameter that is fed to a module


def assert_flops(model, batch, expected: int) -> None:
    """Equal to what torch counts; transformers before 5.23 also multiplies out the table of rotary angles."""
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    head_dim, length = 8, batch["input_ids"].shape[-1]
    family = model.config.model_type.removeprefix("sensibert_")
    angles = [kinds * head_dim * length for kinds in (0, 1, 2)] if family in ROTARY else [0]
    assert counter.get_total_flops() - expected in angles


def check(model) -> None:
    """Random cuts, with one sublayer gone of each kind: exact, and of the announced size and cost."""
    model.double()
    layout, batch = layout_of(model), batch_for(model)
    sequences, length = batch["input_ids"].numel() // batch["input_ids"].shape[-1], batch["input_ids"].shape[-1]
    assert layout.total_params == sum(p.numel() for p in model.parameters())
    assert_flops(model, batch, cost.flops(layout, cost.counts_of(layout), "model", sequences, length))

    plan = random_plan(layout, empty=("layer.0.head", "layer.1.ffn"))
    counts = cost.counts_of(layout, plan.keep)
    with silenced(model, plan):
        expected = outputs(model, batch)
    trim(model, plan)
    actual = outputs(model, batch)
    assert float((actual - expected).abs().max()) < 1e-9
    assert float((actual - expected.mean()).abs().max()) > 1e-3, "the outputs are all the same: they prove nothing"

    now = layout_of(model)
    assert [site.units for site in now.sites] == [counts[site.name] for site in layout.sites]
    assert now.total_params == cost.params(layout, counts, "model") == sum(p.numel() for p in model.parameters())
    assert now.encoder_params == cost.params(layout, counts, "encoder")
    expected_flops = cost.flops(layout, counts, "model", sequences, length)
    assert expected_flops == cost.flops(now, cost.counts_of(now), "model", sequences, length)
    assert_flops(model, batch, expected_flops)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head or "encoder")
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_and_trimmed_agree_at_the_announced_cost(family, head):
    check(make(family, head))


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head or "encoder")
def test_deberta_v3_too(head):
    check(make("deberta-v2", head, **DEBERTA))


@pytest.mark.parametrize("family, overrides", OTHERS)
def test_other_configurations_and_relatives_too(family, overrides):
    check(make(family, "SequenceClassification", **overrides))


def test_every_family_is_tested():
    assert families().keys() == {*FAMILIES, *(case.values[0] for case in OTHERS)}


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "modernbert", "nomic_bert"])
def test_a_layer_without_heads_runs_in_fused_attention(family):
    model = make(family, "SequenceClassification", attn_implementation="sdpa")
    plan, batch = random_plan(layout_of(model), empty=("layer.0.head",)), batch_for(model)
    with silenced(model, plan):
        expected = outputs(model, batch)
    torch.testing.assert_close(outputs(trim(model, plan), batch), expected)


@pytest.mark.parametrize("family", ["deberta-v2", "rembert"])
def test_a_family_that_counts_its_heads_keeps_one(family):
    layout = layout_of(make(family, ""))
    assert {site.minimum for site in layout.sites if site.kind == "head"} == {1}
    assert {site.minimum for site in layout.sites if site.kind == "ffn"} == {0}


def test_the_unit_costs_of_bert_base_are_those_of_the_design():
    with torch.device("meta"):
        model = tiny_model(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=3072)
    head, ffn = sites(model)
    assert (head.units, head.params, head.flops.token, head.flops.pair) == (12, 196_800, 2 * 196_608, 2 * 128)
    assert (ffn.units, ffn.params, ffn.flops.token, ffn.flops.pair) == (3072, 1_537, 2 * 1_536, 0)
