"""Whatever is in a file, it is read or refused with a SensibertError: no other error comes out."""

import contextlib
import gzip
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sensibert import SensibertError, load, load_structure
from sensibert.allocation.allocate import allocate
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.folder_facts import read_result, want_entry
from sensibert.core.grid import Grid
from sensibert.core.json_text import BITS, parse_json
from sensibert.data import files
from sensibert.data.files import load_examples
from sensibert.data.task_data import TaskData, guess_task
from sensibert.models.masks import Masks
from sensibert.models.pooling import read_pooling
from sensibert.models.structure import read_structure
from sensibert.training.manifest import MANIFEST, check_manifest, write_manifest
from sensibert.training.run_memory import MEMORY, RunMemory
from tests import runs
from tests.core.small import block_plan, sensitivity, unit_plan
from tests.damage import FEW, SLOW, VALUES, damaged_bytes, damaged_json
from tests.refusals import refused

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
NUMBER = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def trimmed(place):
    """A trimmed folder, with the result of its run."""
    shutil.copytree(FIXTURES / "unit", place / "unit")
    return place / "unit"


def read(file, kind):
    """Read an artifact and do with it what commands do."""
    if kind is Sensitivity:
        scores = Sensitivity.load(file)
        for site in scores.curves:
            scores.predicted_rise(site, scores.curves[site][-1][0])
        return allocate(scores, "60%params")
    plan = Plan.load(file)
    return plan.table(), plan.params, plan.flops, str(plan.budget)


def metadata_of(file) -> dict:
    with safe_open(file, "pt") as content:
        return content.metadata()


MADE = {"sensitivity": sensitivity, "plan": unit_plan, "blocks": block_plan}


@pytest.fixture(scope="module")
def artifacts(place):
    for name, make in MADE.items():
        make().save(place / name)
    shutil.copy(FIXTURES / "unit" / "sensitivity.safetensors", place / "curves")
    return place


@pytest.mark.parametrize("name", [*MADE, "curves"])
@FEW
@given(data=st.data())
def test_facts_of_an_artifact(artifacts, name, data):
    file, metadata = artifacts / name, metadata_of(artifacts / name)
    facts = data.draw(damaged_json(json.loads(metadata["facts"])))
    save_file(load_file(file), artifacts / "other", metadata | {"facts": facts})
    with contextlib.suppress(SensibertError):
        read(artifacts / "other", Sensitivity if name in ("sensitivity", "curves") else Plan)


@pytest.mark.parametrize("version", ["two", "", "1.0", "-1", "٣", "1" * 6000, " 1"])
def test_a_version_that_is_no_number(artifacts, version):
    save_file(
        load_file(artifacts / "plan"), artifacts / "other", metadata_of(artifacts / "plan") | {"version": version}
    )
    with pytest.raises(SensibertError, match="not a readable sensibert plan file .*its version is"):
        Plan.load(artifacts / "other")


TENSORS = st.sampled_from(
    [
        *(
            torch.zeros(size, dtype=kind)
            for kind in (torch.float16, torch.int64, torch.bool)
            for size in (0, 4, (4, 1))
        ),
        *(torch.full((4,), value) for value in (torch.nan, torch.inf, -torch.inf)),
        torch.zeros(()),
        torch.zeros(2, 0, 3),
    ]
)


@pytest.mark.parametrize("name", MADE)
@FEW
@given(data=st.data())
def test_tensors_of_an_artifact(artifacts, name, data):
    file = artifacts / name
    tensors = load_file(file)
    tensors[data.draw(st.sampled_from([*tensors, "x"]))] = data.draw(TENSORS)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, artifacts / "other", metadata_of(file))
    with contextlib.suppress(SensibertError):
        read(artifacts / "other", Sensitivity if name == "sensitivity" else Plan)


