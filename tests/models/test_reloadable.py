"""A trimmed model is of a class that saves itself: every family and head, copies, wrappers, Trainers, the hub."""

import copy
import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from sensibert.core.errors import SensibertError
from sensibert.models import base_of, layout_of, modeling_sensibert
from sensibert.models.structure import structure_of
from sensibert.trimming.trim import restructure, trim
from tests import fresh
from tests.helpers import tiny_batch, tiny_config, tiny_model
from tests.models.test_families import DEBERTA, FAMILIES, OTHERS
from tests.plans import batch_for, outputs, random_plan

CASES = [pytest.param(family, {}, id=family) for family in FAMILIES]
CASES += [pytest.param("deberta-v2", DEBERTA, id="deberta-v2"), *OTHERS]
HEADS = ["QuestionAnswering", "TokenClassification", "MultipleChoice", "MaskedLM", "PreTraining", ""]
FILES = {"config.json", "model.safetensors", "structure.safetensors", "modeling_sensibert.py"}


def auto_of(head: str) -> str:
    return f"AutoModelFor{head}" if head else "AutoModel"


def trimmed(family: str = "bert", head: str = "SequenceClassification", seed: int = 0, **overrides) -> nn.Module:
    """Random cuts; layer 0 loses its heads and layer 1 its neurons, where the family allows it."""
    model = tiny_model(family, head, seed, attn_implementation=None, **overrides)  # None: what a reload takes as well
    return trim(model, random_plan(layout_of(model), seed, empty=("layer.0.head", "layer.1.ffn")))


@torch.no_grad()
def first(model: nn.Module) -> torch.Tensor:
    return model.eval()(**batch_for(model))[0]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """What save_pretrained writes of every family and head, and of its encoder alone: name -> (Auto class, folder,
    batch), and name -> output of the model that was saved."""
    here, folders, expected = tmp_path_factory.mktemp("shelf"), {}, {}
    cases = [(case.id, case.values[0], "SequenceClassification", case.values[1]) for case in CASES]
    cases += [(f"bert {head}", "bert", head, {}) for head in HEADS]
    for name, family, head, overrides in cases:
        try:
            model = trimmed(family, head, **overrides)
        except ValueError as error:  # an older transformers may lack one
            if "Unrecognized model identifier" not in str(error):
                raise
            continue
        parts = {name: (auto_of(head), model), f"{name} encoder": ("AutoModel", base_of(model))}
        for part, (auto, saved) in parts.items():
            saved.save_pretrained(here / part)
            folders[part], expected[part] = (auto, here / part, batch_for(saved)), first(saved)
    return here, folders, expected


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_every_family_and_head_reloads_bit_for_bit_in_a_fresh_process(shelf, trust_remote_code, tmp_path):
    _, folders, expected = shelf
    actual = fresh.outputs_of(folders, trust_remote_code, tmp_path)
    assert actual.keys() == expected.keys() and len(actual) > 50
    assert [name for name, value in actual.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("family, overrides", CASES)
def test_the_model_is_turned_in_place_and_a_config_it_shares_is_left_alone(family, overrides):
    try:
        model = tiny_model(family, **overrides)
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    config, stock = model.config, type(model)
    before, other = config.to_dict(), stock(config)
    assert trim(model, random_plan(layout_of(model))) is model
    assert type(model) is getattr(modeling_sensibert, f"Sensibert{stock.__name__}") and isinstance(model, stock)
    assert type(base_of(model)) is getattr(modeling_sensibert, f"Sensibert{type(base_of(other)).__name__}")
    assert not any(vars(module).get("config") is config for module in model.modules())
    assert base_of(model).config is model.config is not config and model.config.model_type == f"sensibert_{family}"
    assert config.to_dict() == before and other.config is config and type(other) is stock


@pytest.mark.parametrize("family, overrides", CASES)
def test_it_still_records_hidden_states_and_finds_its_loss(family, overrides):
    """Both are looked up by the name of the class."""
    try:
        model = tiny_model(family, num_labels=2, **overrides)
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    plan = random_plan(layout_of(model))
    for kept in plan.keep.values():
        kept[:] = True
    batch = tiny_batch() | {"labels": torch.tensor([0, 1, 1]), "output_hidden_states": True}
    expected = model(**batch)
    trim(model, plan)
    again = type(model)(copy.deepcopy(model.config)).eval()  # as a reload builds it
    again.load_state_dict(model.state_dict())
    for made in (model, again):
        actual = made(**batch)
        assert made.loss_type == "ForSequenceClassification" and torch.equal(actual.loss, expected.loss)
        assert len(actual.hidden_states) == len(expected.hidden_states) > 2
        assert all(torch.equal(a, b) for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True))
        inner = base_of(made)(**tiny_batch(), output_hidden_states=True)
        assert len(inner.hidden_states) == len(expected.hidden_states)


