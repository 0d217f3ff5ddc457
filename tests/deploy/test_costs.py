"""Costs are measured on probes, corrected by what a plan really costs, and taken to another device as probes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sensibert.allocation import allocate
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, spent
from sensibert.core.cost_table import CostTable
from sensibert.core.errors import SensibertError
from sensibert.deploy import costs
from sensibert.deploy.costs import Target, measure_costs, measured_facts, missed, settle, write_probes
from sensibert.models import layout_of
from sensibert.sensitivity import analyze
from sensibert.trimming import trim
from tests.helpers import tiny_model

FAMILIES = ("bert", "distilbert", "albert", "deberta-v2", "modernbert")


def by_parameters(models, target):
    """Stands for a clock: 100 us, and 1 us for every 10 parameters of the encoder."""
    return [100 + layout_of(model).encoder_params / 10 for model in models]


def bent(table, factor):
    """A table that is right for the untrimmed model alone."""
    heads, ffn = (
        [*((count, int(cost * factor)) for count, cost in points[:-1]), points[-1]]
        for points in (table.heads, table.ffn)
    )
    return replace(table, heads=tuple(heads), ffn=tuple(ffn))


def plan_of(model, budget):
    return allocate(analyze(model, (), "magnitude"), budget, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_predicts_costs_that_are_additive(family, monkeypatch):
    monkeypatch.setattr(costs, "costs_of", by_parameters)
    model = tiny_model(family)
    table = measure_costs(model, Target("latency"))
    budget = Budget(0.5, "latency", True, table=table)
    for plan in (plan_of(model, "50%params"), plan_of(model, budget)):
        counts = counts_of(plan.layout, plan.keep)
        trimmed = trim(tiny_model(family), plan)
        assert spent(plan.layout, counts, budget) == pytest.approx(by_parameters([trimmed], None)[0], rel=0.02)


def test_passes_are_timed_on_the_threads_that_were_asked_for_in_another_process(monkeypatch):
    """Changed and changed back in this process, the number of threads broke the analysis that followed."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("changed in this process"))
    table = measure_costs(tiny_model(), Target("latency", "torch", 2, 8, 1))
    assert table.rest >= 0 and table.heads[-1][0] == 4 and table.ffn[-1][0] == 64 and table.device
    assert (table.threads, table.batch, table.length, table.family) == (1, 2, 8, "bert")


@pytest.mark.parametrize("runtime", ["torch", "onnx-int8", "openvino"])
def test_a_table_of_sizes_tells_that_of_the_file(runtime, tmp_path):
    packages = {"torch": (), "openvino": ("openvino",)}.get(runtime, ("onnx", "onnxscript", "onnxruntime"))
    for package in packages:
        pytest.importorskip(package)
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = tiny_model(**sizes)
    target = Target("size", runtime)
    budget = Budget(0.8, "size", True, table=measure_costs(model, target))
    plan = plan_of(model, budget)
    predicted = spent(plan.layout, counts_of(plan.layout, plan.keep), budget)
    trim(model, plan)
    actual = costs.costs_of([model], target)[0]
    assert actual == pytest.approx(predicted, rel=0.01 if runtime == "torch" else 0.1)
    if runtime == "torch":
        model.save_pretrained(tmp_path)
        assert actual == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.01)


def test_a_plan_that_costs_more_than_its_table_says_is_chosen_again(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(costs, "costs_of", by_parameters)
    wrong = bent(measure_costs(model, Target("latency")), 0.6)
    budget = Budget(1200, "latency", table=wrong)
    first = plan_of(model, budget)
    assert by_parameters([trim(tiny_model(), first)], None)[0] > 1.2 * 1200
    plan = settle(model, first, lambda budget: plan_of(model, budget), Target("latency"))
    measured = by_parameters([trim(tiny_model(), plan)], None)[0]
    assert 0.9 * 1200 <= measured <= 1.05 * 1200
    assert plan.budget.value == 1200 and plan.budget.table != wrong


def test_a_budget_that_is_out_of_reach_after_all_keeps_the_smallest_plan_that_the_table_had(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(costs, "costs_of", by_parameters)
    wrong = replace(bent(measure_costs(model, Target("latency")), 0), rest=1)
    first = plan_of(model, Budget(100, "latency", table=wrong))
    plan = settle(model, first, lambda budget: plan_of(model, budget), Target("latency"))
    assert by_parameters([trim(tiny_model(), plan)], None)[0] > 1.05 * plan.budget.value


def test_what_a_trimmed_model_costs_is_told_in_the_unit_of_the_budget(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(costs, "costs_of", by_parameters)
    budget = Budget(1200, "latency", table=measure_costs(model, Target("latency")))
    trim(model, plan_of(model, budget))
    facts = measured_facts(model, budget)
    assert facts["unit"] == "ms" and facts["budget"] == 1.2 and facts["before"] > facts["after"]
    assert facts["after"] == pytest.approx(by_parameters([model], None)[0] / 1e3, rel=1e-3) and missed(facts) == []
    assert "more than the budget of 1.2 ms" in missed(facts | {"after": 1.3})[0]
    assert missed(facts | {"after": 1.02 * facts["budget"]}) == []
    assert missed(facts | {"after": 1.02 * facts["budget"], "unit": "MB"}) != []  # files are not noisy
    elsewhere = budget.with_table(CostTable.from_dict(budget.table.to_dict() | {"device": "a phone"}))
    facts = measured_facts(model, elsewhere)
    assert "after" not in facts and "cannot be measured on this device" in missed(facts)[0]


def test_probes_are_timed_with_the_runtime_alone(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(costs, "SHARES", (0,))
    model = tiny_model(num_hidden_layers=1)
    write_probes(model, tmp_path / "probes", Target("latency", "onnx", 1, 8))
    content = json.loads((tmp_path / "probes" / "probes.json").read_text())
    assert content["levels"] == {"heads": [0, 1, 4], "ffn": [0, 64]} and content["sites"] == {"heads": 1, "ffn": 1}
    assert len(content["files"]) == 1 + 2 + 1
    script, table = tmp_path / "probes" / "probe_timing.py", tmp_path / "table.json"
    code = "import sys, runpy; sys.modules['torch'] = sys.modules['sensibert'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), str(tmp_path / "probes"), "--save", str(table)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    made = CostTable.load(table)
    made.want_fit(layout_of(model))
    assert made.runtime == "onnx" and made.length == 8 and made.rest >= 0 and made.device


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "watts"}, "kind is 'watts', want one of latency, size"),
        ({"runtime": "tflite"}, "runtime is 'tflite', want one of torch, onnx"),
        ({"threads": 0}, "threads is 0, want at least 1"),
        ({"kind": "size", "runtime": "cuda"}, "runtime is 'cuda', which has no file of its own"),
    ],
)
def test_a_target_that_cannot_be_measured_is_refused(change, message):
    with pytest.raises(SensibertError, match=f"^{message}"):
        Target(**({"kind": "latency"} | change))


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(SensibertError, match="^latency_shape: 100000 tokens, want at most"):
        measure_costs(tiny_model(), Target("latency", length=100_000))


def test_probes_of_torch_are_refused(tmp_path):
    with pytest.raises(SensibertError, match="^runtime is 'torch', want one of onnx, onnx-int8, openvino"):
        write_probes(tiny_model(), tmp_path / "probes", Target("latency"))
    assert not (tmp_path / "probes").exists()
