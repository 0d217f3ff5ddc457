"""Every kind of bad input ends in exit code 2 and one line that says what to do, and leaves the disk as it was."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from sensibert import SensibertError, load
from sensibert.optim import MaskedAdamW
from tests import runs
from tests.refusals import finetune_arguments, folders, refused, untouched
from tests.runs import command

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("bad"))


def test_an_unknown_family_lists_the_known_ones(here, tmp_path):
    for kind, message in (
        ("gpt2", r"family 'gpt2' is not supported, want one of albert, bert, .*CONTRIBUTING"),
        ("zz", "zz"),
    ):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        with untouched(here, tmp_path):
            refused(message, *finetune_arguments(here, tmp_path / "out", model=tmp_path / kind))
            refused(message, "inspect", tmp_path / kind)
            refused(message, "analyze", "--model", tmp_path / kind, "--method", "magnitude", "--output", tmp_path / "s")


def test_code_in_a_model_folder_is_never_run(here, tmp_path, monkeypatch):
    """transformers would ask on standard input, where a script answers yes."""
    monkeypatch.setattr("builtins.input", lambda *args: "yes")
    code = "open('ran', 'w')\nfrom transformers import PreTrainedConfig as ZzConfig\n"
    foreign = tmp_path / "foreign"
    shutil.copytree(here / "tuned", foreign)  # with weights and a tokenizer
    auto_map = {"AutoConfig": "code.ZzConfig", "AutoModel": "code.ZzModel"}
    (foreign / "config.json").write_text(json.dumps({"model_type": "zz", "auto_map": auto_map}))
    (foreign / "code.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    rows = here / "train.csv"
    message = r"foreign cannot be read \(it needs code of its own, which sensibert does not run\)"
    with untouched(here, tmp_path):
        refused("model: .*" + message, *finetune_arguments(here, tmp_path / "out", model=foreign))
        refused("teacher: .*" + message, *finetune_arguments(here, tmp_path / "out", teacher=foreign))
        refused(message, "analyze", "--model", foreign, "--train-file", rows, "--output", tmp_path / "s")
        refused(message, "trim", "--model", foreign, "--plan", here / "plan", "--output", tmp_path / "out")
        refused(message, "eval", foreign, "--validation-file", rows)
        refused(message, "inspect", foreign)
        with pytest.raises(SensibertError, match="which sensibert does not run"):
            load(foreign)


@pytest.mark.parametrize(
    "budget, message",
    [
        ("0%params", r"outside \(0 %, 100 %\]"),
        ("120%params", r"outside \(0 %, 100 %\]"),
        ("-5%params", "is not a budget"),
        ("abc", "'abc' is not a budget, want for example 50%params"),
        ("", "is not a budget"),
        ("50", "is not a budget"),
        ("8 sec", "is not a budget"),
    ],
)
def test_a_budget_that_is_none(here, tmp_path, budget, message):
    with untouched(here, tmp_path):
        refused(message, *finetune_arguments(here, tmp_path / "out", budget=budget))
        scores = here / "tuned.safetensors"
        refused(message, "plan", "--sensitivity", scores, "--budget", budget, "--output", tmp_path / "plan")


def test_a_budget_above_the_dense_model_would_trim_nothing(here, tmp_path):
    message = "500Kparams, and the encoder has 17,088 params: nothing would be trimmed, want less"
    requested = finetune_arguments(here, tmp_path / "out", budget="500Kparams")
    for more in ((), ("--dry-run",)):
        refused(message, *requested, *more)
    refused(message, "plan", "--sensitivity", here / "tuned.safetensors", "--budget", "500Kparams", "--dry-run")


@pytest.mark.parametrize("budget, scope", [("1%params", "encoder"), ("0.01%flops", "model")])
def test_a_budget_below_the_rest_names_the_smallest_and_that_one_works(here, tmp_path, budget, scope):
    counted = ("--scope", scope, "--step", 4, "--dry-run", "--budget")
    requested = ("plan", "--sensitivity", here / "other.safetensors", *counted)
    with untouched(here, tmp_path):
        line = refused("the smallest reachable budget is", *requested, budget)
        refused("the smallest reachable budget is", *finetune_arguments(here, tmp_path / "out"), *counted, budget)
        absolute, percent = re.search(r"budget is (\d+\w+) \(([\d.]+) %\)", line).groups()
        kind = budget.partition("%")[2]
        for reachable in (absolute, f"{percent}%{kind}"):
            assert command(*requested, reachable).code == 0, reachable
        done = command(*finetune_arguments(here, tmp_path / "out"), *counted, absolute)
        assert done.code == 0, done


def test_a_process_of_its_own_says_one_line_too(here, tmp_path):
    """Bars, warnings and imports would all go to standard error; the model has been read by then."""
    requested = map(str, finetune_arguments(here, tmp_path / "out", budget="1%params"))
    done = subprocess.run([sys.executable, "-m", "sensibert", *requested, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("sensibert: error: budget: .* the smallest reachable budget is .*\n", done.stderr), done.stderr


BAD_FILES = {
    "empty file": (b"", "is empty, want a header and rows"),
    "header only": (b"sentence,label\n", "holds no rows"),
    "missing label": (b"sentence,stars\ngood,1\nbad,0\n", r"no column 'label'.* the columns are 'sentence', 'stars'"),
    "missing text": (b"words,label\ngood,1\nbad,0\n", "wants the columns"),
    "mixed labels": (b"sentence,label\ngood,1\nbad,dull\n", "want numbers only or names only"),
    "nan label": (b"sentence,label\ngood,nan\nbad,1\n", "row 1, column 'label' is 'nan'"),
    "no label": (b"sentence,label\ngood,1\nbad,\n", "row 2, column 'label' is empty"),
    "two delimiters": (
        b"sentence,a|label\ngood,b|1\nbad,c|0\n",
        "the delimiter is not clear: by a comma, all rows have 2",
    ),
    "many integers": (
        b"sentence,label\n" + b"".join(b"good,%d\n" % i**2 for i in range(30)),
        r"row 7, column 'label' is '36' .*, and all labels are whole numbers, 30 different ones: want a task",
    ),
    "one class": (b"sentence,label\ngood,1\nbad,1\n", "only one class"),
    "not utf-8": (b"sentence,label\ngood,1\nb\xe4d,0\n", "line 3: byte 0xe4 is not UTF-8"),
    "ragged": (b"sentence,label\ngood,1\nbad\n", "line 3: 1 fields, want 2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_named_by_file_row_and_column(here, tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "bad.csv").write_bytes(content)
    with untouched(here, tmp_path):
        line = refused(
            message, *finetune_arguments(here, tmp_path / "deep" / "out", **{"train-file": tmp_path / "bad.csv"})
        )
        assert "bad.csv" in line


def test_a_missing_file_is_named(here, tmp_path):
    gone = tmp_path / "gone.csv"
    with untouched(here, tmp_path):
        for role in ("train-file", "validation-file"):
            for dry in ((), ("--dry-run",)):
                refused("gone.csv: no such file", *finetune_arguments(here, tmp_path / "out", **{role: gone}), *dry)
        refused("gone.csv: no such file", "eval", here / "tuned", "--validation-file", gone)
        refused("gone.*: not a readable sensibert sensitivity", "plan", "--sensitivity", gone, "--dry-run")
        refused("validation_file is missing", "eval", here / "tuned")
        refused("train_file is missing", "analyze", "--model", here / "tuned", "--output", tmp_path / "s")
        message = "gone is no folder, and cannot be loaded from the hub"
        refused(message, *finetune_arguments(here, tmp_path / "out", model=tmp_path / "gone"))
        refused(message, "inspect", tmp_path / "gone")


def test_a_validation_label_that_training_never_had(here, tmp_path):
    (tmp_path / "dev.csv").write_text("sentence,label\ngood,1\nbad,2\n")
    with untouched(here, tmp_path):
        message = r"dev.csv: row 2, column 'label' is '2' \(str\), want one of the 2 classes"
        refused(message, *finetune_arguments(here, tmp_path / "out", **{"validation-file": tmp_path / "dev.csv"}))
        refused(r"row 2, column 'label'", "eval", here / "tuned", "--validation-file", tmp_path / "dev.csv")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"method": "best"}, "method is 'best', want one of obs"),
        ({"layout": "tall"}, "layout is 'tall', want one of trimmed"),
        ({"allocation": "fair"}, "allocation is 'fair', want one of global"),
        ({"policy": "fair"}, "allocation is 'fair', want one of global"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"scope": "head"}, "scope is 'head'"),
        ({"task": "poetry"}, "task is 'poetry'"),
        ({"schedule": "square"}, "schedule is 'square', want one of oneshot, cubic"),
        ({"trim-start": 1.5}, "trim_start is 1.5, want a fraction"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": "many"}, "'--epochs'.*'many'"),
        ({"max-steps": 0}, "max_steps is 0"),
        ({"learning-rate": "nan"}, "learning_rate is nan"),
        ({"batch-size": -2}, "batch_size is -2"),
        ({"seed": -1}, "seed is -1"),
        ({"width-multiple": 0}, "width_multiple is 0"),
        ({"text-column": "words"}, "'words'"),
        ({"max-length": 1}, "max_length"),
        ({"distil": 2}, "distil is 2"),
        ({"teacher": "snapshot", "method": "baseline"}, "method baseline does not trim"),
        ({"teacher": "average"}, "teacher is 'average', which was removed"),
        ({"search": 3}, "--search was removed: want it left out"),
        (
            {"grid": "element", "allocation": "exact", "width-multiple": None},
            "allocation is 'exact', which needs whole",
        ),
        ({"output": ""}, "want the name of a new folder"),
        ({"colour": "red"}, "--colour"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_out_of_range_is_named_before_any_work(here, tmp_path, changed, message):
    with untouched(here, tmp_path):
        refused(message, *finetune_arguments(here, **{"output": tmp_path / "out"} | changed))


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_nothing(here, tmp_path):
    with untouched(here, tmp_path):
        requested = finetune_arguments(here, tmp_path / "out", **{"learning-rate": 1e30, "method": "baseline"})
        refused(r"the loss is (nan|inf) at step \d+; try a smaller learning rate", *requested)


@pytest.mark.parametrize("saves", [{}, {"save-steps": 2}], ids=["at the end", "at a saving step"])
def test_a_last_step_that_is_not_finite_is_not_published(here, tmp_path, monkeypatch, saves):
    step, count = MaskedAdamW.step, itertools.count(1)

    def poisoned(optimizer, *args, **kwargs):
        if next(count) == 3:
            optimizer.param_groups[0]["params"][-1].grad.fill_(float("inf"))  # of the head
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(MaskedAdamW, "step", poisoned)
    requested = finetune_arguments(here, tmp_path / "out", **{"validation-file": None} | saves)
    refused("has NaN or infinite values, want finite weights", *requested)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob("out.partial/checkpoint-*")] == (["checkpoint-2"] if saves else [])


def test_a_model_with_nan_weights_is_refused_by_analyze_and_eval(here, tmp_path):
    shutil.copytree(here / "tuned", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["classifier.weight"][:] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with untouched(tmp_path):
        requested = ("analyze", "--model", tmp_path / "nan", "--train-file", here / "train.csv")
        refused("the loss after 0 samples is nan", *requested, "--output", tmp_path / "s")
        refused("predictions are NaN", "eval", tmp_path / "nan", "--validation-file", here / "dev.csv")


def test_files_of_another_model_or_kind(here, tmp_path):
    plan = tmp_path / "plan"
    assert command("plan", "--sensitivity", here / "other.safetensors", "--step", 4, "--output", plan).code == 0
    with untouched(here, tmp_path):
        trims = ("trim", "--model", here / "tuned", "--output", tmp_path / "small", "--plan")
        refused("comes from the sensitivity of another model", *trims, plan)
        refused("holds sensibert.sensitivity, want a sensibert plan", *trims, here / "tuned.safetensors")
        refused("want a sensibert sensitivity", "plan", "--dry-run", "--sensitivity", plan)
        refused("not a readable sensibert plan", *trims, here / "train.csv")
        weights = here / "tuned" / "model.safetensors"
        refused("want a sensibert sensitivity", "plan", "--dry-run", "--sensitivity", weights)


def test_a_model_without_the_head_or_with_another(here, tmp_path):
    dev = ("--validation-file", here / "dev.csv")
    with untouched(here):
        refused("has no task head, want a fine-tuned model", "eval", here / "model", *dev)
        refused("task is 'token-classification', but", "eval", here / "tuned", *dev, "--task", "token-classification")
        refused("2 classes, want 1 output", "eval", here / "tuned", *dev, "--task", "regression")


def test_a_tokenizer_without_words_or_of_another_model_is_refused(here, tmp_path):
    shutil.copytree(here / "model", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    refused("no tokenizer in .*bare", *finetune_arguments(here, tmp_path / "out", model=tmp_path / "bare"))
    small = runs.model_folder(tmp_path / "small", vocab_size=8)
    refused(
        "the tokenizer produces id .* but the vocabulary has 8 entries",
        *finetune_arguments(here, tmp_path / "out", model=small),
    )


def test_ctrl_c_is_told_by_the_code(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sensibert.inspection.inspect_folder", interrupted)
    done = command("inspect", "somewhere")
    assert done.code == 130 and "stopped; finetune --resume continues" in done.err


def test_a_truncated_model_is_named(here, tmp_path):
    shutil.copytree(here / "tuned", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    with untouched(here, tmp_path):
        refused("model: cannot load .*cut", *finetune_arguments(here, tmp_path / "out", model=tmp_path / "cut"))
        refused("cut: not a model folder that can be loaded", "inspect", tmp_path / "cut")


def test_a_config_that_cannot_be_meant(here, tmp_path):
    file = tmp_path / "recipe.yaml"
    requested = [*finetune_arguments(here, tmp_path / "out"), "--config", file]
    for content, message in (
        ("budget: [50%params", "config: cannot read .*recipe.yaml .*line 1"),
        ("- budget\n- 50%params", "holds a list, want a mapping of option names"),
        ("just words", "holds a str, want a mapping"),
        ("budgt: 50%params", "names 'budgt', want one of .*budget, "),
        ("budget: [50%params, 30%params]", "budget is a list, want one value"),
        ("samples: many", "samples.*'many'"),
    ):
        file.write_text(content)
        with untouched(here, tmp_path):
            refused(message, *requested)
    file.write_text("dry_run: true")  # analyze has none, and would write
    refused("names 'dry_run'", "analyze", "--model", here / "model", "--output", tmp_path / "scores", "--config", file)
    assert not (tmp_path / "scores").exists()
    refused("config: cannot read .*No such file", *requested[:-1], tmp_path / "gone.yaml")


def test_a_setting_of_another_type_in_a_config_is_named(here, tmp_path):
    file = tmp_path / "recipe.yaml"
    for content, message in (
        ("", "config: .*recipe.yaml is empty, want a mapping"),
        ("# nothing\n", "is empty"),
        ("epochs: 1\nepochs: 2", r"config: cannot read .*line 2, column 1: epochs is given twice"),
        ("learning-rate: 1\nlearning_rate: 2", "learning_rate is given twice"),
        ("learnin_rate: 1", "names 'learnin_rate', want one of .*; did you mean 'learning_rate'"),
        ("config: other.yaml", "names 'config'"),
        ("date: 2020-13-45", "config: cannot read"),
        ("seed:\t1\n\tepochs: 2", r"line 1, column 6: found character '\\t'"),
        ("epochs: abc", "'--epochs': it is 'abc', want a number"),
        ("epochs: yes", "epochs is True, want a number"),
        ("teacher: no", "teacher is False, want text"),
        ("seed: 1.5", "'--seed': it is 1.5, want a whole number"),
        ("overwrite: maybe", "'--overwrite': it is 'maybe', want true or false"),
        ("recovery: lift", "recovery is 'lift', want one of rewarm, continue"),
    ):
        file.write_text(content)
        with untouched(here, tmp_path):
            refused(message, *finetune_arguments(here, tmp_path / "out"), "--config", file)


NO_MODEL = {
    "file": "is a file, want the folder of a model",
    "empty": "has no config.json, want the folder of a model",
    "broken": "cannot be read, config.json: it is not JSON",
    "binary": "cannot be read, config.json: it is not JSON",
    "list": "has a config.json with a list, want an object that names its model_type",
    "number": "has a config.json with 3, want an object",
    "nameless": "has a config.json with no model_type",
    "null": "has a config.json with no model_type",
    "values": "cannot be read|not a model folder that can be loaded",
    "pickle": "not a model folder that can be loaded .*pytorch_model.bin is damaged|cannot load .*is damaged",
    "tampered": "has a config.json whose entry sensibert is 3, want an object",
    "gone": r"is no folder, and cannot be loaded from the hub \(names there are NAME or OWNER/NAME\)",
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_what_is_no_model_folder_is_refused_under_the_name_of_its_argument(here, tmp_path, case):
    config = {"broken": b"{", "binary": b"\xff\xfe", "list": b"[1]", "number": b"3", "nameless": b"{}"}
    config |= {"null": b'{"model_type": null}', "values": b'{"model_type": "bert", "hidden_size": "wide"}'}
    config["tampered"] = b'{"model_type": "bert", "sensibert": 3}'
    place = here / "tuned" / "config.json" if case == "file" else tmp_path / case
    if case not in ("file", "gone"):
        place.mkdir()
        if case == "pickle":
            shutil.copytree(here / "tuned", place, dirs_exist_ok=True)
            (place / "model.safetensors").rename(place / "pytorch_model.bin")
        if case in config:
            (place / "config.json").write_bytes(config[case])
    rows, message, output = here / "train.csv", NO_MODEL[case], tmp_path / "out"
    with untouched(here, tmp_path):
        for name in ("model", "teacher"):
            refused(f"error: {name}: .*({message})", *finetune_arguments(here, output, **{name: place}))
        for name, arguments in (
            ("model", ("analyze", "--train-file", rows, "--output", output, "--model", place)),
            ("model", ("trim", "--plan", here / "plan", "--output", output, "--model", place)),
            ("folder", ("eval", "--validation-file", rows, place)),
            ("folder", ("inspect", place)),
        ):
            refused(f"error: {name}: .*({message})", *arguments)
        with pytest.raises(SensibertError, match=message):
            load(place)


def test_a_file_that_is_none_is_refused_under_the_name_of_its_argument(here, tmp_path):
    (tmp_path / "rows.text").write_text("text")
    wrong = {
        tmp_path: "is a folder, want a file",
        tmp_path / "gone.csv": "no such file",
        tmp_path / "rows.text": "unknown suffix '.text', want .csv",
        "": "'' is no file",
    }
    output = tmp_path / "out"
    with untouched(here, tmp_path):
        for file, message in wrong.items():
            for name in ("train_file", "validation_file"):
                option = {name.replace("_", "-"): file}
                refused(f"error: {name}: .*{message}", *finetune_arguments(here, output, **option))
            requested = ("analyze", "--model", here / "tuned", "--output", output, "--train-file", file)
            refused(f"error: train_file: .*{message}", *requested)
            refused(f"error: validation_file: .*{message}", "eval", here / "tuned", "--validation-file", file)
        long = "x" * 5000 + ".csv"  # no file system has such names
        refused("error: validation_file: xxx.*no such file", "eval", here / "tuned", "--validation-file", long)
        for file, message in {
            tmp_path: "it is a folder",
            tmp_path / "gone": "no such file",
            "": "it is a folder",
        }.items():
            trims = ("trim", "--model", here / "tuned", "--output", output, "--plan", file)
            refused(rf"error: plan: .*not a readable sensibert plan file \({message}", *trims)
            plans = ("plan", "--dry-run", "--sensitivity", file)
            refused(rf"error: sensitivity: .*not a readable sensibert sensitivity file \(.*{message}", *plans)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"learning-rate": "abc"}, "'--learning-rate': it is 'abc', want a number"),
        ({"seed": "1.5"}, "'--seed': it is '1.5', want a whole number"),
        ({"max-length": "ten"}, "'--max-length': it is 'ten', want a whole number"),
        ({"budget": "banana"}, "budget: 'banana' is not a budget, want for example 50%params"),
        ({"grid": "3x"}, "grid is '3x', want one of unit, element, block64"),
        ({"task": "sst"}, "task is 'sst', want one of .*; did you mean 'sst2'"),
        ({"method": "OBS"}, "did you mean 'obs'"),
        ({"layout": "trimed"}, "did you mean 'trimmed'"),
        ({"text-column": "sentense"}, "text_column: .*train.csv: no column 'sentense', the .*did you mean 'sentence'"),
        ({"label-column": "lable"}, "label_column: .*train.csv: no column 'lable', the .*did you mean 'label'"),
        ({"label-column": ""}, "label_column: .*no column ''"),
        ({"learnin-rate": 1}, "No such option: --learnin-rate .*--learning-rate"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_value_is_quoted_and_the_nearest_known_one_is_named(here, tmp_path, changed, message):
    with untouched(here, tmp_path):
        refused(message, *finetune_arguments(here, **{"output": tmp_path / "out"} | changed))


@pytest.mark.parametrize("name", ["finetune", "analyze", "plan", "trim", "eval", "inspect"])
def test_unknown_options_and_commands_are_one_line(name):
    refused("--nonsense", name, "--nonsense", "1")
    refused("Missing (option|argument)", name)
    refused("No such command 'prune'", "prune")
