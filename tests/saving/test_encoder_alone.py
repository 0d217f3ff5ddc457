"""The encoder of a trimmed model is saved without its head, and a model whose encoder was trimmed is saved with it."""

import copy

import pytest
import torch
import transformers
from torch import nn

from sensibert.core.errors import SensibertError
from sensibert.models import base_of, layout_of
from sensibert.models.structure import structure_of
from sensibert.saving.folder import export, load
from sensibert.trimming.trim import trim
from tests import fresh
from tests.helpers import tiny_config, tiny_model
from tests.models.test_reloadable import CASES, auto_of, first
from tests.plans import batch_for, random_plan

FEW = [case for case in CASES if case.id in ("bert", "albert", "mpnet", "modernbert", "nomic_bert")]
HEADS = ("SequenceClassification", "MaskedLM")  # with and without a pooler, in most families


def untrimmed(family: str = "bert", head: str = HEADS[0], **overrides) -> nn.Module:
    try:
        return tiny_model(family, head, attn_implementation=None, **overrides)
    except ValueError as error:  # an older transformers may lack one
        if "Unrecognized model identifier" not in str(error):
            raise
        pytest.skip(f"this transformers has no {family}")


def cut(model: nn.Module, seed: int = 0) -> nn.Module:
    return trim(model, random_plan(layout_of(model), seed, empty=("layer.0.head", "layer.1.ffn")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoders of trimmed and of reloaded models, and models whose encoder was trimmed: name -> (Auto class, folder,
    batch), and name -> output."""
    here, given, expected = tmp_path_factory.mktemp("folders"), {}, {}

    def written(name: str, auto: str, model: nn.Module) -> None:
        given[name], expected[name] = (auto, here / name, batch_for(model)), first(model)

    for case in FEW:
        (family, overrides), auto = case.values, auto_of(HEADS[0])
        try:
            models = [tiny_model(family, head, attn_implementation=None, **overrides) for head in (*HEADS, HEADS[0])]
        except ValueError:
            continue
        cut(models[0]).save_pretrained(here / case.id)
        again = getattr(transformers, auto).from_pretrained(here / case.id)
        for head, model in zip(HEADS, (again, cut(models[1])), strict=True):
            export(base_of(model), here / f"{case.id}-{head}", layout="both")
            written(f"{case.id}-{head}", "AutoModel", base_of(model))
        base_of(again).save_pretrained(here / f"{case.id}-again")
        written(f"{case.id}-again", "AutoModel", base_of(again))
        cut(base_of(models[2]))
        models[2].save_pretrained(here / f"{case.id}-whole")
        written(f"{case.id}-whole", auto, models[2])
    return given, expected


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_they_reload_in_a_fresh_process(folders, trust_remote_code, tmp_path):
    given, expected = folders
    actual = fresh.outputs_of(given, trust_remote_code, tmp_path)
    assert actual.keys() == expected.keys() and len(actual) >= 16
    assert [name for name, value in actual.items() if not torch.equal(value, expected[name])] == []


def test_load_and_the_dense_folder_agree(folders):
    given, expected = folders
    for name, (_, path, _) in given.items():
        model, _ = load(path)
        torch.testing.assert_close(first(model), expected[name], msg=name)
        if (path / "dense").exists():
            torch.testing.assert_close(first(load(path / "dense")[0]), expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family, overrides", CASES)
def test_a_cut_of_the_encoder_turns_the_model_with_the_head_like_a_cut_of_the_whole(family, overrides, tmp_path):
    model, whole = untrimmed(family, **overrides), untrimmed(family, **overrides)
    shared = model.config
    cut(base_of(model))
    cut(whole)
    assert type(model) is type(whole) and model.config is base_of(model).config is not shared
    assert model.config.sensibert == whole.config.sensibert and type(shared) is not type(model.config)
    cut(base_of(model), seed=1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(first(load(tmp_path)[0]), first(model))
    assert all(torch.equal(kept, structure_of(model)[name]) for name, kept in structure_of(load(tmp_path)[0]).items())


def test_two_heads_on_one_encoder_are_both_saved(tmp_path):
    one, two = untrimmed(), untrimmed(head="TokenClassification", seed=1)
    two.bert = one.bert
    cut(one)
    for name, model in (("one", one), ("two", two)):
        export(model, tmp_path / name)
        torch.testing.assert_close(first(load(tmp_path / name)[0]), first(model))


def test_a_failed_cut_of_the_encoder_leaves_the_model_with_the_head_alone():
    model = untrimmed()
    kind, config = type(model), model.config
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.bias.fill_(float("nan"))
    with pytest.raises(SensibertError, match="NaN"):
        cut(model.bert)
    assert type(model) is kind and model.config is config and "save_pretrained" not in vars(model)


def test_a_copy_of_the_encoder_leaves_the_model_alone():
    model = untrimmed()
    trim(model.bert, random_plan(layout_of(model)), copy_model=True)
    assert type(model).__name__ == "BertForSequenceClassification" and not hasattr(model.config, "sensibert")


class Pair(transformers.PreTrainedModel):
    """Two encoders, of which neither is the base model."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.left, self.right = transformers.BertModel(config), transformers.BertModel(config)
        self.post_init()


def test_a_model_that_holds_a_trimmed_encoder_in_another_way_is_refused(tmp_path):
    pair = Pair(tiny_config())
    config = pair.config
    cut(pair.left)
    for twin in (pair, copy.deepcopy(pair)):
        with pytest.raises(SensibertError, match="Pair holds a trimmed encoder that is not its base_model"):
            twin.save_pretrained(tmp_path / "pair")
    assert not list(tmp_path.iterdir())
    assert pair.config is config is pair.right.config and type(config) is transformers.BertConfig
    for side in ("left", "right"):
        export(getattr(pair, side), tmp_path / side)
        torch.testing.assert_close(first(load(tmp_path / side)[0]), first(getattr(pair, side)))


def test_a_head_that_was_put_around_a_trimmed_encoder_is_refused_by_export(tmp_path):
    model, other = untrimmed(), cut(untrimmed(), seed=1)
    model.bert = cut(untrimmed()).bert
    with pytest.raises(SensibertError, match="BertForSequenceClassification has trimmed layers but the class or"):
        export(model, tmp_path / "m")
    other.bert = model.bert
    with pytest.raises(SensibertError, match="has trimmed layers but the class or config of another model"):
        export(other, tmp_path / "m")
    assert not list(tmp_path.iterdir())
