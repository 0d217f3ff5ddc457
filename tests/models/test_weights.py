"""A file whose weights are not the model's is refused, or read with what a wrapper added taken off."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import sensibert
from sensibert import SensibertError
from sensibert.models import layout_of
from sensibert.models.weights import from_pretrained
from sensibert.trimming.trim import trim
from tests import runs
from tests.helpers import tiny_batch, tiny_model
from tests.plans import random_plan
from tests.runs import command

FAMILIES = ["bert", "roberta", "albert", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert", "rembert"]


def changed(folder, change, model=None, **config):
    """A model folder whose weights, {name: tensor}, were changed."""
    (tiny_model(num_labels=3) if model is None else model).save_pretrained(folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def without(*parts):
    return lambda weights: {n: w for n, w in weights.items() if not any(part in n for part in parts)}


def renamed(old, new):
    return lambda weights: {n.replace(old, new): w for n, w in weights.items()}


def prefixed(prefix):
    return lambda weights: {prefix + n: w for n, w in weights.items()}


def adapted(weights):
    queries = {name: weight for name, weight in weights.items() if "query.weight" in name}
    return weights | {name.replace("weight", "lora_A.weight"): weight.clone() for name, weight in queries.items()}


def said(caplog):
    """Our warnings, without the folder at their beginning."""
    return [record.getMessage().partition(": ")[2] for record in caplog.records if record.name == "sensibert"]


BROKEN = [
    (without("word_embeddings"), r"its weights lack bert.embeddings.word_embeddings.weight$"),
    (without("layer.1"), r"lack bert.encoder.layer.1.attention.output.LayerNorm.bias and 15 more$"),
    (without("embeddings", "layer"), "its weights lack bert.embeddings.LayerNorm.bias"),
    (prefixed("unknown."), "its weights lack bert.embeddings.LayerNorm.bias"),
    (renamed("query.weight", "query.weight_orig"), "lack bert.*query.weight and 1 more; call torch.nn.utils.prune.rem"),
    (renamed("key.weight", "key.parametrizations.weight.original"), "lack bert.*key.weight and .*parametrize.remove_"),
    (renamed("value.", "value.base_layer."), r"lack .*value.bias and 3 more; call merge_and_unload\(\) before saving"),
    (adapted, r"have .*query.lora_A.weight, which a Bert.* has not; call merge_and_unload\(\) before saving"),
]
NAMES = ["no words", "no layer", "nothing", "unknown prefix", "pruned", "parametrized", "PEFT", "adapter"]


def test_integers_and_adapters_beside_the_weights_are_refused(tmp_path):
    def rounded(weights):
        return {n: (w * 50).round().to(torch.int8) if "query.weight" in n else w for n, w in weights.items()}

    def adapted_head(weights):
        return weights | {"classifier.lora_A.weight": torch.zeros(2, 2)}

    for name, change, message in (
        ("int8", rounded, "have .*query.weight as I8, want floating-point numbers"),
        ("head", adapted_head, r"have classifier.lora_A.weight, .*call merge_and_unload\(\) before saving"),
        ("adapter", dict, r"has an adapter beside its weights; call merge_and_unload\(\)"),
    ):
        folder = changed(tmp_path / name, change)
        if name == "adapter":
            (folder / "adapter_config.json").write_text("{}")
        for load in (sensibert.load, lambda path: from_pretrained(AutoModelForSequenceClassification, path, True)):
            with pytest.raises(SensibertError, match=message):
                load(folder)


@pytest.mark.parametrize("new_head", [True, False])
@pytest.mark.parametrize("change, message", BROKEN, ids=NAMES)
def test_a_file_that_lacks_weights_is_refused_by_the_first(tmp_path, change, message, new_head):
    folder = changed(tmp_path / "m", change)
    with pytest.raises(SensibertError, match=message):
        from_pretrained(AutoModelForSequenceClassification, folder, new_head)
    with pytest.raises(SensibertError, match=message):
        sensibert.load(folder)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_hidden_layers": 1}, "its weights have bert.encoder.layer.1.*, which a BertForSequenceClassif.* has not"),
        ({"num_hidden_layers": 3}, "its weights lack bert.encoder.layer.2"),
        (
            {"intermediate_size": 32},
            r"dense.bias is \(64,\) in its weights, and \(32,\) by its config.json",
        ),
        ({"vocab_size": 9}, r"word_embeddings.weight is \(64, 32\) in its weights, and \(9, 32\) by its config.json"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, config, message):
    with pytest.raises(SensibertError, match=message):
        from_pretrained(AutoModelForSequenceClassification, changed(tmp_path / "m", dict, **config), True)


def test_a_head_may_be_new_only_where_it_is_trained(tmp_path, caplog):
    folder = changed(tmp_path / "m", without("classifier"))
    with pytest.raises(SensibertError, match="its weights lack classifier.bias and 1 more"):
        sensibert.load(folder)
    from_pretrained(AutoModelForSequenceClassification, folder, True)
    assert said(caplog) == ["its weights lack classifier.bias: a new head is trained"]
    caplog.clear()
    whole = changed(tmp_path / "whole", dict)
    model = from_pretrained(AutoModelForSequenceClassification, whole, True, num_labels=2)
    assert model.classifier.out_features == 2
    assert said(caplog) == ["its head has 3 outputs and the task 2: a new head is trained"]
    with pytest.raises(
        SensibertError, match=r"classifier.bias is \(3,\) in its weights, and \(2,\) by its config.json"
    ):
        from_pretrained(AutoModelForSequenceClassification, whole, False, num_labels=2)


def test_a_pooler_that_no_head_reads_may_be_missing_which_is_said(tmp_path, caplog):
    folder = changed(tmp_path / "m", without("pooler"), tiny_model(head=""))
    sensibert.load(folder)
    assert said(caplog) == ["its weights lack pooler.dense.bias, which is random now"]
    headed = changed(tmp_path / "headed", without("pooler"))
    with pytest.raises(SensibertError, match=r"lack bert\.pooler\.dense\.bias and 1 more"):
        sensibert.load(headed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "0.auto_model."])
def test_the_prefix_of_a_wrapper_is_taken_off_and_said(tmp_path, caplog, family, prefix):
    model = tiny_model(family, num_labels=3)
    folder = changed(tmp_path / "m", prefixed(prefix), model)
    loaded = from_pretrained(AutoModelForSequenceClassification, folder)
    torch.testing.assert_close(loaded(**tiny_batch()).logits, model(**tiny_batch()).logits)
    messages = [f"the prefix {prefix!r} of its weights was taken off"]
    assert said(caplog) == messages or (family, prefix) == ("modernbert", "model.")  # transformers reads that one


@pytest.mark.parametrize("prefix, refused", [("module.", False), ("unknown.", True)])
def test_the_prefix_is_taken_off_a_trimmed_model_too(tmp_path, caplog, prefix, refused):
    model = tiny_model()
    trim(model, random_plan(layout_of(model)))
    folder = changed(tmp_path / "m", prefixed(prefix), model)
    if refused:
        with pytest.raises(SensibertError, match="lacks .* weights of its encoder"):
            sensibert.load(folder)
        return
    loaded, _ = sensibert.load(folder)
    assert torch.equal(loaded(**tiny_batch()).logits, model(**tiny_batch()).logits)
    assert said(caplog) == ["the prefix 'module.' of its weights was taken off"]


def test_what_ought_to_be_there_is_taken_as_it_is(tmp_path, caplog):
    for family in FAMILIES:
        for head in ("SequenceClassification", "TokenClassification", "MaskedLM", ""):
            model = tiny_model(family, head)
            model.save_pretrained(tmp_path / f"{family}{head}")
            loaded, _ = sensibert.load(tmp_path / f"{family}{head}")
            torch.testing.assert_close(loaded(**tiny_batch())[0], model(**tiny_batch())[0])
            from_pretrained(AutoModelForSequenceClassification, tmp_path / f"{family}{head}", True)
            from_pretrained(AutoModel, tmp_path / f"{family}{head}", True)
    assert all("lack pooler" in message for message in said(caplog))


def test_every_command_refuses_a_file_that_lacks_a_layer_and_reads_one_of_a_wrapper(tmp_path, no_pictures):
    runs.sentence_file(tmp_path / "rows.csv", 24)
    files, out = {"--train-file": tmp_path / "rows.csv"}, tmp_path / "out"
    for name, change in (("broken", without("layer.1")), ("wrapped", prefixed("module."))):
        folder = tmp_path / name
        runs.model_folder(folder, head="SequenceClassification", num_labels=2)
        changed(folder, change, sensibert.load(folder)[0])
    runs.model_folder(tmp_path / "sound", head="SequenceClassification", num_labels=2)
    scores, plan = tmp_path / "scores", tmp_path / "plan"
    random = ("--method", "random", "--output", scores)
    assert command("analyze", "--model", tmp_path / "sound", *random).code == 0
    assert command("plan", "--sensitivity", scores, "--width-multiple", 4, "--output", plan).code == 0
    scores.unlink()

    def calls(folder, teacher):
        train = ("--max-steps", 3, "--batch-size", 8, "--width-multiple", 4, *(p for f in files.items() for p in f))
        yield "finetune", "--model", folder, *train, "--output", out
        yield "finetune", "--model", tmp_path / "sound", "--teacher", teacher, *train, "--output", tmp_path / "taught"
        yield "analyze", "--model", folder, *random
        yield "trim", "--model", folder, "--plan", plan, "--output", tmp_path / "trimmed"
        yield "eval", folder, "--validation-file", tmp_path / "rows.csv"
        yield "inspect", folder

    for call in calls(tmp_path / "broken", tmp_path / "broken"):
        done = command(*call)
        assert done.code == 2 and "lack bert.encoder.layer.1" in done.err and len(done.err.splitlines()) == 1, done
    for call in calls(tmp_path / "wrapped", tmp_path / "wrapped"):
        assert command(*call).code == 0, call
    ours, plain = (
        command("eval", tmp_path / n, "--validation-file", tmp_path / "rows.csv").out for n in ("wrapped", "sound")
    )
    assert ours == plain
