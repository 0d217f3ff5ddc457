"""The readers of files, fuzzed with coverage as the guide: bytes that no test thought of. Not collected by pytest.

    pip install atheris
    PYTHONPATH=. python tests/fuzz/readers.py plan -max_total_time=60   # options of libFuzzer may follow the name

A reader gets bytes, and may raise SensibertError and nothing else; `all` takes turns among the readers. Each starts
from a file that is whole, which tests/test_readers.py reads too. Bytes that break one are left in the current folder as
`crash-...`, after one byte that is the number of the reader; `python tests/fuzz/readers.py plan crash-...` reads them
again.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def instrumented() -> contextlib.AbstractContextManager:
    """Imports within report the branches that are taken; for a test they are plain imports."""
    if __name__ != "__main__":
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["sensibert"])


with instrumented():
    import torch
    from safetensors.torch import load_file, save_file

    from sensibert import SensibertError, TrimConfig
    from sensibert.cli_options import _read_yaml
    from sensibert.core.artifacts import Plan, Sensitivity
    from sensibert.core.cost_table import CostTable
    from sensibert.core.folder_facts import read_result
    from sensibert.core.grid import Grid
    from sensibert.core.model_folder import want_model_folder
    from sensibert.data.files import load_examples
    from sensibert.models.masks import Masks
    from sensibert.models.pooling import read_pooling
    from sensibert.models.structure import read_structure
    from sensibert.training.manifest import MANIFEST, check_manifest, write_manifest
    from sensibert.training.run_memory import MEMORY, RunMemory
    from tests.core.small import block_plan, sensitivity, unit_plan
    from tests.damage import VALUES
    from tests.test_damaged_files import CONFIG, DATA, FIXTURES, LISTED, ROWS, metadata_of, parquet, read, rows_of

TABLE = CostTable("latency", "onnx", 500, ((0, 0), (4, 90)), ((0, 0), (64, 70)), "bert", 32, "a device", 2, 1, 64)
MEMORY_OF_A_RUN = {"seconds": {"warm": 1.5}, "tokens": {"warm": 3}, "metrics_at_cut": None, "settings": {"a": 1}}
YAML = "budget: 50%params\nwidth-multiple: 32\nscope: encoder # a note\noutput: 'here'\n"
Read = Callable[[bytes], object]


def targets(place: Path) -> Iterator[tuple[str, bytes, Read]]:
    """Name, a file that is whole, and what reads such bytes in the folder `place`."""

    def of_file(name: str, reader: Callable[[Path], object]) -> Read:
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return lambda data: (file.write_bytes(data), reader(file))

    def of_facts(name: str, kind: type) -> tuple[bytes, Read]:
        tensors, metadata = load_file(place / name), metadata_of(place / name)

        def reader(data: bytes) -> None:
            text = data.decode(errors="replace").replace("\0", "")
            save_file(tensors, place / "other", metadata | {"facts": text})
            read(place / "other", kind)

        return metadata["facts"].encode(), reader

    for name, make, kind in (
        ("plan", unit_plan, Plan),
        ("blocks", block_plan, Plan),
        ("sensitivity", sensitivity, Sensitivity),
    ):
        make().save(place / name)
        yield name, (place / name).read_bytes(), of_file("other", lambda file, kind=kind: read(file, kind))
        yield f"{name}-facts", *of_facts(name, kind)

    masks = Masks(Grid.block(2, 2), {"a.weight": torch.ones(3, 11, dtype=torch.bool)}, {"budget": "50%params"})
    bits, facts = masks.packed()
    save_file(bits, place / "masks", facts)
    for name, file in (("masks", place / "masks"), ("structure", FIXTURES / "unit" / "structure.safetensors")):
        yield name, file.read_bytes(), of_file("structure", read_structure)

    TABLE.save(place / "table")
    yield "costs", (place / "table").read_bytes(), of_file("costs.json", CostTable.load)
    result = (FIXTURES / "unit" / "result.json").read_bytes()
    yield "result", result, of_file("result.json", read_result)
    config = json.dumps(CONFIG).encode()
    yield "config", config, of_file("m/config.json", lambda file: want_model_folder(file.parent, "model"))
    yield "settings", TrimConfig().to_json().encode(), lambda data: TrimConfig.from_json(data.decode(errors="replace"))
    yield "yaml", YAML.encode(), of_file("recipe.yaml", _read_yaml)

    (place / "c").mkdir()
    (place / "c" / "model.safetensors").write_bytes(b"weights")
    write_manifest(place / "c")
    manifest = (place / "c" / MANIFEST).read_bytes()
    yield "manifest", manifest, of_file(f"c/{MANIFEST}", lambda file: check_manifest(file.parent, "checkpoint"))
    memory = json.dumps(MEMORY_OF_A_RUN | {"table": TABLE.to_dict()}).encode()
    yield "memory", memory, of_file(f"r/{MEMORY}", lambda file: RunMemory().restore(file.parent))

    whole = {name: json.dumps(content).encode() for name, content in LISTED.items()}

    def sentence_reader(name: str) -> Read:
        def reader(data: bytes) -> None:
            for other, content in (whole | {name: data}).items():
                (place / "st" / other).write_bytes(content)
            read_pooling(str(place / "st"))

        return reader

    (place / "st" / "1_Pooling").mkdir(parents=True)
    for name, content in whole.items():
        yield f"st-{name.replace('/', '-')}", content, sentence_reader(name)
    files = {"x.parquet": parquet(), "x.json": json.dumps(ROWS).encode()}
    for name, content in (DATA | files).items():
        yield name, content, of_file(name, rows_of if name != "x.txt" else lambda file: load_examples(str(file)))


def changed(content: Any, rng: random.Random) -> bytes:
    """The JSON text of a value of which one part, at any depth, is another or gone: bytes alone rarely stay JSON."""
    whole = parent = {"": content}
    key: Any = ""
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    if parent is not whole and rng.random() < 0.2:
        del parent[key]
        return json.dumps(whole[""]).encode()
    parent[key] = "HERE"
    return json.dumps(whole[""]).replace('"HERE"', rng.choice(VALUES), 1).encode()


def main() -> None:
    import atheris

    with tempfile.TemporaryDirectory() as scratch:
        every = {name: (seed, reader) for name, seed, reader in targets(Path(scratch))}
        if len(sys.argv) < 2 or sys.argv[1] not in (*every, "all"):
            sys.exit(f"name a reader, or all: {' '.join(every)}")
        name = sys.argv.pop(1)
        chosen = list(every.values()) if name == "all" else [every[name]]
        (seeds := Path(scratch) / "seeds").mkdir()
        for number, (seed, _) in enumerate(chosen):
            (seeds / str(number)).write_bytes(bytes([number]) + seed)

        def one(data: bytes) -> None:
            _, reader = chosen[data[0] % len(chosen) if data else 0]
            with contextlib.suppress(SensibertError):
                reader(data[1:])

        def mutated(data: bytes, most: int, seed: int) -> bytes:
            rng, text = random.Random(seed), b""
            with contextlib.suppress(ValueError, RecursionError):
                text = changed(json.loads(data[1:]), rng) if rng.random() < 0.7 else b""
            return data[:1] + text if 0 < len(text) < most else atheris.Mutate(data, most)

        given = [] if any(not argument.startswith("-") for argument in sys.argv[1:]) else [str(seeds)]
        atheris.Setup([*sys.argv, *given], one, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
