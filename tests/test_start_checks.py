"""What trimming cannot work with is refused before the first step, and what it can work with is trimmed and saved."""

import functools
import random
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
)

from sensibert import SensibertError, TrimCallback, layout_of
from sensibert.core.config import TrimConfig
from tests.data.tiny import word_piece
from tests.helpers import tiny_batch, tiny_config, tiny_model
from tests.test_plain_trainer import arguments, rows


def config(**settings) -> TrimConfig:
    return TrimConfig("50%params", width_multiple=4, **settings)


def trained(model, folder, callback, data=None, kind=Trainer, collator=None, **more) -> Trainer:
    """The Trainer after its training; one that raises must not have made a step."""
    trainer = kind(
        model, arguments(folder, max_steps=4, **more), collator, train_dataset=data or rows(), callbacks=[callback]
    )
    try:
        trainer.train()
    except SensibertError:
        assert trainer.state.global_step == 0
        raise
    return trainer


class OwnLoss(Trainer):
    """Fine-tunes anything whose outputs hold a tensor [B, ...]."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        values = outputs.values() if isinstance(outputs, dict) else outputs
        return next(value for value in values if value.dim() > 1).float().square().mean()


class Pops(Trainer):
    """Takes a column for itself."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs.pop("x")
        return super().compute_loss(model, inputs, *args, **kwargs)


EXTRA = {"kind": Pops, "remove_unused_columns": False, "data": [row | {"x": torch.ones(())} for row in rows()]}


class Module(nn.Module):
    """An encoder and a head of one's own; `returns` makes the outputs."""

    def __init__(self, returns, known=True):
        super().__init__()
        self.encoder, self.head, self.returns = tiny_model(head=""), nn.Linear(32, 2), returns
        if known:
            self.config = self.encoder.config

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0][:, 0])
        return self.returns(nn.functional.cross_entropy(logits, labels), logits)


class Around(Module):
    base_model = property(lambda self: self.encoder)


class TheirHead(BertForSequenceClassification):
    pass


class TheirModel(PreTrainedModel):
    config_class, base_model_prefix = type(tiny_config()), "bert"

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = AutoModel.from_config(config), nn.Linear(32, 2)
        self.post_init()

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.bert(input_ids=input_ids, attention_mask=attention_mask)[0][:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def mapping(loss, logits) -> dict:
    return {"loss": loss, "logits": logits}


def pair(loss, logits) -> tuple:
    return loss, logits


def without_labels() -> list[dict]:
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows()]


def detached(outputs, batch, generator):
    return outputs["logits"].detach().square().mean()


def inner_loss(outputs, batch, generator):
    return outputs[-1].square().mean()


@pytest.mark.parametrize(
    "make, method, more, message",
    [
        (lambda: tiny_model(return_dict=False), "obs", {}, "the model returns a tuple, want a mapping .*return_dict"),
        (lambda: tiny_model(return_dict=False), "taylor", {}, "returned no loss, want labels in the batch"),
        (lambda: tiny_model(head="PreTraining"), "obs", {"kind": OwnLoss, "data": without_labels()}, "and no logits"),
        (lambda: tiny_model(head=""), "obs", {"kind": OwnLoss, "data": without_labels()}, "and no logits.*; want"),
        (tiny_model, "taylor", {"kind": OwnLoss, "data": without_labels()}, "returned no loss.*method='obs'"),
        (tiny_model, "soft_gates", {"kind": OwnLoss, "data": without_labels()}, "returned no loss.*method='obs'"),
        (tiny_model, "obs", {"data": [row | {"weight": torch.ones(())} for row in rows()]}, None),
        (lambda: Around(pair), "obs", {}, "the model returns a tuple"),
        (lambda: Around(pair), "magnitude", {}, None),
        (lambda: Around(pair), "layer-obs", {}, None),
        (lambda: Around(mapping), "obs", {}, None),
        (lambda: Around(mapping), "taylor", {}, None),
        (lambda: Around(mapping), "obs", EXTRA, "TypeError.*'x'"),
        (lambda: Module(mapping), "obs", {}, "Module has no encoder.layer, where a bert has its layers"),
        (lambda: Module(mapping, known=False), "obs", {}, "Module is not a transformers model.*base_model"),
        (lambda: TheirHead(tiny_config()), "obs", {}, None),
        (lambda: TheirHead(tiny_config()), "obs", {"save_strategy": "epoch"}, "TheirHead is not a class.*save_strat"),
        (lambda: TheirModel(tiny_config()), "obs", {}, None),
        (lambda: TheirModel(tiny_config()), "taylor", {}, None),
        (lambda: tiny_model(return_dict=False), "layer-obs", {}, None),
        (lambda: tiny_model(head="PreTraining"), "layer-obs", {"kind": OwnLoss, "data": without_labels()}, None),
        (lambda: tiny_model(head="NextSentencePrediction"), "obs", {}, None),
    ],
)
def test_a_model_is_trimmed_and_saved_or_refused_before_the_first_step(tmp_path, make, method, more, message):
    model = make()
    if message is not None:
        with pytest.raises(SensibertError, match=message):
            trained(model, tmp_path / "run", TrimCallback(config(method=method)), **more)
        return
    whole = layout_of(model).encoder_params
    trainer = trained(model, tmp_path / "run", TrimCallback(config(method=method)), **more)
    assert 0.4 * whole < layout_of(model).encoder_params <= 0.5 * whole
    if type(model).__name__.startswith("SensibertBert"):
        trainer.save_model(str(tmp_path / "small"))
        again = type(model).from_pretrained(tmp_path / "small").eval()
        assert torch.equal(again(**tiny_batch())[0], model.eval()(**tiny_batch())[0])


