"""Times probes and makes a table of costs from them; also where only a runtime is installed.

    python probe_timing.py FOLDER --save table.json

FOLDER is one of `sensibert latency --probes FOLDER`, which has a copy of this file. It needs numpy and the runtime of
the probes, onnxruntime or openvino, and nothing of sensibert.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS, LEAST, MOST = 20.0, 9, 60  # that all passes take together; rounds, at least and at most
PROBES = "probes.json"
FORMAT = "sensibert.costs"
Levels = Mapping[str, Sequence[int]]  # "heads" or "ffn" -> units that the probes keep, all units last


def median_times(passes: Sequence[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    """Microseconds of every pass by a clock, the median of rounds in which they take turns."""

    def timed(run: Callable[[], object]) -> float:
        begin = clock()
        run()
        return clock() - begin

    for run in passes:
        run()
    begin = time.perf_counter()
    times = [[timed(run)] for run in passes]
    rounds = int(SECONDS / max(1e-9, time.perf_counter() - begin))
    for _ in range(max(LEAST, min(MOST, rounds))):
        for taken, run in zip(times, passes):
            taken.append(timed(run))
    return [1e6 * statistics.median(taken) for taken in times]


def clock_of(threads: int) -> Callable[[], float]:
    """Of one thread the processor's time, which other work on the machine hardly changes."""
    return time.process_time if threads == 1 else time.perf_counter


def table_from(facts: Mapping[str, Any], levels: Levels, sites: Mapping[str, int], costs: Sequence[float]) -> dict:
    """The content of a table of costs. facts: its other fields. sites: sub-layers of each kind in the model. costs: of
    the untrimmed model, then of one probe for each level but the last of each kind."""
    rest, left = costs[0], list(costs[1:])
    made: dict[str, list[list[int]]] = {}
    for kind, counts in levels.items():
        made[kind] = [[0, 0]]
        if not sites[kind]:
            continue
        measured = dict(zip(counts, [*left[: len(counts) - 1], costs[0]]))
        del left[: len(counts) - 1]
        made[kind] = _points(measured, sites[kind])
        rest -= made[kind][-1][1] * sites[kind]
    return {**facts, "rest": max(0, round(rest)), **made}


def _points(measured: Mapping[int, float], sublayers: int) -> list[list[int]]:
    """[units, cost of one sub-layer] from the cost of a whole model by the units that each of its sub-layers keeps.

    A cost below that of fewer units, which only noise explains, is raised. Without a probe of 0 units, which some
    models cannot have, their cost is extrapolated."""
    counts = sorted(measured)
    none = measured[counts[0]]
    if counts[0]:
        none -= counts[0] * (measured[counts[-1]] - none) / (counts[-1] - counts[0])
    points, highest = [[0, 0]], 0
    for count in counts if counts[0] else counts[1:]:
        highest = max(highest, math.ceil((measured[count] - none) / sublayers))
        points.append([count, highest])
    return points


def _opened(file: Path, facts: Mapping[str, Any], inputs: Sequence[str], vocabulary: int) -> Callable[[], object]:
    """One forward pass of a graph in its runtime."""
    import numpy as np

    shape = facts["batch"], facts["length"]
    ids = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int64)
    usual = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    values = {name: usual[name] for name in inputs}
    if facts["runtime"] == "openvino":
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": facts["threads"]}
        compiled = openvino.Core().compile_model(file, "CPU", settings)
        return lambda: compiled(values)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = facts["threads"]
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads hinder what runs next
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the probes in a folder and write a table of costs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save", type=Path, required=True)
    given = parser.parse_args()
    probes = json.loads((given.folder / PROBES).read_text())
    facts = probes["facts"] | {"device": processor()}
    passes = [_opened(given.folder / name, facts, probes["inputs"], probes["vocabulary"]) for name in probes["files"]]
    costs = median_times(passes, clock_of(facts["threads"]))
    table = {"format": FORMAT, **table_from(facts, probes["levels"], probes["sites"], costs)}
    given.save.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written to {given.save}")


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model\t")))
    return next(named, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
