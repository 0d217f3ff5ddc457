"""A text task every installation has: which library does this docstring come from?

Docstrings are read by parsing the sources of the installed libraries, never by importing them. Names that would
reveal the answer are masked in all texts. The files read, and their side of the split, depend on hashes of
their paths, so the same library versions give the same data everywhere: about 1,000 texts a library.
Use: python examples/docstrings.py FOLDER
"""

import ast
import csv
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("torch", "sympy", "transformers", "numpy", "networkx", "huggingface_hub", "pandas")
STANDARD = "python"  # the label of the standard library
SKIP = {"site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "_vendor", "__pycache__"}
CAP, VALIDATION_SHARE = 1000, 0.15  # texts a library, and the part of them held out
MIN_WORDS, MAX_WORDS = 8, 60
MASK = "[MASK]"
# Names, inside identifiers too (TorchScript, is_numpy_array); then whole words: the usual aliases.
GIVE_AWAYS = re.compile(
    r"huggingface[_ -]?hub|hugging[ -]?face|hf[_-]hub|pytorch|torch|sympy|numpy|networkx|pandas"
    r"|\btransformers\b|\b(?:np|pd|nx|hf)(?=\b|_)",
    re.IGNORECASE,
)


def sources() -> dict[str, Path]:
    """label -> folder of its sources, for every library that is installed."""
    found = {name: find_spec(name) for name in LIBRARIES}
    folders = {name: Path(spec.origin).parent for name, spec in found.items() if spec and spec.origin}
    return folders | {STANDARD: Path(sysconfig.get_path("stdlib"))}


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def mask(text: str) -> str:
    return GIVE_AWAYS.sub(MASK, text)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one file in source order, white space collapsed; none where the file does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield " ".join((ast.get_docstring(node, clean=False) or "").split())


def collect(label: str, folder: Path, cap: int = CAP) -> dict[str, list[str]]:
    """Up to cap texts of one library: {"train": [...], "validation": [...]}; texts that begin alike are taken once."""
    files = [p.relative_to(folder) for p in folder.rglob("*.py")]
    files = [p for p in files if not SKIP & set(p.parts)]
    held_out = round(cap * VALIDATION_SHARE)
    texts, left, seen = {"train": [], "validation": []}, {"train": cap - held_out, "validation": held_out}, set()
    for file in sorted(files, key=lambda p: (share(f"{label}/{p.as_posix()}"), p)):
        # a whole file goes to one side: neighbours describe the same thing in the same words
        side = "validation" if share(f"split/{label}/{file.as_posix()}") < VALIDATION_SHARE else "train"
        if len(texts[side]) == left[side]:
            continue
        for text in docstrings(folder / file):
            words = mask(text).split()[:MAX_WORDS]
            begin = re.sub(r"\W+", "", "".join(words).lower())[:60]
            if len(words) >= MIN_WORDS and begin not in seen and len(texts[side]) < left[side]:
                seen.add(begin)
                texts[side].append(" ".join(words))
    return texts


def build(folder: Path, libraries: dict[str, Path] | None = None, cap: int = CAP) -> dict[str, int]:
    """Write train.csv and validation.csv (columns sentence, label) into folder; return the rows of each file."""
    libraries = sources() if libraries is None else libraries
    texts = {label: collect(label, source, cap) for label, source in sorted(libraries.items())}
    folder.mkdir(parents=True, exist_ok=True)
    counts, taken = {}, set()
    for side in ("train", "validation"):
        rows = [(text, label) for label, found in texts.items() for text in found[side] if text not in taken]
        rows.sort(key=lambda row: share(row[0]))  # mixed, the same way everywhere
        taken |= {text for text, _ in rows}
        with open(folder / f"{side}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])
        counts[side] = len(rows)
    return counts


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
