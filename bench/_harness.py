"""Timing, and the rows of bench/results. A bench proves its result first: a wrong kernel has no speed.

On a GPU: CUDA events around each call, arguments rotated so that nothing is left in L2, the median. On a CPU:
pytest-benchmark's fixture or a clock, the median.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_S, MEASURE_S, MOST_CALLS = (1.0, 2.0, 2000) if DEVICE == "cuda" else (0.0, 2.0, 50)


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
    """function(*arguments), with the next arguments of the rotation at each call. Give at least twice L2 in all."""
    for arguments in rotation:
        function(*arguments)  # allocations and compilation are not what is asked for
    times, calls, begin = [], 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < WARM_UP_S + MEASURE_S and len(times) < MOST_CALLS:
        elapsed_us = _one(function, rotation[calls % len(rotation)])
        calls += 1
        if spent >= WARM_UP_S:  # clocks have settled
            times.append(elapsed_us)
    return Timing.of(times)


def _one(function: Callable, arguments: tuple) -> float:
    if DEVICE == "cpu":
        begin = time.perf_counter()
        function(*arguments)
        return 1e6 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000)  # the launches queue up meanwhile: what is timed is the card, not the host
    begin.record()
    function(*arguments)
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def host_us(function: Callable, arguments: tuple, calls: int = 200) -> float:
    """Microseconds the host spends in one call, without waiting for the card."""
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
    """A device copy that moves num_bytes in all, half read and half written: the limit of what memory allows."""
    count = max(num_bytes // 8, 1)
    return measure(
        torch.Tensor.copy_, [(torch.empty(count, device=DEVICE), torch.randn(count, device=DEVICE))] * 2
    ).median


def machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{_cpu_name()} x {torch.get_num_threads()}"
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
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
        row["ratio"] = round(rival_value / value if unit in ("us", "s") else value / rival_value, 3)
    row |= machine()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{bench}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    return row