def test_the_entry_has_budget_and_method_and_a_second_trim_updates_it(tmp_path):
    model = trimmed()
    first_entry, units = model.config.sensibert, structure_of(model)
    assert first_entry["heads"] == [len(units[f"layer.{n}.head"]) for n in (0, 1)] and first_entry["method"] == "random"
    plan = random_plan(layout_of(model), seed=5)
    trim(model, plan)
    entry = model.config.sensibert
    assert entry["ffn"] == [int(plan.keep[f"layer.{n}.ffn"].sum()) for n in (0, 1)] != first_entry["ffn"]
    assert entry["kept_heads"] == [structure_of(model)[f"layer.{n}.head"].tolist() for n in (0, 1)]
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(first(again), first(model))
    assert again.config.sensibert == json.loads(json.dumps(entry)) and again.config.intermediate_size == 64
    assert all(torch.equal(kept, structure_of(model)[name]) for name, kept in structure_of(again).items())


def test_the_encoder_of_a_loaded_model_saves_itself_too(shelf, tmp_path):
    here, _, expected = shelf
    model = AutoModelForSequenceClassification.from_pretrained(here / "mpnet")
    model.mpnet.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert torch.equal(first(AutoModel.from_pretrained(tmp_path)), expected["mpnet encoder"])


def test_a_restructured_model_saves_itself(tmp_path):
    wanted = trimmed()
    model = restructure(tiny_model(attn_implementation=None), structure_of(wanted))
    model.load_state_dict(wanted.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(first(AutoModelForSequenceClassification.from_pretrained(tmp_path)), first(wanted))


def torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def trimmed_copy(model: nn.Module) -> nn.Module:
    stock = tiny_model(attn_implementation=None)
    twin = trim(stock, random_plan(layout_of(stock), 0, empty=("layer.0.head", "layer.1.ffn")), copy_model=True)
    assert type(stock) is BertForSequenceClassification and stock.config.model_type == "bert"
    return twin


def prepared(model: nn.Module) -> nn.Module:
    accelerator = Accelerator(cpu=True)
    return accelerator.unwrap_model(accelerator.prepare(model))


@pytest.mark.parametrize(
    "twin",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        torch_saved,
        trimmed_copy,
        lambda model: nn.DataParallel(model).module,
        prepared,
    ],
    ids=["deepcopy", "pickle", "torch.save", "copy_model", "DataParallel", "accelerate"],
)
def test_copies_and_unwrapped_models_save_themselves(twin, tmp_path):
    model = trimmed()
    other = twin(model)
    assert torch.equal(first(other), first(model))
    other.save_pretrained(tmp_path)
    assert torch.equal(first(AutoModelForSequenceClassification.from_pretrained(tmp_path)), first(model))


@pytest.fixture
def no_accelerator():
    """Accelerate keeps the settings of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_in_mixed_precision_is_trimmed_and_saved(no_accelerator, tmp_path):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(tiny_model(attn_implementation=None))
    trim(model, random_plan(layout_of(model)))
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(first(again), first(accelerator.unwrap_model(model, keep_fp32_wrapper=False)))


@pytest.mark.parametrize("wrap, name", [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_a_wrapped_model_is_refused_with_the_way_in(wrap, name):
    model = tiny_model()
    with pytest.raises(SensibertError, match=rf"model: is wrapped in \w+, want the model inside it .model\.{name}."):
        trim(wrap(model), random_plan(layout_of(model)))
    assert type(model) is BertForSequenceClassification


def test_it_works_in_a_pipeline_before_and_after_saving(tmp_path):
    model = trimmed()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    here = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert here("a b c") == transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")("a b c")


def test_attention_can_be_switched_and_checkpointed(tmp_path):
    model = trimmed()
    expected = first(model)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == model.bert.config._attn_implementation == "eager"
    torch.testing.assert_close(first(model), expected)
    gradients = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**tiny_batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Hub:
    """A hub that is a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                path = self.folder / repo_id / operation.path_in_repo
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made, card = Hub(tmp_path / "hub"), SimpleNamespace(save=lambda path: open(path, "w").close())
    for module in (transformers.utils.hub, transformers.modeling_utils):
        if not hasattr(module, "hf_api"):
            pytest.skip("this transformers reaches the hub in another way")
        monkeypatch.setattr(module, "hf_api", lambda: made)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: card)
    return made.folder


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_all_files_that_a_reload_needs_are_uploaded_to_the_hub(push, hub, tmp_path):
    for seed in (0, 1):  # the second time nothing of the first one may be taken for unchanged
        model = trimmed(seed=seed)
        if push == "push_to_hub":
            model.push_to_hub("small")
        else:
            model.save_pretrained(tmp_path / "small", push_to_hub=True)
        assert {path.name for path in (hub / "small").iterdir()} == FILES | {"README.md"}
        assert torch.equal(first(AutoModelForSequenceClassification.from_pretrained(hub / "small")), first(model))


