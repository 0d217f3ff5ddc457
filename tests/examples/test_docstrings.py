"""The demo's data set, built from two small libraries that stand in for installed ones."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "docstrings.py"


@pytest.fixture(scope="module")
def docstrings():
    spec = importlib.util.spec_from_file_location("docstrings", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def libraries(tmp_path):
    """Two libraries of 40 files with three docstrings each, a file that does not parse and a file of tests."""
    for name in ("alpha", "beta"):
        folder = tmp_path / name
        (folder / "tests").mkdir(parents=True)
        for i in range(40):
            doc = f"The {i}-th {name} function returns what numpy would have returned for it"
            body = "".join(f'def f{j}():\n    """{doc}, variant {j}."""\n' for j in range(3))
            (folder / f"m{i}.py").write_text(body)
        (folder / "broken.py").write_text('def f(:\n    """This one can never be parsed by anyone at all."""')
        (folder / "tests" / "t.py").write_text('"""A docstring of the tests that must never show up in the data."""')
    return {name: tmp_path / name for name in ("beta", "alpha")}


def read(folder, side):
    with open(folder / f"{side}.csv", newline="", encoding="utf-8") as file:
        return [(row["sentence"], row["label"]) for row in csv.DictReader(file)]


def test_classes_are_balanced_and_rightly_labelled(docstrings, libraries, tmp_path):
    assert docstrings.build(tmp_path / "out", libraries, cap=20) == {"train": 34, "validation": 6}
    for side, each in (("train", 17), ("validation", 3)):
        rows = read(tmp_path / "out", side)
        assert [sum(label == name for _, label in rows) for name in ("alpha", "beta")] == [each, each]
        assert all(label in text for text, label in rows)
        assert not any("tests" in text or "parsed" in text for text, _ in rows)


def test_no_file_is_on_both_sides(docstrings, libraries, tmp_path):
    docstrings.build(tmp_path / "out", libraries)
    train, validation = (
        {tuple(text.split()[1:3]) for text, _ in read(tmp_path / "out", side)} for side in ("train", "validation")
    )
    assert train and validation and not train & validation


def test_the_same_sources_give_the_same_files(docstrings, libraries, tmp_path):
    for name in ("one", "two"):
        docstrings.build(tmp_path / name, libraries)
    for file in ("train.csv", "validation.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_texts_that_begin_alike_are_taken_once(docstrings, tmp_path):
    (tmp_path / "copies").mkdir()
    for i in range(20):
        doc = "Constructs a fast tokenizer, backed by a library of tokenizers, and based on word pieces."
        (tmp_path / "copies" / f"m{i}.py").write_text(f'"""{doc} Copy {i}."""')
    texts = docstrings.collect("copies", tmp_path / "copies")
    assert len(texts["train"]) + len(texts["validation"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Converts a Torch tensor to NumPy",
        "TorchScript of a PyTorch module",
        "is_sympy_symbol and nx.Graph, pd.DataFrame, np.ndarray or hf_token",
        "the Hugging Face Hub, huggingface_hub, HuggingFace, networkx",
        "a transformers model",
    ],
)
def test_names_and_aliases_are_masked(docstrings, text):
    masked = docstrings.mask(text)
    assert docstrings.MASK in masked
    assert not docstrings.GIVE_AWAYS.search(masked)


def test_words_that_only_look_like_a_name_are_kept(docstrings):
    text = "The transformer block: input, output, update, and the stop of the pipeline"
    assert docstrings.mask(text) == text


def test_libraries_are_found_without_importing_them():
    """In a fresh process: finding torch and transformers must not import them."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import docstrings; found = docstrings.sources(); "
    code += "print('torch' in found, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
