"""The command line as its users meet it: six commands, their files, their tables and their JSON."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

import sensibert
from sensibert import Options, Schedule, TrimConfig
from sensibert.core.settings import settings_of
from sensibert.data.tasks import PRESETS, TASKS
from sensibert.models import layout_of
from tests import runs
from tests.runs import RESULT_KEYS, command, tree

COMMANDS = ("finetune", "analyze", "plan", "trim", "eval", "inspect")
SIZES = {f"{name}_{when}" for name in ("encoder_params", "total_params", "flops") for when in ("before", "after")}
KEYS = {
    "finetune": RESULT_KEYS,
    "analyze": {"task", "model", "method", "grid", "seed", "samples", "encoder_params_before", "tensors", "curves"}
    | {"output"},
    "plan": {"method", "budget", "scope", "grid", *SIZES, "flops_length", "output"},
    "trim": {"model", "method", "budget", "scope", "grid", *SIZES, "flops_length", "output"},
    "eval": {"task", "model", "encoder_params_after", "total_params_after", "metrics", "seconds"},
    "inspect": (RESULT_KEYS - {"output"}) | {"family", "layers", "tensors", "measured"},
}
pytestmark = pytest.mark.usefixtures("no_pictures")


def finetune_arguments(here, output, train="train.csv", dev="dev.csv", steps=6):
    files = ("--train-file", here / train, "--validation-file", here / dev)
    speed = ("--max-steps", steps, "--batch-size", 16, "--learning-rate", 3e-3, "--step", 4)
    return ("finetune", "--model", here / "model", "--output", output, *files, *speed)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    runs.model_folder(folder / "model")
    runs.sentence_file(folder / "train.csv", 64, seed=1)
    runs.sentence_file(folder / "dev.csv", 24, seed=2)
    return folder


@pytest.fixture(scope="module")
def chain(here):
    """The six commands one after the other, each with --json: name -> Finished."""
    scores, plan = here / "scores.safetensors", here / "plan.safetensors"
    data = ("--train-file", here / "train.csv", "--samples", 32)
    requested = {
        "finetune": (*finetune_arguments(here, here / "tuned"), "--method", "baseline"),
        "analyze": ("analyze", "--model", here / "tuned", "--output", scores, *data),
        "plan": ("plan", "--sensitivity", scores, "--budget", "40%flops", "--step", 4, "--output", plan),
        "trim": ("trim", "--model", here / "tuned", "--plan", plan, "--output", here / "small"),
        "eval": ("eval", here / "small", "--validation-file", here / "dev.csv"),
        "inspect": ("inspect", here / "small"),
    }
    return {name: command(*arguments, "--json") for name, arguments in requested.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_the_last_line_and_has_the_documented_keys(chain, name):
    done = chain[name]
    assert (done.code, done.err) == (0, "")
    assert set(done.json) == KEYS[name]
    assert len(done.out.splitlines()) > 1  # for people, above it


def test_one_name_means_one_thing_in_all_commands(chain):
    planned, small = chain["plan"].json, {name: chain[name].json for name in ("trim", "eval", "inspect")}
    for result in small.values():
        for name in SIZES & set(result):
            assert result[name] == planned[name], name
    assert planned["encoder_params_before"] == chain["finetune"].json["encoder_params_after"]
    assert planned["flops_after"] <= 0.4 * planned["flops_before"]
    assert small["inspect"]["budget"] == small["trim"]["budget"] == "40%flops"
    assert small["inspect"]["method"] == chain["analyze"].json["method"] == "obs"


def test_the_small_folder_is_what_the_commands_say(chain, here):
    model, shown = AutoModelForSequenceClassification.from_pretrained(here / "small"), chain["inspect"].json
    layout = layout_of(model)
    assert (layout.encoder_params, layout.total_params) == (shown["encoder_params_after"], shown["total_params_after"])
    kept = {site.name: site.units for site in layout.sites}
    for row in shown["layers"]:
        assert (row["heads"], row["ffn"]) == tuple(kept[f"layer.{row['layer']}.{kind}"] for kind in ("head", "ffn"))
        assert (row["heads_of"], row["ffn_of"]) == (4, 64)


def test_finetune_prints_what_it_writes_and_eval_finds_the_same(chain, here):
    printed = chain["finetune"].json
    assert json.loads((here / "tuned" / "result.json").read_text()) == printed
    again = command("eval", here / "tuned", "--validation-file", here / "dev.csv", "--json").json
    assert again["metrics"] == printed["metrics"]
    shown = command("inspect", here / "tuned", "--json").json
    assert {name: shown[name] for name in RESULT_KEYS - {"model", "output"}} == {
        name: printed[name] for name in RESULT_KEYS - {"model", "output"}
    }


def test_people_get_tables(chain):
    lines = {name: done.out.splitlines() for name, done in chain.items()}
    assert any(line.split() == ["before", "after", "left"] for line in lines["finetune"])
    assert any(line.split()[:1] == ["1"] and ".weight" in line for line in lines["analyze"])
    assert any(line.startswith("layer 1") for line in lines["plan"])
    assert any(line.startswith("flops") and line.endswith("%") for line in lines["trim"])
    assert any(line.startswith("accuracy: 0.") or line == "accuracy: 1.0000" for line in lines["eval"])
    assert "method: obs" in lines["inspect"] and any(line.startswith("layer 0") for line in lines["inspect"])


@pytest.mark.parametrize(
    "write, metrics",
    [
        pytest.param(runs.pair_file, {"accuracy", "f1", "matthews"}, id="pair"),
        pytest.param(runs.number_file, {"pearson", "spearman"}, id="regression"),
        pytest.param(runs.question_file, {"em", "f1"}, id="answers"),
        pytest.param(runs.tag_file, {"f1", "precision", "recall", "accuracy"}, id="tags"),
        pytest.param(runs.label_file, {"f1_micro", "f1_macro", "f1/anger", "f1/joy", "f1/place"}, id="labels"),
    ],
)
def test_every_task_is_guessed_tuned_trimmed_and_scored_alike(here, tmp_path, write, metrics):
    suffix = "csv" if write in (runs.pair_file, runs.number_file) else "jsonl"
    for role, seed in (("train", 1), ("dev", 2)):
        write(tmp_path / f"{role}.{suffix}", rows=24, seed=seed)
    (tmp_path / "model").symlink_to(here / "model")
    requested = finetune_arguments(tmp_path, tmp_path / "out", f"train.{suffix}", f"dev.{suffix}", steps=3)
    done = command(*requested, "--max-length", 48, "--json")
    assert (done.code, done.err) == (0, "")
    result = done.json
    assert set(result["metrics"]) == set(result["metrics_at_cut"]) == metrics
    assert result["encoder_params_after"] <= 0.5 * result["encoder_params_before"]
    scored = command(
        *("eval", tmp_path / "out", "--validation-file", tmp_path / f"dev.{suffix}", "--max-length", 48, "--json")
    ).json
    assert (scored["task"], scored["metrics"]) == (result["task"], result["metrics"])


def test_a_config_gives_defaults_and_the_command_line_wins(here, tmp_path):
    file = tmp_path / "recipe.yaml"
    settings = {"model": str(here / "model"), "train-file": str(here / "train.csv"), "budget": "40%flops", "json": True}
    file.write_text(yaml.safe_dump({**settings, "learning_rate": "2e-5", "epochs": 7, "schedule": "cubic"}))
    requested = ("finetune", "--config", file, "--output", tmp_path / "out", "--dry-run")
    shown = command(*requested, "--epochs", 2).json
    assert (shown["budget"], shown["learning_rate"], shown["schedule"]) == ("40%flops", 2e-5, "cubic")
    assert shown["epochs"] == 2
    assert command(*requested[:-1], "--epochs", 1, "--budget", "50%params", "--dry-run").json["budget"] == "50%params"


def test_every_command_reads_a_config(chain, here, tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump({"folder": str(here / "small"), "json": True}))
    assert command("inspect", "--config", file).json == chain["inspect"].json
    file.write_text(yaml.safe_dump({"sensitivity": str(here / "scores.safetensors"), "dry_run": True, "step": 4}))
    shown = command("plan", "--config", file, "--budget", "40%flops", "--json").json
    assert shown == {**chain["plan"].json, "output": None}


def test_the_recipe_of_a_run_is_a_config_that_repeats_it(chain, here, tmp_path):
    written = here / "tuned" / "recipe.json"
    done = command("finetune", "--config", written, "--output", tmp_path / "again", "--json")
    first, again = chain["finetune"].json, done.json
    same = RESULT_KEYS - {"seconds", "throughput", "latency", "output"}
    assert {name: again[name] for name in same} == {name: first[name] for name in same}
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (here / "tuned/model.safetensors").read_bytes()


def test_the_recipe_of_a_run_serves_the_other_commands_too(chain, here):
    shown = command("eval", "--config", here / "tuned" / "recipe.json", here / "tuned", "--json").json
    assert (shown["model"], shown["metrics"]) == (str(here / "tuned"), chain["finetune"].json["metrics"])


def test_a_dry_run_tells_and_writes_nothing(chain, here):
    before = tree(here)
    shown = command(*finetune_arguments(here, here / "new" / "out"), "--budget", "9Kparams", "--dry-run", "--json")
    assert (shown.code, shown.json["limit"], shown.json["family"]) == (0, 9000, "bert")
    names = ("task", "train_rows", "validation_rows", "encoder_params_before")
    assert [shown.json[name] for name in names] == ["text-classification", 64, 24, 17088]
    run = chain["finetune"].json
    assert shown.json["total_params_before"] == run["total_params_before"]  # with the head that the run would give it
    planned = command("plan", "--sensitivity", here / "scores.safetensors", "--dry-run", "--json")
    assert (planned.code, planned.json["output"]) == (0, None)
    trimmed = command(
        *("trim", "--model", here / "tuned", "--plan", here / "plan.safetensors", "--output", here / "new"),
        *("--dry-run", "--json"),
    )
    assert (trimmed.code, trimmed.json) == (0, {**chain["trim"].json, "output": None})
    assert tree(here) == before


def test_a_dry_run_of_the_baseline_names_no_cut(here, tmp_path):
    done = command(*finetune_arguments(here, tmp_path / "out"), "--method", "baseline", "--dry-run", "--json")
    assert [done.json[name] for name in ("schedule", "cut_after", "limit", "budget")] == [None] * 4
    assert "cut" not in done.out.rpartition("{")[0]


def test_a_dry_run_shows_the_limits_of_all_budgets_or_the_floor(here, tmp_path):
    given = (*finetune_arguments(here, tmp_path / "out"), "--dry-run", "--json")
    family, floor = command(*given, "--budgets", "9,8Kparams").json, command(*given, "--keep", "90%").json
    assert (family["budget"], family["budgets"], family["limit"]) == (None, "9,8Kparams", "9,000, 8,000")
    assert (floor["budget"], floor["keep"], floor["limit"], floor["baseline"]) == (None, "90%", None, True)


def test_overwrite_replaces_what_is_there(chain, here, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "old.txt").write_text("old")
    (tmp_path / "plan.safetensors").write_text("old")
    for name, arguments in {
        "plan.safetensors": ("plan", "--sensitivity", here / "scores.safetensors", "--step", 4),
        "small": ("trim", "--model", here / "tuned", "--plan", tmp_path / "plan.safetensors"),
    }.items():
        assert command(*arguments, "--output", tmp_path / name).code == 2
        assert command(*arguments, "--output", tmp_path / name, "--overwrite").code == 0
    assert command("inspect", tmp_path / "small").code == 0


def test_scores_without_data_need_none(chain, here, tmp_path):
    requested = ("analyze", "--model", here / "tuned", "--method", "magnitude", "--output", tmp_path / "m.safetensors")
    done = command(*requested, "--json")
    assert (done.code, done.json["samples"], done.json["tensors"]) == (0, 0, {})
    assert "magnitude reads no data" in done.out
    assert command("plan", "--sensitivity", tmp_path / "m.safetensors", "--step", 4, "--dry-run").code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name):
    for flag in ("--help", "-h"):
        done = command(name, flag)
        assert (done.code, done.err) == (0, "")
        assert f"  sensibert {name} " in done.out


def test_the_help_of_trim_promises_no_choice_of_a_vocabulary():
    text = " ".join(command("trim", "--help").out.replace("│", " ").split())
    assert "only the pieces of the vocabulary that they need. [default: (all)]" in text


def test_the_help_of_plan_promises_no_measurement():
    assert "measured here" not in command("plan", "--help").out


def test_the_help_of_task_names_every_task_and_preset():
    """The table of tasks needs torch, and the help must not: so this text is a copy."""
    text = settings_of(Options)["task"].metadata["help"]
    assert text == f"{', '.join(TASKS)}, or a preset: {', '.join(PRESETS)}."


def test_every_help_text_is_a_sentence_that_needs_no_other():
    for kind in (Options, TrimConfig, Schedule):
        for name, setting in settings_of(kind).items():
            text = setting.metadata["help"]
            assert text.endswith(".") and not re.search(r"\b[Tt]he same,|\ba (row|step|batch) at most", text), (
                name,
                text,
            )


def test_without_arguments_there_is_help():
    done = command()
    assert all(name in done.out for name in COMMANDS) and done.err == ""


def test_the_version_is_that_of_the_package():
    done = command("--version")
    assert (done.code, done.out, done.err) == (0, f"sensibert {sensibert.__version__}\n", "")


def test_help_is_quick_because_it_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['sensibert', 'finetune', '--help']\nfrom sensibert.cli import main\n"
        "try: main()\nfinally: print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
