"""The rows of bench/results, and how a table is written."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from _rows import condense, read, summarize  # noqa: E402

KEY = ("bench", "case", "metric", "rival", "device", "train_rows", "max_steps", "epochs", "learning_rate")
KEY += ("precision", "accelerator", "recovery", "freeze_embeddings", "seed")
RUNS = "bench_accuracy_runs"
NOTHING = "No rows yet."


def load(folder: Path) -> list[dict]:
    """The newest row of every KEY, in the order of their first appearance."""
    rows: dict[tuple, dict] = {}
    for path in sorted(folder.glob("bench_*.jsonl")):
        found = read(path)
        for row in (summarize(found) if path.stem == RUNS else []) + found:
            if "bench" not in row:  # one run of bench_accuracy
                row |= {"bench": RUNS, "case": f"{row['task']} {row['budget']} {row['method']}"}
            rows[key(row)] = row
    return condense(rows.values())


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return NOTHING
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def on_gpu(row: dict) -> bool:
    return " x " not in row["device"]  # a CPU is named with its number of threads