@pytest.mark.parametrize("name", MADE)
@FEW
@given(data=st.data())
def test_bytes_of_an_artifact(artifacts, name, data):
    (artifacts / "other").write_bytes(data.draw(damaged_bytes((artifacts / name).read_bytes())))
    with contextlib.suppress(SensibertError):
        read(artifacts / "other", Sensitivity if name == "sensitivity" else Plan)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("plan", lambda f: f["layout"]["sites"][0].update(units=10**19), "has 20 digits, want at most 63 bits"),
        ("plan", lambda f: f["layout"]["sites"][0].update(units=10**17), "units is 100000000000000000, want 0 to"),
        ("plan", lambda f: f["layout"]["sites"][0].update(units=-1), "units is -1, want 0 to"),
        ("plan", lambda f: f["layout"]["sites"][0].update(units=3), r"keep\['layer.0.head'\] is torch.bool \(4,\)"),
        ("plan", lambda f: f["layout"].update(encoder_params=10), "the encoder 10 and the model 9,000, want each"),
        ("plan", lambda f: f["layout"]["sites"].append(f["layout"]["sites"][0]), "is listed twice"),
        ("plan", lambda f: f["budget"].update(kind="hours"), "kind is 'hours', want one of params, flops"),
        ("plan", lambda f: f.update(invented=1), "invented"),
        ("plan", lambda f: f["layout"].update(sites=3), "not a readable sensibert plan file"),
        ("sensitivity", lambda f: f.update(curves={"layer.0.ffn": [[3, 0.1], [1, 0.2]]}), "the curve of layer.0.ffn"),
        ("sensitivity", lambda f: f.update(curves={"layer.0.ffn": [[1, 0.1], [9, 0.2]]}), "the curve of layer.0.ffn"),
        ("sensitivity", lambda f: f.update(curves={"elsewhere": [[1, 0.1]]}), "the curve of elsewhere"),
        ("sensitivity", lambda f: f.update(curves={"layer.0.ffn": [1]}), "not a readable sensibert sensitivity"),
        ("sensitivity", lambda f: f.update(samples=-1), "samples is -1"),
    ],
)
def test_numbers_that_no_artifact_has(artifacts, name, change, message):
    metadata = metadata_of(artifacts / name)
    facts = json.loads(metadata["facts"])
    change(facts)
    save_file(load_file(artifacts / name), artifacts / "other", metadata | {"facts": json.dumps(facts)})
    with pytest.raises(SensibertError, match=message):
        read(artifacts / "other", Plan if name == "plan" else Sensitivity)


UNITS = {"layer.0.head": [0, 2], "layer.0.ffn": [1, 5, 6]}


@pytest.mark.parametrize(
    "units, message",
    [
        (torch.tensor([0, 0]), "is not ascending, want every kept unit once"),
        (torch.tensor([2, 0]), "is not ascending"),
        (torch.tensor([-1, 0]), "is not ascending"),
        (torch.tensor([[0, 2]]), r"is torch.int64 \(1, 2\), want one row of whole numbers"),
        (torch.tensor([0.0, 2.0]), r"is torch.float32 \(2,\), want one row of whole numbers"),
    ],
)
def test_units_of_a_structure_file(place, units, message):
    save_file({name: torch.tensor(kept) for name, kept in UNITS.items()} | {"layer.0.head": units}, place / "structure")
    with pytest.raises(SensibertError, match=f"structure: not a readable structure file .layer.0.head {message}"):
        read_structure(place / "structure")


def test_a_structure_of_another_model(trimmed, tmp_path):
    shutil.copytree(trimmed, tmp_path / "unit")
    file = tmp_path / "unit" / "structure.safetensors"
    good = load_file(file)
    for changed, message in (
        ({"layer.0.ffn": good["layer.0.ffn"] + 64}, r"layer.0.ffn has 8 units, the last \d+; want 8 below 64"),
        ({"layer.0.ffn": good["layer.0.ffn"][:4]}, "layer.0.ffn has 4 units, the last .*; want 8 below 64"),
        (
            {"layer.1.head": torch.tensor([0, 1, 3], dtype=torch.int32)},
            "its heads are not the kept_heads of config.json",
        ),
        ({"layer.2.ffn": good["layer.0.ffn"].clone()}, "structure.safetensors: has layer.2.ffn, want the model's own"),
    ):
        save_file(good | changed, file)
        with pytest.raises(SensibertError, match=message):
            load(tmp_path / "unit")
    save_file({name: kept for name, kept in good.items() if name != "layer.0.ffn"}, file)
    refused("structure.safetensors: lacks layer.0.ffn, want the model's own", "inspect", tmp_path / "unit")


@FEW
@given(data=st.data())
def test_masks_of_a_grid(place, data):
    masks = Masks(Grid.block(2, 2), {"a.weight": torch.ones(3, 11, dtype=torch.bool)}, {"budget": "50%params"})
    bits, facts = masks.packed()
    name = data.draw(st.sampled_from(["grid", "columns", "note"]))
    content = facts["grid"] if name == "grid" else json.loads(facts[name])
    changed = data.draw(st.sampled_from(VALUES) if name == "grid" else damaged_json(content))
    save_file(bits, place / "masks", facts | {name: changed})
    with contextlib.suppress(SensibertError):
        assert load_structure(place) if (place / "structure.safetensors").exists() else read_structure(place / "masks")


