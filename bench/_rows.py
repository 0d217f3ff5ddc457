"""Reads and summarizes rows of bench/results; needs the standard library only.

python bench/_rows.py              rewrites bench_masked_linear.jsonl: rows appended by test_layer become medians
python bench/_rows.py show FILE    prints the rows of a file as a table
python bench/_rows.py add FILE     appends them to bench/results, each to the file of its bench
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MASKED = "bench_masked_linear"
# Settings that runs must share to be compared. The machine too: dropout is different on a GPU.
SETTING = ("epochs", "learning_rate", "train_rows", "max_steps", "precision", "accelerator")
RECOVERING = ("recovery", "freeze_embeddings")  # of all methods but the untrimmed one
SETTING += RECOVERING
KEY = ("task", "budget", "method", "seed", *SETTING, "override")
# (pass, rival) whose medians are kept, besides those against dense and the ideal.
_RIVALS = {("step", "F.linear(x, W*M)"), ("fwd", "2:4 of torch"), ("scores", "without")}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def identity(row: dict) -> tuple:
    """The values of KEY that identify a run. Rows without an entry have its default."""
    return tuple(json.dumps(row.get(name), sort_keys=True) for name in KEY)


def control(row: dict, runs: list[dict]) -> float | None:
    """The score in percent of the untrimmed run with the same seed and setting."""
    dense = {"budget": "100%params", "method": "dense", "override": None, **dict.fromkeys(RECOVERING)}
    key = identity({**row, **dense})
    return next((100 * other["score"] for other in runs if identity(other) == key), None)


def summarize(runs: list[dict]) -> list[dict]:
    """One row per (task, budget, method): mean and standard deviation over seeds, and the untrimmed runs' mean.

    Runs with an entry `excluded` (the reason) are left out. A run that was made again counts once, as it was last."""
    groups: dict[tuple, list[dict]] = {}
    runs = list({identity(row): row for row in runs if "excluded" not in row}.values())
    for row in runs:
        groups.setdefault(tuple(row.get(name) for name in ("task", "budget", "method", *SETTING)), []).append(row)
    rows = []
    for (task, budget, method, *setting), group in groups.items():
        controls = [control(row, runs) for row in group]  # the same seeds, or none
        dense = statistics.mean(controls) if None not in controls else None
        scores, last = [100 * row["score"] for row in group], group[-1]
        seconds = [row["seconds"]["total"] for row in group if "seconds" in row]  # paused runs have none
        shared = {"bench": "bench_accuracy", "case": f"{task} {budget} {method}"}
        more = {"seeds": len(group), **{k: v for k, v in zip(SETTING, setting, strict=True) if v is not None}}
        more |= {name: last[name] for name in ("steps", "dense_steps", "encoder_params_after") if name in last}
        more["encoder_share"] = round(last["encoder_params_after"] / last["encoder_params_before"], 4)
        more |= {name: last[name] for name in ("device", "torch", "commit", "date")}
        score = statistics.mean(scores)
        ratio = round(score / dense, 4) if dense else None
        rival = {"rival": "dense" if dense else None, "rival_value": dense and round(dense, 2), "ratio": ratio}
        spread = round(statistics.stdev(scores), 2) if len(scores) > 1 else None
        rows.append(
            {**shared, "metric": "score", "value": round(score, 2), "std": spread, "unit": "%", **rival, **more}
        )
        rows.append({**shared, "metric": "retention", "value": ratio, "unit": "share", **rival, **more})
        if len(seconds) == len(group):
            rows.append(
                {**shared, "metric": "seconds", "value": round(statistics.mean(seconds), 1), "unit": "s", **more}
            )
    return rows


def condense(rows: Iterable[dict]) -> list[dict]:
    """Of the masked matmul: on a GPU medians over layers and numbers of tokens, with `least`, `most` and `cases`;
    on a CPU only rows of complete steps with half the weight kept. Other rows, and medians, are not changed.

    Medians are of the value, or with a rival of the ratio. Pass only the newest row of each case."""
    passed: list[dict] = []
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        on_cpu = " x " in row.get("device", "")  # a CPU is named with its number of threads
        if row.get("bench") != MASKED or "cases" in row:
            passed.append(row)
        elif on_cpu and row["rival"] and row["case"].endswith(" step") and ":0.5 " in row["case"]:
            passed.append(row)
        elif not on_cpu:
            path, grid, _, _, *part = row["case"].split()
            case, metric, rival = " ".join([path, grid, *part]), row["metric"], row["rival"]
            if metric in ("vs_dense", "host_us") or (path, part, metric) == ("default", ["step"], "vs_ideal"):
                groups.setdefault((case, metric, rival, row["device"]), []).append(row)
            elif (part[-1], rival) in _RIVALS:
                groups.setdefault((case, "speedup", rival, row["device"]), []).append(row)
    return passed + [_median(*key, group) for key, group in groups.items()]


def _median(case: str, metric: str, rival: str | None, device: str, group: list[dict]) -> dict:
    values = [row["ratio"] if metric == "speedup" else row["value"] for row in group]
    rivals = [row["rival_value"] for row in group] if metric == "host_us" else []
    row = {**group[-1], "case": case, "metric": metric, "rival": rival, "device": device, "ratio": None}
    row |= {"value": statistics.median(values), "unit": "us" if metric == "host_us" else "1"}
    row |= {"rival_value": statistics.median(rivals) if rivals else None}
    return row | {"least": min(values), "most": max(values), "cases": len(values)}


def table(rows: Iterable[dict]) -> str:
    """One line per row: bench, case, metric, value, unit, and the rival with its value and the ratio, if any."""
    names = ("bench", "case", "metric", "value", "unit", "rival", "rival_value", "ratio")
    lines = [names, *(tuple("" if row.get(name) is None else str(row[name]) for name in names) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def add(rows: Iterable[dict], folder: Path = RESULTS) -> None:
    for row in rows:
        with (folder / f"{row['bench']}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def _condense_file(path: Path) -> None:
    newest = {(row["case"], row["metric"], row["rival"], row["device"]): row for row in read(path)}
    path.write_text("".join(json.dumps(row) + "\n" for row in condense(newest.values())))


def main(arguments: list[str]) -> None:
    match arguments:
        case []:
            _condense_file(RESULTS / f"{MASKED}.jsonl")
        case ["show", name]:
            print(table(read(Path(name))))
        case ["add", name]:
            add(read(Path(name)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
