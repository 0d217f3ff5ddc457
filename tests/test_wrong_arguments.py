"""Every public function refuses arguments of another kind in words that name the argument and what came."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, TrainingArguments

import sensibert as s
from sensibert.models import sites
from sensibert.sensitivity import collect_factors, rank_tensors

from .helpers import tiny_model

IDS = torch.randint(3, 20, (2, 6))
BATCH = {"input_ids": IDS, "labels": torch.tensor([0, 1])}


@pytest.fixture(scope="module")
def made():
    """A model with artifacts of it. Nobody may change them."""
    model = tiny_model(head="SequenceClassification")
    scores = s.analyze(model, method="magnitude")
    blocks = s.analyze(model, method="magnitude", grid=s.Grid.element())
    return SimpleNamespace(
        model=model,
        layout=s.layout_of(model),
        scores=scores,
        plan=s.allocate(scores, "50%params", 8),
        block_plan=s.allocate(blocks, "50%params"),
    )


def refused(message: str, function, *args, **kwargs) -> None:
    with pytest.raises(s.SensibertError, match=message) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


NO_MODEL = {
    "nothing": None,
    "a name": "bert-base-uncased",
    "a class": GPT2Model,
    "a config": GPT2Config(),
    "another module": nn.Linear(4, 4),
    "another family": GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)),
    "a compiled model": torch.compile(nn.Linear(4, 4)),
    "a wrapped model": nn.DataParallel(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", NO_MODEL)
def test_what_is_no_model_of_a_family_is_refused_everywhere(name, made, tmp_path):
    wrong, named = NO_MODEL[name], r"\bmodel\b.*(want|is not supported)"
    refused(named, s.layout_of, wrong)
    refused(named, sites, wrong)
    refused(named, s.analyze, wrong, [BATCH])
    refused(named, rank_tensors, wrong, [BATCH])
    refused(named, collect_factors, wrong, made.layout, [BATCH], s.sampled_loss)
    refused(named, s.trim, wrong, made.plan)
    refused(named, s.trim, wrong, made.block_plan)
    refused(named, s.export, wrong, tmp_path / "out")
    refused(named, s.TrimCallback().prepare, wrong)
    if not isinstance(wrong, nn.Module):
        refused(named, s.replace, wrong)
        refused(named, s.restore, wrong)
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        refused(named, s.finetune, wrong, [BATCH], None, arguments)
        if wrong is not None:  # Trainer's own message: a model_init may take its place
            refused(named, s.TrimTrainer, wrong, arguments)


BATCHES = {
    "a tuple": ([BATCH, (IDS, IDS)], r"batches\[1\] is a tuple, want a dict of tensors"),
    "a list": ([[IDS]], r"batches\[0\] is a list, want a dict of tensors"),
    "a tensor": ([IDS], r"batches\[0\] is a Tensor, want a dict"),
    "one batch": (BATCH, r"batches\[0\] is 'input_ids', want a dict"),
    "no inputs": ([{}], r"batches\[0\] is empty, want a dict"),
    "lists": ([{"input_ids": [[3, 4]]}], r"batches\[0\]\['input_ids'\] is a list, want a tensor"),
    "text": ([{"text": "hello"}], r"batches\[0\]\['text'\] is 'hello', want a tensor"),
    "a number": ([{"input_ids": torch.tensor(3)}], r"\['input_ids'\] is a single number, want a tensor with one row"),
    "ids out of range": (
        [{"input_ids": IDS + 10**6}],
        r"batches\[0\]: the model cannot run on input_ids \[2, 6\] \(IndexError",
    ),
    "floats": ([{"input_ids": IDS.float()}], r"batches\[0\]: the model cannot run on input_ids"),
    "labels of other rows": (
        [{**BATCH, "labels": torch.tensor([0])}],
        r"cannot run on input_ids \[2, 6\], labels \[1\]",
    ),
    "nothing": ([], "batches is empty, want at least one micro-batch"),
    "a whole number": (3, "batches is 3, want an Iterable"),
    "None": (None, "batches is None, want an Iterable"),
    "a file name": ("train.csv", "batches is 'train.csv', want an Iterable"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_no_dicts_of_tensors_are_named(name, made):
    batches, message = BATCHES[name]
    refused(message, rank_tensors, made.model, batches)
    refused(message, collect_factors, made.model, made.layout, batches, s.sampled_loss)
    for method in ("obs", "layer-obs", "fisher", "taylor", "soft_gates"):
        refused(message, s.analyze, made.model, batches, method)
    assert not made.model.training


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"method": "fishr"}, "method is 'fishr', want one of .*did you mean 'fisher'"),
        ({"method": 3}, "method is 3, want text"),
        ({"sampled_loss": "ce"}, "sampled_loss is 'ce', want a function"),
        ({"sampled_loss": lambda *_: 1.0}, "the loss is 1.0, want a scalar tensor"),
        ({"sampled_loss": lambda outputs, *_: outputs.logits}, r"the loss is a tensor of shape \(2, 2\)"),
        ({"sampled_loss": lambda outputs, *_: outputs.logits.sum().detach()}, "the loss has no gradient"),
        ({"seed": "x"}, "seed is 'x', want a whole number"),
        ({"seed": 1.5}, "seed is 1.5, want a whole number"),
        ({"autocast": "bf16"}, "autocast is 'bf16', want a torch.dtype or None"),
        ({"grid": "element"}, "grid is 'element', want a Grid or None"),
        ({"grid": (1, 1)}, "grid is a tuple, want a Grid"),
        ({"factors": {}}, "factors lack encoder.layer"),
        ({"factors": {"a": 1}}, r"factors\['a'\] is 1, want a FisherFactors"),
    ],
)
def test_another_argument_of_analyze_is_named(wrong, message, made):
    if "factors" in wrong and not wrong["factors"]:
        wrong = {"factors": {"another": collect_factors(made.model, made.layout, [BATCH], None)[made_consumer(made)]}}
    refused(f"analyze: .*{message}", s.analyze, made.model, [BATCH], **wrong)


def made_consumer(made) -> str:
    return made.layout.sites[0].consumer.parameter


@pytest.mark.parametrize("budget", [0.5, None, 50, True, (0.5, "params"), ["50%params"], "50%", "half", "", "0%params"])
def test_what_is_no_budget_is_refused_everywhere(budget, made):
    for take in (
        lambda: s.allocate(made.scores, budget),
        lambda: s.TrimConfig(budget=budget),
        lambda: s.TrimConfig.from_settings({"budget": budget}),
        lambda: s.Options.from_settings(budget=budget),
        lambda: s.Budget.parse(budget),
    ):
        refused("budget(:| is) .*want", take)
    refused("TrimCallback: config is|budget: ", s.TrimCallback, budget)
    if not isinstance(budget, float):
        refused("Budget: value is .*, want", s.Budget, budget, "params", True)


@pytest.mark.parametrize(
    "fields, message",
    [
        (("50%params",), "value is '50%params', want a number; Budget.parse reads a text"),
        ((0.5,), "kind is '', want one of params, flops"),
        ((0.5, "parms", True), ".*did you mean 'params'"),
        ((50.0, "params", True), r"value is 50.0, want a fraction in \(0, 1\]"),
        ((float("nan"), "params", False), "value is nan, want more than 0"),
        ((0.5, "params", "yes"), "relative is 'yes', want true or false"),
        ((0.5, "params", True, "head"), "scope is 'head'"),
        ((0.5, "flops", True, "encoder", 0), "length is 0, want at least 1"),
    ],
)
def test_a_field_of_a_budget_is_named(fields, message):
    refused(f"Budget: {message}", s.Budget, *fields)


def test_one_artifact_in_the_place_of_another_is_named(made):
    refused("allocate: sensitivity is a UnitPlan, want a Sensitivity", s.allocate, made.plan, "50%params")
    refused("allocate: sensitivity is 'scores', want a Sensitivity", s.allocate, "scores", "50%params")
    refused("trim: plan is a Sensitivity, want a Plan", s.trim, made.model, made.scores)
    refused("trim: plan is a dict, want a Plan", s.trim, made.model, made.plan.keep)
    refused("trim: optimizer is 'adam', want an Optimizer", s.trim, made.model, made.plan, "adam")
    refused("finetune_and_trim: options is a dict, want an Options", s.finetune_and_trim, {"model": "a"})
    refused("Options.*trim is '50%params', want a TrimConfig|trim is", s.Options, trim="50%params")
    refused("collect_factors: layout is a UnitPlan", collect_factors, made.model, made.plan, [BATCH], None)
    other = s.layout_of(tiny_model(head="SequenceClassification", num_hidden_layers=1))
    refused("collect_factors: layout is that of another", collect_factors, made.model, other, [BATCH], None)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda keep, name: {}, r"keep lacks 'layer.0.ffn', want one mask for each of 4"),
        (lambda keep, name: keep | {"z": keep[name]}, "keep has 'z', which is not in the layout"),
        (lambda keep, name: keep | {name: keep[name][:1]}, r"keep\['layer.0.head'\] is torch.bool \(1,\), want"),
        (lambda keep, name: keep | {name: keep[name].int()}, r"keep\['layer.0.head'\] is torch.int32 \(4,\)"),
        (lambda keep, name: keep | {name: keep[name].tolist()}, r"keep\['layer.0.head'\] is a list, want a tensor"),
        (lambda keep, name: None, "keep is None, want a dict"),
    ],
)
def test_masks_that_do_not_fit_the_layout_make_no_plan(change, message, made):
    keep = change(dict(made.plan.keep), "layer.0.head")
    refused(f"UnitPlan: {message}", dataclasses.replace, made.plan, keep=keep)


def test_fields_of_artifacts_are_named(made):
    refused("BlockPlan: keep", s.BlockPlan, made.layout, made.plan.keep, made.plan.budget, "x", grid=s.Grid.element())
    refused("UnitPlan: keep", dataclasses.replace, made.plan, keep=made.block_plan.keep)
    refused("BlockPlan: grid is 'element', want a Grid", dataclasses.replace, made.block_plan, grid="element")
    refused("UnitPlan: budget is '50%params', want a Budget", dataclasses.replace, made.plan, budget="50%params")
    refused("Sensitivity: layout is a Bert", dataclasses.replace, made.scores, layout=made.model)
    refused(r"Sensitivity: scores\['a'\] is a list", dataclasses.replace, made.scores, scores={"a": [1.0]})
    refused("scope is 'head', want one of encoder, model", made.plan.cost, "head")
    refused("length is 0, want at least 1", made.block_plan.cost, "model", 0)
    refused("kept: name is 'z', want one of", made.plan.kept, "z")
    refused("site is 'z', want one of", made.layout.site, "z")
    refused("predicted_rise: gone is 'x', want a whole number", made.scores.predicted_rise, "layer.0.ffn", "x")


@pytest.mark.parametrize("path", [None, 3, ["a"], b"a", "", "gone"])
@pytest.mark.parametrize("kind", [s.Sensitivity, s.Plan, s.UnitPlan, s.BlockPlan])
def test_what_is_no_file_of_an_artifact_is_refused(kind, path, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("load: path is|not a readable sensibert", kind.load, path)
    refused("load: path is|no folder|not a model folder", s.load, path)
    refused("path|not a readable|want", s.load_structure, path)
    if not isinstance(path, str):
        refused("save: path is .*, want text or a path", made.plan.save, path)
        refused("export: path is .*, want text or a path", s.export, made.model, path)


@pytest.mark.parametrize("text", [None, 3, "", "3x", ["row"], "rows:", b"row"])
def test_what_is_no_grid_is_refused(text):
    refused("Grid: text is .*, want", s.Grid.parse, text)
    refused("grid is .*, want (text|one of unit, element, block64)", s.TrimConfig, grid=text)


def test_sizes_of_a_grid_and_settings_of_a_schedule_are_named():
    for size in (-1, 1.5, "a", None, True):
        refused("Grid: block_rows is .*, want a whole number >= 0", s.Grid, size, 1)
    refused("Schedule.cuts: total is 'x', want a whole number", s.Schedule().cuts, "x")
    refused("schedule is 'cubik', want one of oneshot, cubic; did you mean 'cubic'", s.Schedule, "cubik")
    refused("schedule is 'cubic', want a Schedule", s.TrimConfig, schedule="cubic")


@pytest.mark.parametrize("kind", [s.TrimConfig, s.Options])
def test_settings_that_are_unknown_or_no_mapping_are_named(kind):
    for settings in (3, "budget", ["a"], [("budget", 1)]):
        refused("settings is .*, want a Mapping", kind.from_settings, settings)
    refused("budgt is no setting of .*did you mean 'budget'", kind.from_settings, {"budgt": "50%params"})
    refused("trim_strat is no setting of .*did you mean 'trim_start'", kind.from_settings, {"trim_strat": 0.1})
    refused("settings: a name is 3, want text", kind.from_settings, {3: 4})


def test_arguments_of_training_are_named(made, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    rows = [{"input_ids": IDS[0], "labels": torch.tensor(0)}] * 4
    refused("finetune: arguments is a dict, want a TrainingArguments", s.finetune, made.model, rows, None, {})
    refused("finetune: train is 'train.csv', want", s.finetune, made.model, "train.csv", None, arguments)
    refused("finetune: train is empty", s.finetune, made.model, [], None, arguments)
    refused("finetune: collator is 3, want a function", s.finetune, made.model, rows, 3, arguments)
    refused("finetune: callbacks is a TrimC", s.finetune, made.model, rows, None, arguments, s.TrimCallback())
    refused("teacher is a Bert.*, want a function", s.finetune, made.model, rows, None, arguments, teacher=made.model)
    refused("distil is 0.5, want a Distillation", s.finetune, made.model, rows, None, arguments, distil=0.5)
    for wrong in ({"loss": 3}, {"before_cut": 3}, {"choose": made.plan}, {"save_before_cut": "x"}):
        refused(f"TrimCallback: {next(iter(wrong))} is .*, want", s.TrimCallback, **wrong)
    refused("args is 3, want TrainingArguments", s.optimizer_cls_and_kwargs, 3)


def test_arguments_of_masked_layers_are_named(made):
    for keep, message in (
        ({"nope": (None, s.Grid.row())}, "'nope', which the model does not have"),
        ({"classifier": s.Grid.row()}, r"keep\['classifier'\] is a Grid, want \(a tensor or None, a Grid\)"),
        ({"classifier": (None, "row")}, r"keep\['classifier'\]\[1\] is 'row', want a Grid"),
        ({"classifier": ([True], s.Grid.row())}, r"keep\['classifier'\]\[0\] is a list, want a tensor"),
        (["classifier"], "keep is a list, want a Mapping"),
    ):
        refused(f"replace: .*{message}", s.replace, made.model, keep)
    refused("MaskedLinear: grid is 'row', want a Grid", s.MaskedLinear, 4, 4, grid="row")
    refused("MaskedLinear: keep is 3, want a tensor", s.MaskedLinear(4, 4).set_keep, 3)
    refused("from_linear: linear is None, want a Linear", s.MaskedLinear.from_linear, None)


def test_arguments_of_ops_are_named():
    w, keep, grid = torch.ones(3, 4), torch.ones(3, 1, dtype=torch.bool), s.Grid.row()
    refused("masked_linear: x is None, want a tensor", s.masked_linear, None, w, None, keep, grid)
    refused("masked_linear: grid is 'row', want a Grid", s.masked_linear, w, w, None, keep, "row")
    refused("masked_linear: bias is a list", s.masked_linear, w, w, [1], keep, grid)
    refused("gather_kept: weights is None", s.gather_kept, None, [None], [None])
    refused(r"gather_kept: rows\[0\] is a list, want a tensor", s.gather_kept, [w], [[0, 1]], [None])
    refused("select_threshold: scores is a Tensor, want a Sequence", s.select_threshold, w, 1)
    refused("block_sensitivity: grids is 'row', want", s.block_sensitivity, [w], [w], "row")
    refused("block_sensitivity: weights is a Tensor, want a Sequence", s.block_sensitivity, w, w, grid)
    refused("MaskedAdamW: lr is 'x', want", s.MaskedAdamW, [nn.Parameter(w)], lr="x")
    parameter = nn.Parameter(w.clone())
    optimizer = s.MaskedAdamW([parameter])
    refused("set_keep: keep is a list", optimizer.set_keep, parameter, [1], grid)
    refused("slice_state: optimizer is None", s.slice_state, None, parameter, parameter, {})
    refused(r"slice_state: index\[0\] is a list", s.slice_state, optimizer, parameter, parameter, {0: [0, 1]})
    refused("slice_state: index is .*axis 5", s.slice_state, optimizer, parameter, parameter, {5: torch.tensor([0])})
    refused("analyze: the model returns a Tensor, want a mapping with logits", s.sampled_loss, w, {})
    refused("sampled_loss: logits are", s.sampled_loss, {"logits": torch.ones(3)}, {})


def test_a_missing_argument_keeps_the_message_of_python(made):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'budget'"):
        s.allocate(made.scores)