CONFIG = json.loads((FIXTURES / "unit" / "config.json").read_text())


@FEW
@given(text=damaged_json(CONFIG["sensibert"]))
def test_the_entry_of_a_config(text):
    with contextlib.suppress(SensibertError, ValueError):  # a text that is not JSON is refused before
        want_entry(parse_json(text, any_size=True), "folder: here")


FORM = {"weights": "fp16", "vocabulary": None, "mb_saved": 0.1, "heads_and_neurons": 0.9, "loss": 0.1, "chosen": True}
LATER = {  # what later versions note
    "size": {"rows": 4, "of": "validation", "loss_before": 0.7, "forms": [FORM | {"loss_alone": 0.1}]},
    "latency": {"length": 128, "threads": 1, "batch_1_ms": {"before": 2.0, "after": 1.0}},
    "mb_before": 0.2,
    "mb_after": 0.1,
    "weights": "fp16",
    "cut_step": 1,
    "metrics_baseline": {"accuracy": 0.5},
}


def with_form(**changed) -> dict:
    return LATER["size"] | {"forms": [FORM | changed]}


RESULT = json.loads((FIXTURES / "unit" / "result.json").read_text()) | LATER


@FEW
@given(text=damaged_json(RESULT))
def test_a_result(place, text):
    (place / "result.json").write_text(text)
    with contextlib.suppress(SensibertError):
        read_result(place / "result.json")


def one_line(*arguments) -> None:
    """The command succeeds, or says why not in one line; `command` lets all other errors pass."""
    done = runs.command(*arguments)
    assert done.code in (0, 2) and "\x1b" not in done.out + done.err, done
    assert done.code == 0 or done.err.startswith("sensibert: error: "), done


@SLOW
@given(data=st.data())
def test_a_folder_is_inspected_and_reported_whatever_it_says_of_itself(trimmed, data):
    name = data.draw(st.sampled_from(["config.json", "result.json"]))
    content = CONFIG if name == "config.json" else RESULT
    (trimmed / name).write_text(data.draw(damaged_json(content)))
    try:
        one_line("inspect", trimmed, "--json")
        one_line("report", trimmed)
    finally:
        for kept in ("config.json", "result.json"):
            shutil.copy(FIXTURES / "unit" / kept, trimmed / kept)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("result.json", {"metrics": {"accuracy": "high"}}, r"metrics\['accuracy'\] is 'high', want a number"),
        ("result.json", {"metrics_dense": [1]}, "metrics_dense is a list, want a dict or None"),
        ("result.json", {"metrics": [1]}, "metrics is a list, want a dict or None"),
        ("result.json", {"flops_length": "long"}, "flops_length is 'long', want a whole number"),
        ("result.json", {"scope": "house"}, "scope is 'house', want encoder or model"),
        ("result.json", {"seconds": {"total": None}}, r"seconds\['total'\] is None, want a number"),
        ("result.json", {"latency": {"length": 128, "threads": 1, "batch_1_ms": 3}}, "latency: batch_1_ms is 3, want"),
        ("result.json", {"size": LATER["size"] | {"forms": [{}]}}, r"size: forms\[0\] has no weights, want what"),
        ("result.json", {"size": with_form(loss_alone="low")}, r"\[0\]: loss_alone is 'low', want a number or None"),
        (
            "config.json",
            {"sensibert": CONFIG["sensibert"] | {"size": with_form(vocabulary=2**BITS)}},
            "'] has more than",
        ),
        ("result.json", {"metrics_baseline": {"accuracy": "high"}}, r"metrics_baseline\['accuracy'\] is 'high', want"),
        ("config.json", {"sensibert": CONFIG["sensibert"] | {"ffn": [8, 10**12]}}, "has the size 1000000000000, want"),
        ("config.json", {"sensibert": CONFIG["sensibert"] | {"heads": "all"}}, "heads is 'all', want a list"),
        ("config.json", {"sensibert": CONFIG["sensibert"] | {"heads": [4, 2]}}, r"kept_heads\[1\] has 3 heads, want 2"),
        ("config.json", {"sensibert": CONFIG["sensibert"] | {"task": 3}}, "task is 3, want text or None"),
        ("config.json", {"vocab_size": 10**8}, "asks for at least 12.8 GB of weights, and its files have 0.000 GB"),
        ("config.json", {"vocab_size": 10**30}, "with vocab_size 1000000000000000000000000000000, want a size that"),
        ("config.json", {"num_hidden_layers": 10**6}, "with 1,000,000 layers, want at most 1,000"),
        ("config.json", {"intermediate_size": 10**9}, "asks for at least .* GB of weights"),
    ],
)
def test_what_no_folder_says_is_refused_before_memory_is_taken(trimmed, tmp_path, name, change, message):
    shutil.copytree(trimmed, tmp_path / "unit")
    file = tmp_path / "unit" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(message, "inspect", tmp_path / "unit")