@pytest.mark.parametrize("loss, message", [(detached, r"the loss has no gradient\); want"), (inner_loss, None)])
def test_a_loss_of_ones_own_is_tried_too(tmp_path, loss, message):
    callback, model = TrimCallback(config(), loss=loss), Around(pair if message is None else mapping)
    whole = layout_of(model).encoder_params
    if message is None:
        trained(model, tmp_path, callback)
        assert layout_of(model).encoder_params <= 0.5 * whole
    else:
        with pytest.raises(SensibertError, match=message):
            trained(model, tmp_path, callback)


def test_labels_that_only_the_trainers_own_loss_understands_are_refused(tmp_path):
    """compute_loss_func: the Trainer takes the labels out of the batch, the analysis does not."""
    soft = [row | {"labels": torch.tensor([0.2, 0.3, 0.5])} for row in rows()]
    trainer = Trainer(
        tiny_model(),
        arguments(tmp_path),
        train_dataset=soft,
        callbacks=[TrimCallback(config())],
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean(),
    )
    with pytest.raises(SensibertError, match="cannot analyze BertForSequenceClassification .*Error: .*want rows with"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_without_input_ids_are_refused(tmp_path):
    data = [{"inputs_embeds": torch.zeros(5, 32), "labels": row["labels"]} for row in rows()]
    with pytest.raises(SensibertError, match=r"\(KeyError\('input_ids'\)\); want rows with input_ids"):
        trained(tiny_model(), tmp_path, TrimCallback(config()), data)
    trained(tiny_model(), tmp_path, TrimCallback(config(method="magnitude")), data)


def test_a_class_of_ones_own_that_cannot_save_itself_is_told_at_the_start(tmp_path):
    callback = TrimCallback(config(method="magnitude"))
    trained(TheirHead(tiny_config()), tmp_path, callback)
    assert ["TheirHead is not a class of transformers" in text for text in callback.warnings] == [True]


def test_a_model_with_adapters_is_refused_with_the_way_to_merge_them():
    module = ModuleType("peft.peft_model")
    wrapper = type("PeftModel", (nn.Module,), {"__module__": module.__name__, "config": tiny_config()})
    with pytest.raises(SensibertError, match=r"model: PeftModel has adapters, want one without: .*merge_and_unload"):
        layout_of(wrapper())
    model = tiny_model()
    model._hf_peft_config_loaded = True
    with pytest.raises(SensibertError, match="model: BertForSequenceClassification has adapters, want one without"):
        layout_of(model)
    model._hf_peft_config_loaded = False
    model.bert.encoder.layer[0].attention.self.query = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(SensibertError, match=r"layer.0 has no linear layer attention.self.query, .*adapters merged"):
        layout_of(model)


class Random:
    """A data set, and a collator, that draw from every generator of the process and from their own."""

    def __init__(self):
        self.numbers = torch.Generator().manual_seed(1)
        self.rows = rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return self.rows[index]

    def collate(self, items):
        if not hasattr(self, "late"):
            self.late = torch.Generator().manual_seed(2)
        batch = torch.utils.data.default_collate(items)
        noise = torch.rand(1, generator=self.numbers) + torch.rand(1, generator=self.late)
        swap = noise + random.random() + np.random.rand() + torch.rand(1) > 2.5  # noqa: NPY002
        return batch | {"labels": batch["labels"] ^ swap.long()}


@pytest.mark.parametrize("masking", [False, True])
def test_the_check_changes_neither_random_state_nor_the_order_of_the_data(tmp_path, monkeypatch, masking):
    def weights(folder):
        random.seed(0), np.random.seed(0)  # noqa: NPY002
        if masking:
            tokenizer = word_piece()
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
            collator = DataCollatorForLanguageModeling(tokenizer, seed=5)
            model = tiny_model(head="MaskedLM", vocab_size=len(tokenizer), hidden_dropout_prob=0.1)
            ids = torch.randint(5, len(tokenizer), (32, 9), generator=torch.Generator().manual_seed(0))
            data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
        else:
            data, model = Random(), tiny_model(hidden_dropout_prob=0.1)
            collator = data.collate
        trained(model, folder, TrimCallback(config(method="magnitude")), data, collator=collator)
        return model.state_dict()

    with_check = weights(tmp_path / "a")
    monkeypatch.setattr("sensibert.callback.check_analysis", lambda *args: None)
    without = weights(tmp_path / "b")
    assert all(torch.equal(with_check[name], without[name]) for name in without)


class Drawing:
    """A data set that draws from generators of its own."""

    def __init__(self):
        self.one, self.two, self.three = random.Random(1), np.random.default_rng(2), np.random.RandomState(3)
        self.rows = rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row, drawn = self.rows[index], self.one.random() + self.two.random() + self.three.rand()
        return row | {"labels": row["labels"] ^ int(drawn > 1.5)}


def collators():
    def flipped(generator, items):
        batch = torch.utils.data.default_collate(items)
        return batch | {"labels": batch["labels"] ^ generator.randint(0, 1)}

    generator = random.Random(4)
    return {"partial": functools.partial(flipped, random.Random(4)), "closure": lambda items: flipped(generator, items)}


@pytest.mark.parametrize("kind", ["data", "partial", "closure"])
def test_the_check_leaves_generators_that_others_hold_as_they_were(tmp_path, monkeypatch, kind):
    def weights(folder):
        data = Drawing() if kind == "data" else rows()
        collator, model = collators().get(kind), tiny_model()
        more = {"remove_unused_columns": False}
        callback = TrimCallback(config(method="magnitude", compensate=False))
        trained(model, folder, callback, data, collator=collator, **more)
        return model.state_dict()

    with_check = weights(tmp_path / "a")
    monkeypatch.setattr("sensibert.callback.check_analysis", lambda *args: None)
    without = weights(tmp_path / "b")
    assert all(torch.equal(with_check[name], without[name]) for name in without)


class OwnBase(BertModel):
    """An encoder with its own head in its forward: a base model whose first output is not its hidden states."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.head(super().forward(input_ids, attention_mask, **kwargs)[0][:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Lora(nn.Linear):
    """Weights beside the weight, in a subclass of nn.Linear."""

    def __init__(self):
        super().__init__(32, 64)
        self.lora_A = nn.Parameter(torch.zeros(2, 32))


def with_layer(path, change):
    model = tiny_model()
    parent, _, name = path.rpartition(".")
    owner = model.bert.encoder.layer[0].get_submodule(parent)
    setattr(owner, name, change(getattr(owner, name)))
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OwnBase(tiny_config()), "OwnBase fails there .*want a base_model that runs by itself"),
        (lambda: with_layer("intermediate.dense", lambda old: Lora()), "dense has the parameter lora_A, want a plain"),
        (lambda: with_layer("output.dense", nn.utils.parametrizations.weight_norm), "has the parameter parametri"),
        (
            lambda: with_layer("output.dense", lambda old: nn.utils.prune.l1_unstructured(old, "weight", 0.5)),
            "has the parameter weight_orig, want a plain linear layer: .*prune.remove",
        ),
    ],
    ids=["own base", "LoRA", "weight norm", "pruned"],
)
def test_what_the_trim_could_not_cut_or_check_is_refused_before_the_first_step(tmp_path, make, message):
    with pytest.raises(SensibertError, match=message):
        trained(make(), tmp_path, TrimCallback(config(method="magnitude")), save_strategy="no")


def test_a_smaller_word_table_than_the_config_says_is_no_fault(tmp_path):
    model = tiny_model()
    model.bert.embeddings.word_embeddings = nn.Embedding(62, 32)
    data = [row | {"input_ids": row["input_ids"].clamp(max=61)} for row in rows()]
    trained(model, tmp_path, TrimCallback(config(method="magnitude")), data)


def test_the_optimizer_of_another_model_is_refused(tmp_path):
    model, other = tiny_model(), tiny_model()
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[TrimCallback(config(method="magnitude"))],
        optimizers=(torch.optim.AdamW(other.parameters()), None),
    )
    with pytest.raises(SensibertError, match="the optimizer holds none of the tensors to cut, want that of this model"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_method_with_labels_and_compensation_needs_both_losses(tmp_path):
    callback = TrimCallback(config(method="taylor", compensate=True))
    with pytest.raises(SensibertError, match="returned no loss.*want labels and a model that returns their loss"):
        trained(tiny_model(), tmp_path, callback, without_labels(), OwnLoss)
