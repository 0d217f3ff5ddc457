"""Do folders work where sensibert is not installed? Made here, they are loaded there by the libraries that people use.

    python bench/check_alone.py make MODEL FOLDER     # MODEL: a folder of sentence-transformers
    python bench/check_alone.py check FOLDER          # in an environment without sensibert; this file is all it needs

`make` trims MODEL, as it is and with a random head of classes, to half of its encoder, and exports both as graphs.
`check` loads them in every library that is installed, and compares the outputs for a few texts with those noted here.
It prints one line each, also for what is not installed; exit code 1 if anything else is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TEXTS = ["the film was great", "a man lives in paris and works in a bank", "no"]
EXPECTED = "expected.json"
TOLERANCE, TOLERANCE_INT8 = 1e-3, 0.3  # of the largest output
RUNTIMES = ("onnx", "openvino", "torch")
SHOWN = ("torch", "transformers", "tokenizers", "sentence-transformers", "onnxruntime", "openvino", "optimum")
ONNX, INT8, OPENVINO = "onnx/model.onnx", "onnx/model_quantized.onnx", "openvino/openvino_model.xml"


def make(source: str, folder: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForSequenceClassification

    from sensibert import TrimConfig, export, export_graph, load, trim_model

    torch.manual_seed(0)
    folder.mkdir()
    expected = {}
    for name in ("embedder", "classifier"):
        model, tokenizer = load(source)
        if name == "classifier":
            model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
            model.classifier.weight.data.normal_()
        trim_model(model.eval(), (), TrimConfig("50%params", method="magnitude"))
        export(model, str(folder / name), tokenizer)
        for to in RUNTIMES:
            export_graph(model, str(folder / f"{name}-{to}"), to, tokenizer, int8=to == "onnx")
        with torch.no_grad():
            rows = [model(**tokenizer(text, return_tensors="pt"))[0][0] for text in TEXTS]
        expected[name] = [row.tolist() for row in rows]
        if name == "classifier":
            expected["classes"] = [row.softmax(-1).tolist() for row in rows]
    expected["sentences"] = SentenceTransformer(str(folder / "embedder"), device="cpu").encode(TEXTS).tolist()
    (folder / EXPECTED).write_text(json.dumps(expected))


def of_graph(folder: Path, file: str) -> list:
    """Outputs of a graph, with a tokenizer and a runtime alone."""
    import numpy as np
    import tokenizers

    if file.endswith(".xml"):
        import openvino

        graph = openvino.Core().compile_model(folder / file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names, run = [port.get_any_name() for port in graph.inputs], lambda inputs: graph(inputs)[0]
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(folder / file))
        names, run = [port.name for port in session.get_inputs()], lambda inputs: session.run(None, inputs)[0]
    assert not {"torch", "transformers"} & sys.modules.keys()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()  # some files pad every text to a fixed length
    found = []
    for text in TEXTS:
        row = tokenizer.encode(text)
        usual = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
        found.append(run({name: np.array([usual[name]]) for name in names})[0].tolist())
    return found


def of_program(folder: Path) -> list:
    import torch
    from tokenizers import Tokenizer

    model = torch.export.load(folder / "torch" / "model.pt2").module()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    rows = [tokenizer.encode(text) for text in TEXTS]
    inputs = [[torch.tensor([each]) for each in (row.ids, row.attention_mask, row.type_ids)] for row in rows]
    return [model(*each)[0][0].tolist() for each in inputs]


def of_pipeline(folder: Path) -> list:
    from transformers import pipeline

    classify = pipeline("text-classification", str(folder), top_k=None, trust_remote_code=True)
    return [[row["score"] for row in sorted(rows, key=lambda row: row["label"])] for rows in classify(TEXTS)]


def of_model(folder: Path) -> list:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return [model(**tokenizer(text, return_tensors="pt"))[0][0].tolist() for text in TEXTS]


def of_sentences(folder: Path, backend: str) -> list:
    from sentence_transformers import SentenceTransformer

    # Graphs need no code of the folder.
    exact = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}} if backend == "openvino" else {}  # it may choose bf16
    trust = backend == "torch"
    model = SentenceTransformer(str(folder), device="cpu", backend=backend, trust_remote_code=trust, model_kwargs=exact)
    return model.encode(TEXTS).tolist()


def refused(folder: Path) -> list:
    """Without sensibert and without trust_remote_code, a trimmed folder must not load."""
    from transformers import AutoModelForSequenceClassification

    try:
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "model type" in str(error), error
        return []
    raise AssertionError("it loads, with random weights")


# What is done with which folder, in this order, and the outputs it must have. Runtimes alone come first.
Way = tuple[str, str, Callable[..., list], tuple[str, ...], str]
WAYS: list[Way] = [
    *(("onnxruntime alone", f"{name}-onnx", of_graph, (ONNX,), name) for name in ("classifier", "embedder")),
    ("onnxruntime alone, int8", "embedder-onnx", of_graph, (INT8,), "embedder"),
    *(("openvino alone", f"{name}-openvino", of_graph, (OPENVINO,), name) for name in ("classifier", "embedder")),
    *(("torch.export alone", f"{name}-torch", of_program, (), name) for name in ("classifier", "embedder")),
    ("transformers, no flag", "classifier", refused, (), ""),
    ("transformers pipeline", "classifier", of_pipeline, (), "classes"),
    ("transformers AutoModel", "embedder", of_model, (), "embedder"),
    ("sentence-transformers torch", "embedder", of_sentences, ("torch",), "sentences"),
    ("sentence-transformers onnx", "embedder-onnx", of_sentences, ("onnx",), "sentences"),
    ("sentence-transformers openvino", "embedder-openvino", of_sentences, ("openvino",), "sentences"),
]


def difference(found: list, wanted: list) -> float:
    """The largest, as a fraction of the largest output."""
    import numpy as np

    pairs = [(np.array(a), np.array(b)) for a, b in zip(found, wanted, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return float(max(abs(a - b).max() / abs(b).max() for a, b in pairs))


def check(folder: Path) -> bool:
    """Whether nothing is wrong."""
    sys.modules["sensibert"] = None  # type: ignore[assignment]  # makes imports of it fail
    right, expected = True, json.loads((folder / EXPECTED).read_text())
    print(", ".join(f"{name} {known}" for name in SHOWN if (known := installed(name))))
    for title, name, run, arguments, wanted in WAYS:
        try:
            found = run(folder / name, *arguments)
            off = difference(found, expected[wanted]) if wanted else 0.0
            good = off <= (TOLERANCE_INT8 if "int8" in title else TOLERANCE)
            outcome = f"{'right' if good else 'WRONG'}, off by {off:.1e}" if wanted else "refused in words"
        except Exception as error:  # whatever it is, the other ways are tried too
            text = " ".join(str(error).split())
            good = isinstance(error, ImportError) or "requires installing" in text  # of sentence-transformers
            outcome = f"not installed ({text[:80]})" if good else f"FAILED: {type(error).__name__}: {text[:300]}"
        right &= good
        print(f"{title}: {name}: {outcome}", flush=True)
    return right


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("model")
    making.add_argument("folder", type=Path)
    commands.add_parser("check").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.command == "make":
        make(arguments.model, arguments.folder)
    else:
        sys.exit(not check(arguments.folder))


if __name__ == "__main__":
    main()
