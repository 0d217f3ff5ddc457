"""Trimming without training: one call, one command."""

import copy

import pytest
import torch

from sensibert import SensibertError, TrimConfig, trim_model
from sensibert.core.budget import Budget
from sensibert.models import layout_of
from sensibert.models.unfinished import reached
from sensibert.sensitivity import collect_factors, sampled_loss
from sensibert.sensitivity.analyze import analyze
from sensibert.trimming import compensate
from sensibert.trimming.trim import trim
from tests import runs
from tests.helpers import tiny_batch, tiny_model
from tests.runs import command

pytestmark = pytest.mark.usefixtures("no_pictures")


def config(**settings) -> TrimConfig:
    return TrimConfig("50%params", width_multiple=4, **settings)


def test_it_is_the_steps_one_by_one():
    from sensibert import allocate

    model, batches = tiny_model(), [tiny_batch(4, 7)]
    steps = copy.deepcopy(model)
    assert trim_model(model, iter(batches), config(), seed=3) is model
    factors = collect_factors(steps, layout_of(steps), batches, sampled_loss, 3)
    scores = analyze(steps, (), "obs", factors=factors)
    plan = allocate(scores, Budget.parse("50%params"), 4)
    compensate(steps, plan, factors)
    trim(steps, plan)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, steps(ids).logits)
    assert model.config.sensibert["budget"] == "50%params" and model.config.sensibert["method"] == "obs"


@pytest.mark.parametrize("head", ["", "SequenceClassification"])
def test_the_method_is_that_of_the_model_unless_one_is_given(head):
    model = tiny_model(head=head)
    batches = [{name: value for name, value in tiny_batch(4, 7).items() if name != "labels"}]
    before = layout_of(model).encoder_params
    trim_model(copy.deepcopy(model), batches, "50%params")
    given = trim_model(copy.deepcopy(model), batches, config(method="magnitude", compensate=False))
    trim_model(model, batches, config())
    assert model.config.sensibert["method"] == ("obs" if head else "layer-obs")
    assert given.config.sensibert["method"] == "magnitude"
    assert reached(model, Budget.parse("50%params")) <= before / 2


def test_a_model_inside_another_is_trimmed_by_its_features(tmp_path):
    sentence_models = pytest.importorskip("tests.sentence_models")
    model = sentence_models.sentence_model("SentenceTransformer", tmp_path)
    inner, vectors = model.transformers_model, model.encode(sentence_models.TEXTS)
    before = layout_of(inner).encoder_params
    assert trim_model(model, [model.preprocess(sentence_models.TEXTS)], config()) is model
    assert layout_of(inner).encoder_params <= before / 2
    assert model.encode(sentence_models.TEXTS).shape == vectors.shape


@pytest.mark.parametrize(
    "batches, settings, message",
    [
        ([tiny_batch()], {"method": "baseline"}, "method is 'baseline', which trims nothing"),
        ([tiny_batch()], {"budget": "0.001%params"}, "budget"),
        ([], {}, "batches is empty"),
        ([3], {}, r"batches\[0\] is 3, want a dict of tensors"),
    ],
)
def test_what_cannot_be_leaves_the_model_as_it_was(batches, settings, message):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SensibertError, match=message):
        trim_model(model, batches, TrimConfig(**{"budget": "50%params", **settings}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decide")
    runs.embedding_folder(folder / "model")
    runs.text_file(folder / "texts.txt")
    return folder


def test_one_command_trims_an_embedding_model_on_texts(here, tmp_path):
    requested = ("trim", "--model", here / "model", "--train-file", here / "texts.txt", "--width-multiple", 4)
    dry = command(*requested, "--output", tmp_path / "none", "--dry-run", "--json")
    assert dry.code == 0 and not (tmp_path / "none").exists()
    done = command(*requested, "--output", tmp_path / "small", "--json")
    assert done.json["encoder_params_after"] <= done.json["encoder_params_before"] / 2
    assert done.json["method"] == "obs" and (tmp_path / "small/modules.json").exists()
    assert {**dry.json, "output": done.json["output"]} == done.json
    again = command("eval", tmp_path / "small", "--validation-file", runs.scored_file(tmp_path / "dev.csv"), "--json")
    assert -1 <= again.json["metrics"]["spearman"] <= 1


def test_a_plan_and_a_training_file_exclude_each_other(here, tmp_path):
    requested = ("trim", "--model", here / "model", "--output", tmp_path / "small")
    both = command(*requested, "--plan", tmp_path / "plan", "--train-file", here / "texts.txt")
    assert both.code == 2 and "train_file and plan are both given, want one of them" in both.err
    neither = command(*requested)
    assert neither.code == 2 and "plan and train_file are missing, want one of them" in neither.err
    none = command(*requested, "--train-file", here / "texts.txt", "--method", "baseline")
    assert none.code == 2 and "method is 'baseline', which trims nothing" in none.err
    flat = command(*requested, "--train-file", here / "texts.txt", "--method", "taylor")  # of a model without a head
    assert flat.code == 2 and "the loss has no gradient before the cut; want obs, layer-obs" in flat.err
    assert not (tmp_path / "small").exists()
