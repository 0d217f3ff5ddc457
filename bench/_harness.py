"""Timing, and the rows of bench/results. A bench proves its result first: a wrong kernel has no speed.

On a GPU: CUDA events around each call, arguments rotated so that nothing is left in L2, the median. On a CPU:
pytest-benchmark's fixture or a clock, the median.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

BENCH = Path(__file__).resolve().parent
RESULTS = Path(
    os.environ.get("SENSIBERT_RESULTS") or BENCH / "results"
)  # gpu.sh keeps rows apart until a bench succeeds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_S, MEASURE_S, MOST_CALLS = (0.3, 0.5, 500) if DEVICE == "cuda" else (0.0, 2.0, 50)


class Timing(NamedTuple):
    """Microseconds of one call."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, times_us: Sequence[float]) -> Timing:
        if len(times_us) == 1:
            return cls(times_us[0], times_us[0], times_us[0])
        fifths = statistics.quantiles(times_us, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(times_us), fifths[3])


def measure(function: Callable, rotation: Sequence[tuple]) -> Timing:
    """Time function(*arguments) with the next arguments of the rotation at each call. They should exceed twice L2."""
    for arguments in rotation:
        function(*arguments)  # allocates and compiles, which is not measured
    times, calls, begin = [], 0, time.perf_counter()
    host = host_us(function, rotation[0], calls=2)
    while (spent := time.perf_counter() - begin) < WARM_UP_S + MEASURE_S and len(times) < MOST_CALLS or len(times) < 2:
        elapsed_us = _one(function, rotation[calls % len(rotation)], host)
        calls += 1
        if spent >= WARM_UP_S:  # clocks have settled
            times.append(elapsed_us)
    return Timing.of(times)


def _one(function: Callable, arguments: tuple, host: float = 50.0) -> float:
    """host: microseconds that the host spends in a call."""
    if DEVICE == "cpu":
        begin = time.perf_counter()
        function(*arguments)
        return 1e6 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(3_000 * host + 100_000))  # launches queue up, so that the GPU is timed, not the host
    begin.record()
    function(*arguments)
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


Call = tuple[Callable, Sequence[tuple]]  # a function and the rotation of its arguments


def captured_us(calls: dict[str, Call], least_us: float, rounds: int = 11) -> dict[str, float]:
    """Median microseconds of each (function, rotation) on the GPU alone: replays of CUDA graphs, alternately.

    A graph repeats the calls of the rotation until it takes about `least_us`, so that its own launch does not count.
    Memory for results belongs to the graph."""
    graphs = {name: _capture(function, rotation, least_us) for name, (function, rotation) in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(-2, rounds):
        for name, (graph, count) in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 0:
                times[name].append(1e3 * begin.elapsed_time(end) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def _capture(function: Callable, rotation: Sequence[tuple], least_us: float) -> tuple[torch.cuda.CUDAGraph, int]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for arguments in rotation:  # the first call compiles and fills caches
            function(*arguments)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        begin.record()
        function(*rotation[0])
        end.record()
    torch.cuda.current_stream().wait_stream(side)
    end.synchronize()
    repeats = math.ceil(least_us / (1e3 * begin.elapsed_time(end) * len(rotation)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in [*rotation] * repeats:
            function(*arguments)
    return graph, repeats * len(rotation)


def host_us(function: Callable, arguments: tuple, calls: int = 200) -> float:
    """Microseconds the host spends in one call, without waiting for the GPU."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function(*arguments)
        times.append(1e6 * (time.perf_counter() - begin))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times)


def timed(benchmark, function: Callable, rotation: Sequence[tuple]) -> Timing:
    """measure(), shown in pytest-benchmark's table too."""
    if DEVICE == "cpu":
        turn = iter(range(10**9))
        setup = lambda: (rotation[next(turn) % len(rotation)], {})  # noqa: E731 (pedantic wants (args, kwargs))
        benchmark.pedantic(function, setup=setup, rounds=7, warmup_rounds=1)
        return Timing.of([1e6 * seconds for seconds in benchmark.stats.stats.data])
    timing = measure(function, rotation)
    benchmark.extra_info["gpu_us"] = timing.median
    benchmark.pedantic(function, args=rotation[0], rounds=1)
    return timing


def copy_us(num_bytes: int) -> float:
    """A device copy that moves num_bytes, half read and half written: the limit that memory sets."""
    count = max(num_bytes // 8, 1)
    return measure(
        torch.Tensor.copy_, [(torch.empty(count, device=DEVICE), torch.randn(count, device=DEVICE))] * 2
    ).median


@cache
def machine() -> dict[str, str]:
    """Device, versions and commit of a row. SENSIBERT_COMMIT names the commit of a tree without .git."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{_cpu_name()} x {torch.get_num_threads()}"
    command = ["git", "-C", str(BENCH), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    commit = os.environ.get("SENSIBERT_COMMIT") or commit or "unknown"
    return {"device": name, "torch": torch.__version__, "commit": commit, "date": date.today().isoformat()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def record(
    bench: str,
    case: str,
    metric: str,
    value: float,
    unit: str,
    rival: str | None = None,
    rival_value: float | None = None,
) -> dict:
    """Append a row to results/<bench>.jsonl and print it. Ratio above 1: we are better (less time, a larger share)."""
    row = {"bench": bench, "case": case, "metric": metric, "value": round(value, 4), "unit": unit, "rival": rival}
    row |= {"rival_value": None if rival_value is None else round(rival_value, 4), "ratio": None}
    if rival_value is not None:
        row["ratio"] = round(rival_value / value if unit in ("us", "ms", "s", "MB") else value / rival_value, 3)
    row |= machine()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{bench}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    return row
