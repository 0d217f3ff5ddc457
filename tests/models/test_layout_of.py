"""What a table yields: sites, costs and a digest; and the error messages for models without one."""

import pytest
from torch import nn

from sensibert.core.errors import SensibertError
from sensibert.models import base_of, base_type, families, family_of, layers, layout_of, sites
from sensibert.models.modules import attribute, walk
from tests.helpers import tiny_model
from tests.models.test_families import make

HEADS = ["", "SequenceClassification", "QuestionAnswering", "TokenClassification", "MultipleChoice", "MaskedLM"]


def test_the_documented_families_are_there():
    documented = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "modernbert"}
    assert documented | {"deberta-v2", "mpnet"} <= families().keys()


def test_a_module_that_is_no_transformers_model_is_called_that():
    with pytest.raises(SensibertError, match="model: Linear is not a transformers model, want one of .*: albert, bert"):
        layout_of(nn.Linear(2, 2))


def test_an_unknown_family_is_refused_with_those_supported_and_how_to_add_one():
    with pytest.raises(SensibertError) as caught:
        layout_of(tiny_model("gpt2", "", n_head=4, n_layer=1, n_embd=32))
    message = str(caught.value)
    assert message.startswith("model: family 'gpt2' is not supported") and "\n" not in message
    assert "sensibert/models/families/ (see CONTRIBUTING)" in message and all(name in message for name in families())


@pytest.mark.parametrize("family, head", [("gpt2", ""), ("t5", "")])
def test_models_with_a_decoder_are_refused(family, head):
    model = tiny_model(family, head, num_heads=4, n_head=4, n_layer=1, n_embd=32, d_model=32, d_kv=8, d_ff=64)
    with pytest.raises(SensibertError, match=f"family '{family}' is not supported, want one of"):
        layout_of(model)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("setting", ["is_decoder", "add_cross_attention"])
def test_an_encoder_configured_as_a_decoder_is_refused(family, setting):
    model = tiny_model(family)
    setattr(model.config, setting, True)
    with pytest.raises(SensibertError, match=f"{family} is configured as a decoder, want an encoder"):
        layout_of(model)


def test_key_and_value_heads_shared_by_several_queries_are_refused():
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = tiny_model("eurobert", "", num_key_value_heads=2, **tokens)
    with pytest.raises(SensibertError, match=r"layers.0.self_attn.k_proj has 16 outputs, want 1 x 4 units of 8"):
        layout_of(model)


def test_a_layer_that_was_replaced_by_something_else_is_named():
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense = nn.Sequential(model.bert.encoder.layer[1].output.dense)
    with pytest.raises(SensibertError, match=r"encoder.layer.1 has no linear layer output.dense, want a plain bert"):
        layout_of(model)


def test_sites_do_not_depend_on_the_task_head():
    actual = [sites(tiny_model(head=head)) for head in HEADS]
    assert all(other == actual[0] for other in actual)
    assert [site.name for site in actual[0]] == ["layer.0.head", "layer.0.ffn", "layer.1.head", "layer.1.ffn"]


@pytest.mark.parametrize("family", sorted(families().keys() - {"roc_bert", "gte"}))
def test_every_member_is_a_parameter_and_its_units_fill_the_axis(family):
    model = make(family, "")
    state = dict(base_of(model).named_parameters())
    for site in sites(model):
        assert site.consumer in site.members
        for member in site.members:
            assert state[member.parameter].shape[member.dim] == member.parts * site.units * member.span
        sections = [state[m.parameter].numel() for m in site.members]
        assert sum(sections) == site.units * site.params


def test_encoder_parameters_leave_out_embeddings_pooler_and_head():
    model = tiny_model()
    layout = layout_of(model)
    assert layout.encoder_params == sum(p.numel() for p in model.bert.encoder.parameters())
    assert layout.total_params == sum(p.numel() for p in model.parameters())
    tied = tiny_model(head="MaskedLM")
    assert layout_of(tied).total_params == sum(p.numel() for p in tied.parameters()), "shared tensors count once"


def test_the_digest_depends_on_weights_and_shapes_only():
    model = tiny_model(seed=1)
    digest = layout_of(model).digest
    assert digest == layout_of(tiny_model(seed=1).train()).digest == layout_of(tiny_model(seed=1).double()).digest
    assert digest != layout_of(tiny_model(seed=2)).digest
    assert digest != layout_of(tiny_model(seed=1, intermediate_size=96)).digest


def test_trimmed_types_belong_to_their_base():
    assert base_type("sensibert_bert") == base_type("bert") == "bert"
    model = tiny_model("xlm-roberta")
    assert family_of(model).model_type == "roberta" and layout_of(model).family == "roberta"
    model.config.model_type = "sensibert_xlm-roberta"
    assert family_of(model).model_type == "roberta"


def test_paths_with_a_star_visit_every_layer_in_order():
    model = tiny_model("albert", "", num_hidden_groups=2, inner_group_num=2)
    names = [name for name, _ in layers(model)]
    assert names == [f"encoder.albert_layer_groups.{g}.albert_layers.{i}" for g in (0, 1) for i in (0, 1)]
    assert all(attribute(model, name) is layer for name, layer in walk(model, family_of(model).layers))