def test_a_name_with_commands_to_the_terminal_is_shown_as_text(trimmed, tmp_path):
    shutil.copytree(trimmed, tmp_path / "unit")
    file, bad = tmp_path / "unit" / "result.json", "\x1b[2J\x07evil"
    file.write_text(json.dumps(RESULT | {"task": bad, "metrics": {bad: 0.5}}))
    done = runs.command("inspect", tmp_path / "unit")
    assert done.code == 0 and "\x1b" not in done.out and r"\x1b[2J\x07evil: 0.5000" in done.out
    runs.model_folder(
        tmp_path / "m", head="SequenceClassification", id2label={0: bad, 1: "b"}, label2id={bad: 0, "b": 1}
    )
    (tmp_path / "t.csv").write_text("sentence,label\ngood,x\nbad,y\n")
    done = runs.command("eval", tmp_path / "m", "--validation-file", tmp_path / "t.csv")
    assert done.code == 2 and "\x1b" not in done.err and r"\x1b[2J" in done.err


def test_an_entry_that_is_given_twice_is_refused(trimmed, tmp_path):
    shutil.copytree(trimmed, tmp_path / "unit")
    text = json.dumps(CONFIG)
    (tmp_path / "unit" / "config.json").write_text('{"hidden_size": 32, ' + text[1:])
    refused("cannot be read, config.json: it is not JSON: 'hidden_size' is given twice", "inspect", tmp_path / "unit")


@FEW
@given(
    text=damaged_json({"seconds": {"warm": 1.5}, "tokens": {"warm": 3}, "metrics_at_cut": None, "settings": {"a": 1}})
)
def test_the_memory_of_a_run(place, text):
    (place / MEMORY).write_text(text)
    with contextlib.suppress(SensibertError):
        RunMemory().restore(place)


@FEW
@given(data=st.data())
def test_a_manifest(place, data):
    folder = place / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder)
    text = data.draw(damaged_json(json.loads((folder / MANIFEST).read_text())))
    (folder / MANIFEST).write_text(text)
    with contextlib.suppress(SensibertError):
        check_manifest(folder, "checkpoint")


def test_a_manifest_of_endless_sizes(tmp_path):
    (tmp_path / MANIFEST).write_text('{"version": 2, "files": {"a": {"bytes": 1e999, "sha256": ""}}}')
    with pytest.raises(SensibertError, match="not a complete checkpoint"):
        check_manifest(tmp_path, "checkpoint")


MODULES = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in
           {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}.items()]  # fmt: skip
LISTED = {
    "modules.json": MODULES,
    "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": True},
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
}


@FEW
@given(data=st.data())
def test_modules_of_sentence_transformers(place, data):
    folder = place / "modules"
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, content in LISTED.items():
        (folder / name).write_text(json.dumps(content))
    name = data.draw(st.sampled_from(list(LISTED)))
    (folder / name).write_text(data.draw(damaged_json(LISTED[name])))
    with contextlib.suppress(SensibertError):
        read_pooling(str(folder))


@pytest.fixture(scope="module")
def whole(place):
    runs.sentence_file(place / "dev.csv", 8)
    return Path(runs.model_folder(place / "whole", head="SequenceClassification", num_labels=2))


@SLOW
@given(data=st.data())
def test_a_model_folder(whole, data):
    """Weights, tokenizer and config: errors of transformers and its libraries come out as ours."""
    file = whole / data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    good = file.read_bytes()
    damaged = damaged_bytes(good)
    if file.suffix == ".json" and data.draw(st.booleans()):
        damaged = damaged_json(json.loads(good)).map(str.encode)
    file.write_bytes(data.draw(damaged))
    try:
        one_line("eval", whole, "--validation-file", whole.parent / "dev.csv")
    finally:
        file.write_bytes(good)


