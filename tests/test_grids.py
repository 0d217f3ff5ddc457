"""Whole runs on the blocks of a grid: budgets, exact zeros, resuming, folders that any transformers loads."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from sensibert.callback import TrimCallback
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.config import TrimConfig, grid_name, parse_grid
from sensibert.core.errors import SensibertError
from sensibert.core.grid import Grid
from sensibert.models import base_of
from sensibert.models.masks import masks_of
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import Options
from sensibert.saving.folder import load, load_structure
from tests import runs
from tests.helpers import tiny_batch
from tests.runs import RESULT_KEYS, command, tree

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return runs.workplace(tmp_path_factory.mktemp("grids"))


def options(here, output, **changed) -> Options:
    usual = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "quiet": True, "grid": "element"}
    files = {"train_file": here / "train.csv", "validation_file": here / "dev.csv", "model": here / "model"}
    files = {name: str(path) for name, path in files.items()}
    return Options.from_settings({"output": str(output)} | usual | files | changed)


def zeros(folder, plan: Plan) -> int:
    """Weights that are 0 in the file; every dropped one must be among them."""
    found, state = 0, load_file(folder / "model.safetensors")
    for name, keep in plan.keep.items():
        weight = state[f"bert.{name}"]
        assert (weight[~plan.grid.expand(keep, *weight.shape)] == 0).all()
        found += int((weight == 0).sum())
    return found


def test_a_run_keeps_the_budget_learns_and_every_face_of_it_agrees(here, tmp_path, report):
    result = finetune_and_trim(options(here, tmp_path / "out", epochs=4, weight_decay=0.3))
    assert set(result) == RESULT_KEYS and result["grid"] == "element"
    dense, left = result["encoder_params_before"], result["encoder_params_after"]
    assert left == dense // 2  # exactly: an element costs one
    assert result["total_params_before"] - result["total_params_after"] == dense - left
    assert result["flops_after"] == result["flops_before"]  # nobody skips single elements
    assert result["metrics"]["accuracy"] > 0.8
    plan = Plan.load(tmp_path / "out" / "plan.safetensors")
    assert (plan.params, plan.grid) == (left, Grid.element())
    assert zeros(tmp_path / "out", plan) == dense - left
    masks = load_structure(tmp_path / "out")
    assert masks.grid == plan.grid and all(torch.equal(masks.keep[name], keep) for name, keep in plan.keep.items())
    sensitivity = Sensitivity.load(tmp_path / "out" / "sensitivity.safetensors")
    assert sensitivity.grid == plan.grid and sensitivity.scores.keys() == plan.keep.keys()
    pictures = {p.name for p in (tmp_path / "out" / "report").iterdir()}
    assert pictures == {"summary.txt", "ranking.csv", "kept.png", "sensitivity.png", "run.csv", "run.png"}
    assert "encoder.layer.1.output.dense.weight" in (tmp_path / "out" / "report" / "summary.txt").read_text()

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(stock).__name__ == "BertForSequenceClassification" and masks_of(stock) is None
    masked, _ = load(tmp_path / "out")
    assert masks_of(masked).grid == plan.grid
    batch = tiny_batch(vocab_size=base_of(stock).config.vocab_size)
    torch.testing.assert_close(stock(**batch).logits, masked(**batch).logits)
    shown = command("inspect", tmp_path / "out", "--json")
    assert shown.json["encoder_params_after"] == left and shown.json["grid"] == "element"
    assert sum(row["of"] - row["kept"] for row in shown.json["tensors"]) == dense - left
    assert "encoder.layer.0.attention.self.query.weight" in shown.out
    scored = command("eval", tmp_path / "out", "--validation-file", here / "dev.csv", "--json").json
    assert scored["encoder_params_after"] == left and scored["metrics"] == result["metrics"]


@pytest.mark.parametrize("method", ["taylor", "saliency", "magnitude", "random"])
def test_every_method_and_allocation_meets_the_budget_within_a_block(here, tmp_path, method):
    allocation = "uniform" if method in ("saliency", "random") else "global"
    requested = {"grid": "block8", "method": method, "allocation": allocation, "max_steps": 4, "budget": "40%params"}
    result = finetune_and_trim(options(here, tmp_path / "out", **requested))
    room = int(0.4 * result["encoder_params_before"]) - result["encoder_params_after"]
    assert 0 <= room < 64 and result["grid"] == "block8"
    assert zeros(tmp_path / "out", Plan.load(tmp_path / "out" / "plan.safetensors")) == (
        result["encoder_params_before"] - result["encoder_params_after"]
    )


def test_flops_of_blocks_are_those_a_kernel_cannot_skip(here, tmp_path):
    result = finetune_and_trim(options(here, tmp_path / "out", grid="block8", budget="60%flops", max_steps=4))
    block = 2 * 64 * result["flops_length"]
    assert 0 <= 0.6 * result["flops_before"] - result["flops_after"] < block + 1


def test_gradient_accumulation_and_bf16_leave_the_zeros_alone(here, tmp_path):
    requested = {"gradient_accumulation": 2, "precision": "bf16", "epochs": 1, "grid": "block8", "weight_decay": 0.3}
    result = finetune_and_trim(options(here, tmp_path / "out", **requested))
    gone = result["encoder_params_before"] - result["encoder_params_after"]
    assert result["steps"] == 5
    assert zeros(tmp_path / "out", Plan.load(tmp_path / "out" / "plan.safetensors")) == gone > 0


class Killed(BaseException):
    """Not an Exception: nothing on the way may swallow it."""


# In bf16 the optimizer writes the matrices that the masked layers multiply with.
@pytest.mark.parametrize(
    ("kind", "grid", "step", "precision"),
    [("oneshot", "element", 6, "fp32"), ("cubic", "block8", 4, "fp32"), ("cubic", "block8", 4, "bf16")],
)
def test_a_broken_run_resumes_to_the_same_weights(here, tmp_path, kind, grid, step, precision, monkeypatch):
    """Two epochs of five steps, cut after step 3 (cubic: 3 and 5), a checkpoint at every second step."""
    requested = {"batch_size": 32, "save_steps": 2, "schedule": kind, "milestones": 2, "grid": grid}
    requested["precision"] = precision
    finetune_and_trim(options(here, tmp_path / "whole", **requested))
    step_end = TrimCallback.on_step_end

    def dies(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == step + 1:
            raise Killed

    monkeypatch.setattr(TrimCallback, "on_step_end", dies)
    with pytest.raises(Killed):
        finetune_and_trim(options(here, tmp_path / "broken", **requested))
    monkeypatch.setattr(TrimCallback, "on_step_end", step_end)
    assert (tmp_path / "broken.partial" / f"checkpoint-{step}" / "structure.safetensors").exists()
    result = finetune_and_trim(options(here, tmp_path / "broken", resume=True, **requested))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    plan = Plan.load(tmp_path / "broken" / "plan.safetensors")
    assert plan == Plan.load(tmp_path / "whole" / "plan.safetensors")
    assert zeros(tmp_path / "broken", plan) == result["encoder_params_before"] - result["encoder_params_after"]


def test_the_verbs_speak_of_grids_from_file_to_file(here, tmp_path):
    tuned = runs.model_folder(tmp_path / "tuned", head="SequenceClassification")
    scores, plan, small = tmp_path / "scores.safetensors", tmp_path / "plan.safetensors", tmp_path / "small"
    data = ("--train-file", here / "train.csv", "--samples", 16)
    found = command("analyze", "--model", tuned, "--output", scores, "--grid", "block8", *data, "--json")
    assert (found.code, found.json["grid"]) == (0, "block8"), found.err
    planned = command("plan", "--sensitivity", scores, "--budget", "50%params", "--output", plan, "--json")
    assert (planned.code, planned.json["grid"]) == (0, "block8"), planned.err
    cut = command("trim", "--model", tuned, "--plan", plan, "--output", small, "--json")
    shown = command("inspect", small, "--json").json
    for name in ("encoder_params_after", "total_params_after", "flops_after", "grid"):
        assert planned.json[name] == cut.json[name] == shown[name], name
    assert zeros(small, Plan.load(plan)) == shown["encoder_params_before"] - shown["encoder_params_after"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--grid", "rows"), "grid is 'rows', want one of unit, element, block64 (or another block<size>)"),
        (("--grid", "block0"), "grid is 'block0', want one of unit"),
        (("--grid", "element", "--budget", "50%flops"), "no kernel skips single elements, want params"),
        (
            ("--grid", "element", "--method", "paper"),
            "method is 'soft_gates', which needs whole units, and grid is",
        ),
        (("--grid", "block64", "--method", "obs"), "method is 'obs', which needs whole units, and grid is 'block64'"),
        (("--grid", "block64", "--step", "4"), "width_multiple is 4, which needs whole units, and grid is 'block64'"),
        (("--grid", "block64", "--compensate"), "compensate is True, which needs whole units"),
        (("--grid", "element", "--budget", "3params"), "cannot be trimmed; the smallest reachable budget is"),
    ],
)
def test_what_a_grid_cannot_do_is_one_line_and_leaves_nothing(here, tmp_path, changed, message):
    before = tree(tmp_path)
    files = ("--train-file", here / "train.csv", "--model", here / "model", "--output", tmp_path / "out")
    done = command("finetune", *files, *changed)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert tree(tmp_path) == before


def test_a_model_that_lost_units_takes_no_grid(here, tmp_path):
    finetune_and_trim(options(here, tmp_path / "small", grid="unit", width_multiple=4, max_steps=2, method="magnitude"))
    with pytest.raises(SensibertError, match="units were removed already, want an untrimmed model for grid element"):
        finetune_and_trim(options(here, tmp_path / "out", model=str(tmp_path / "small")))


def test_grids_have_names():
    for name in ("unit", "element", "block64", "block7"):
        assert grid_name(parse_grid(name)) == name
    assert parse_grid("block64") == Grid(64, 64) and grid_name(Grid(64, 32)) == "64x32"
    assert json.loads(json.dumps(TrimConfig(grid="block8").settings()))["grid"] == "block8"


def test_a_callback_is_told_that_blocks_have_nothing_to_take_over():
    with pytest.raises(SensibertError, match="compensate is True, which needs whole units, and grid is 'element'"):
        TrimCallback(TrimConfig(compensate=True, grid="element"))