class TheirHead(BertForSequenceClassification):
    """Computes something else than its base class."""

    def forward(self, **batch):
        outputs = super().forward(**batch)
        outputs.logits = -outputs.logits
        return outputs


class TheirConfig(transformers.BertConfig):
    pass


class TheirModule(nn.Module):
    """No transformers model at all, but one inside."""

    def __init__(self):
        super().__init__()
        self.net = tiny_model()
        self.config = self.net.config

    base_model = property(lambda self: self.net.bert)

    def forward(self, **batch):
        return self.net(**batch)


def trained_by(model: nn.Module, folder) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(str(folder), report_to="none", use_cpu=True)
    return transformers.Trainer(model, arguments)


def test_a_class_that_is_not_of_transformers_is_trimmed_and_refuses_to_save_in_words(tmp_path):
    model = TheirHead(tiny_config())
    expected = model.eval()(**tiny_batch()).logits
    trim(model, random_plan(layout_of(model)))
    assert type(model) is TheirHead and not torch.equal(model(**tiny_batch()).logits, expected)
    trim(model, random_plan(layout_of(model), share=0.8))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for save in (twin.save_pretrained, trained_by(twin, tmp_path / "run").save_model):
            with pytest.raises(SensibertError, match="TheirHead is not a class of transformers.* save its base_model"):
                save(str(tmp_path / "m"))
        assert torch.equal(twin(**tiny_batch()).logits, model(**tiny_batch()).logits)
    assert not list(tmp_path.glob("m/*"))
    model.bert.save_pretrained(tmp_path / "encoder")  # the way that the message names
    assert torch.equal(first(AutoModel.from_pretrained(tmp_path / "encoder")), first(model.bert))


def test_a_config_that_is_not_of_transformers_refuses_too(tmp_path):
    model = BertForSequenceClassification(TheirConfig(**tiny_config().to_diff_dict()))
    trim(model, random_plan(layout_of(model)))
    assert type(model.config) is TheirConfig
    for part in (model, model.bert):
        with pytest.raises(SensibertError, match="model: TheirConfig is not a class of transformers"):
            part.save_pretrained(tmp_path / "m")


def test_a_transformers_model_inside_a_module_saves_itself(tmp_path):
    model = TheirModule().eval()
    trim(model, random_plan(layout_of(model)))
    model.net.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again, tiny_batch()), outputs(model, tiny_batch()))


def test_another_encoder_in_the_same_module_is_left_alone(tmp_path):
    model = TheirModule().eval()
    model.other = transformers.BertModel(model.config)
    trim(model, random_plan(layout_of(model)))
    assert type(model.other) is transformers.BertModel and model.other.config.model_type == "bert"
    model.other.save_pretrained(tmp_path)
    assert torch.equal(first(AutoModel.from_pretrained(tmp_path)), first(model.other))


TRIM = """
import sys, transformers
from tests.helpers import tiny_model
from tests.plans import random_plan
from sensibert import layout_of, trim
model = tiny_model()
before = {name for name in sys.modules if name.startswith("transformers.models.")}
trim(model, random_plan(layout_of(model)))
added = {name for name in sys.modules if name.startswith("transformers.models.")} - before
known = transformers.AutoModelForSequenceClassification._model_mapping._extra_content.values()
print(len(added), type(model) in known)
"""


def test_a_trim_imports_no_other_model_family_and_makes_the_class_known_to_pipelines(tmp_path):
    number, known = fresh.run(TRIM, cwd=tmp_path, interpreter=True).split()
    assert int(number) < 20 and known == "True"