def test_lengths_that_are_no_numbers(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": {"x": 1}}))
    message = "the tokenizer has model_max_length a dict, want a number"
    refused(message, "eval", tmp_path / "m", "--validation-file", whole.parent / "dev.csv")
    runs.embedding_folder(tmp_path / "e")
    (tmp_path / "e" / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with pytest.raises(SensibertError, match="sentence_bert_config.json has max_seq_length 'long', want a number of"):
        read_pooling(str(tmp_path / "e"))


YAML = (
    *(
        "2020-01-01",
        "2020-13-45",
        "!!python/object/apply:os.system [ls]",
        "!!binary aGk=",
        "!!set {a}",
        "!x 3",
        "&a [*a]",
    ),
    *("{a: {b: 1}}", "[1, 2]", "!!timestamp x", "0x" + "f" * 6000, "7" * 6000, "1e999", ".nan", "~", "'\x85'", "? [a]"),
    *('"\\x1b[31m"', "yes", "0b11", "1_000", "12:30:00", "<<: 3", "*missing", "\x00", "|\n  text", "%TAG", "- - - x"),
)


@FEW
@given(
    name=st.sampled_from(
        ["budget", "width_multiple", "scope", "flops_length", "overwrite", "task", "output", "<<", "1"]
    ),
    value=st.sampled_from(YAML) | st.text(max_size=8),
)
def test_a_config(artifacts, name, value):
    (artifacts / "config.yaml").write_text(f"{name}: {value}\n", encoding="utf-8", errors="replace")
    one_line("plan", "--sensitivity", artifacts / "sensitivity", "--dry-run", "--config", artifacts / "config.yaml")


ROWS = [{"sentence": "good", "label": 1, "tags": ["O"]}, {"sentence": "bad", "label": 0, "tags": ["O"]}]
DATA = {
    "x.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "x.csv": b'sentence,label\n"a, b",1\nc,0\n',
    "x.tsv": b'sentence\tlabel\n"a b"\t1\nc\t0\n',
    "x.csv.gz": gzip.compress(b"sentence,label\na,1\nb,0\n"),
    "x.txt": b"one\ntwo\n",
}


def rows_of(file) -> None:
    """Read a file, and make columns, classes and texts of its rows."""
    examples = load_examples(str(file))
    TaskData.outlined(guess_task(examples, None, None), examples, None, None)


@pytest.mark.parametrize("name", [*DATA, "x.parquet"])
@FEW
@given(data=st.data())
def test_bytes_of_a_data_file(place, name, data):
    (place / name).write_bytes(data.draw(damaged_bytes(DATA.get(name) or parquet())))
    with contextlib.suppress(SensibertError):
        rows_of(place / name)


@FEW
@given(text=damaged_json({"data": ROWS}) | damaged_json(ROWS) | damaged_json({"sentence": ["a", "b"], "label": [1, 0]}))
def test_values_of_a_data_file(place, text):
    (place / "x.json").write_text(text)
    with contextlib.suppress(SensibertError):
        rows_of(place / "x.json")


def parquet() -> bytes:
    pyarrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    table.write_table(pyarrow.table({"sentence": ["good", "bad"], "label": [1, 0]}), sink)
    return sink.getvalue().to_pybytes()


def test_a_gzip_that_unpacks_to_far_more_than_its_size_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE_BYTES", 2**21)
    read_bytes, most = gzip.GzipFile.read, []
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: most.append(n) or read_bytes(self, n))
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"sentence,label\n" + b"good,1\n" * 2_000_000))
    with pytest.raises(SensibertError, match="bomb.csv.gz: holds more than 2 MB, over 100 times its own size; want it"):
        load_examples(str(tmp_path / "bomb.csv.gz"))
    assert max(most) <= 2**20 and min(most) > 0 and len(most) < 10
    texts = np.random.default_rng(0).integers(0, 10**9, 300_000)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress("\n".join(map(str, texts)).encode(), 1))
    assert len(load_examples(str(tmp_path / "large.txt.gz"))) == 300_000


def test_a_parquet_of_more_rows_than_it_has_room_for_is_refused(tmp_path, monkeypatch):
    pyarrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "FREE_BYTES", 10_000)
    table.write_table(pyarrow.table({"label": ["same"] * 3_000_000}), tmp_path / "bomb.parquet")
    with pytest.raises(SensibertError, match="bomb.parquet: holds more than .* MB"):
        load_examples(str(tmp_path / "bomb.parquet"))
