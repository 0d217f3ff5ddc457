"""Every format gives the same columns; a broken file is named, with the line."""

import gzip
import json

import pytest

from sensibert.core.errors import SensibertError
from sensibert.data.files import load_examples

SENTENCES = ["a plain one", 'a "quoted", one', "two\nlines", "null", "NA", "nan", "", "déjà vu \u2028 ẞ"]
LABELS = ["0", "1", "0", "1", "NA", "null", "nan", "1"]


def quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def as_csv() -> bytes:
    rows = [f"{quote(s)},{label}" for s, label in zip(SENTENCES, LABELS)]
    return "\r\n".join(["sentence,label", *rows, ""]).encode()


def as_jsonl() -> bytes:
    rows = [json.dumps({"sentence": s, "label": label}) for s, label in zip(SENTENCES, LABELS)]
    return "\n".join([*rows, "", ""]).encode()


def as_json() -> bytes:
    return json.dumps([{"sentence": s, "label": label} for s, label in zip(SENTENCES, LABELS)]).encode()


def as_json_columns() -> bytes:
    return json.dumps({"sentence": SENTENCES, "label": LABELS}).encode()


def as_json_data() -> bytes:
    return json.dumps({"version": "1", "data": json.loads(as_json())}).encode()


def as_parquet() -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"sentence": SENTENCES, "label": LABELS}), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "csv": as_csv,
    "jsonl": as_jsonl,
    "json": as_json,
    "columns.json": as_json_columns,
    "data.json": as_json_data,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", KINDS)
def test_every_format_keeps_every_string_as_it_is(suffix, packed, tmp_path):
    data = KINDS[suffix]()
    path = tmp_path / f"train.{suffix.upper() if not packed else suffix + '.gz'}"
    path.write_bytes(gzip.compress(data) if packed else data)
    examples = load_examples(str(path))
    assert examples.columns == {"sentence": SENTENCES, "label": LABELS}
    assert len(examples) == len(LABELS) and examples.name == str(path)


def write(tmp_path, name: str, data: bytes | str) -> str:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert list(load_examples(write(tmp_path, "x.csv", b"\xef\xbb\xbfsentence,label\nhi,1\n")).columns)[0] == "sentence"


def test_tsv_quotes_are_text_when_a_line_is_not_well_quoted(tmp_path):
    path = write(tmp_path, "x.tsv", 'sentence\tlabel\n"good" he message\t1\n"never closed\t0\nand "this"\t1\n')
    columns = load_examples(path).columns
    assert columns == {"sentence": ['"good" he message', '"never closed', 'and "this"'], "label": ["1", "0", "1"]}


def test_tsv_quotes_are_quotes_when_every_line_is_well_quoted(tmp_path):
    path = write(tmp_path, "x.tsv", 'sentence\tlabel\r\n"a ""b""\tc"\t1\r\nplain\t0\r\n')
    assert load_examples(path).columns == {"sentence": ['a "b"\tc', "plain"], "label": ["1", "0"]}


def test_a_context_above_the_limit_of_the_csv_module_is_read(tmp_path):
    text = "word " * 60_000
    assert load_examples(write(tmp_path, "x.csv", f"text,label\n{text},1\n")).columns["text"] == [text]


def test_a_key_that_some_json_rows_lack_is_none_there(tmp_path):
    columns = load_examples(write(tmp_path, "x.jsonl", '{"a": 1}\n{"a": 2, "b": 3}\n')).columns
    assert columns == {"a": [1, 2], "b": [None, 3]}


def test_a_squad_file_becomes_one_row_per_question(tmp_path):
    qa = {"id": "q1", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Anna wrote it.", "qas": [qa]}]}]}
    columns = load_examples(write(tmp_path, "x.json", json.dumps(content))).columns
    assert columns["answers"] == [{"text": ["Anna"], "answer_start": [0]}]
    assert (columns["id"], columns["context"], columns["question"]) == (["q1"], ["Anna wrote it."], ["Who?"])


BROKEN = {
    "empty": ("x.csv", "", "x.csv is empty, want a header and rows"),
    "header only": ("x.csv", "sentence,label\n", "x.csv holds no rows"),
    "empty jsonl": ("x.jsonl", "\n", "x.jsonl holds no rows"),
    "not utf-8": ("x.csv", b"sentence,label\ngood,1\nd\xe9j\xe0,0\n", "x.csv: line 3: byte 0xe9 is not UTF-8"),
    "short row": ("x.csv", 'sentence,label\n"a\nb",1\n\nbad\n', "x.csv: line 5: 1 fields, want 2 (sentence, label)"),
    "long row": ("x.tsv", "sentence\tlabel\na\t1\t2\n", "x.tsv: line 2: 3 fields, want 2 (sentence, label)"),
    "open quote": ("x.csv", 'sentence,label\na,1\n"b,0\nc,1\n', "x.csv: line 3: not csv (unexpected end of data)"),
    "twin columns": ("x.csv", "label,label\n1,2\n", "x.csv: column 'label' appears twice in the header"),
    "bad jsonl": ("x.jsonl", '{"a": 1}\n\n{"a": }\n', "x.jsonl: line 3: not JSON (Expecting value)"),
    "bad json": ("x.json", '[\n{"a": 1}\n{"a": 2}]', "x.json: line 3: not JSON (Expecting ',' delimiter)"),
    "number": ("x.jsonl", '{"a": 1}\n7\n', "x.jsonl: line 2 is int, want an object with named fields"),
    "scalar json": ("x.json", "3", "x.json: want a list of objects, or one object of equally long lists"),
    "uneven columns": ("x.json", '{"a": [1, 2], "b": [1]}', "x.json: columns differ in length (a 2, b 1)"),
    "half squad": ("x.json", '{"data": [{"paragraphs": [{}]}]}', "'data' holds paragraphs but is not a SQuAD file"),
    "deep json": ("x.json", "[" * 200_000, "x.json: not JSON (it is nested too deeply)"),
    "suffix": (
        "x.xlsx",
        "PK",
        "x.xlsx: unknown suffix '.xlsx', want .csv, .tsv, .jsonl, .json, .parquet, .txt, each also",
    ),
    "no gzip": ("x.csv.gz", "sentence,label\n", "x.csv.gz is not a complete gzip file (Not a gzipped file"),
    "cut gzip": ("x.csv.gz", gzip.compress(b"sentence,label\na,1\n" * 50)[:40], "x.csv.gz is not a complete gzip file"),
    "no parquet": ("x.parquet", "PAR", "x.parquet: not parquet ("),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_in_one_line(case, tmp_path):
    name, data, message = BROKEN[case]
    with pytest.raises(SensibertError) as caught:
        load_examples(write(tmp_path, name, data))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "missing.jsonl.gz", "not/a/hub/name", "has space"])
def test_a_missing_file_is_named(name):
    with pytest.raises(SensibertError, match=f"{name}: no such file"):
        load_examples(name)


def test_a_missing_file_in_a_folder_that_exists_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(SensibertError, match="data/train: no such file"):
        load_examples("data/train")
    with pytest.raises(SensibertError, match="data is a folder, want a file"):
        load_examples("data")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, "x.csv", "sentence,label\na,1\n")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(SensibertError, match=r"x\.csv: denied"):
        load_examples(path)


def test_data_of_the_hub_become_columns_with_class_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    tags = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.Sequence(tags),
        }
    )
    rows = {"sentence": ["x", "y"], "label": [1, 0], "tags": [[0, 1], [0]]}
    data = datasets.Dataset.from_dict(rows, features)
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or data)
    examples = load_examples("owner/name:config", "test")
    assert calls == [(("owner/name", "config"), {"split": "test"})]
    assert examples.columns == rows and examples.name == "owner/name:config[test]"
    assert examples.class_names == {"label": ["no", "yes"], "tags": ["O", "B-PER"]}


def test_a_hub_name_that_cannot_be_loaded_is_named_in_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SensibertError) as caught:
        load_examples("owner/name")
    assert str(caught.value) == "owner/name is not a file, and cannot be loaded from the hub (cannot reach the hub)"
