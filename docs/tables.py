"""bench/results/*.jsonl -> the tables of README.md and docs/*.md, between their markers. Use: make readme

One row of a file is one measurement; a later row of the same bench, case, metric, rival and device replaces an earlier.
Nothing is typed by hand, and a table without rows says so. The tables of the accuracy bench are in accuracy_tables.py.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from accuracy_tables import ablation, accuracy, cost, elsewhere, grids, learning_rates, retention, summary  # noqa: E402
from rows import NOTHING, ROOT, load, markdown, number, on_gpu  # noqa: E402, F401

KERNELS = tuple(
    f"bench_{op}"
    for op in ("block_sensitivity", "select_threshold", "gather_kept", "take_columns", "masked_adamw", "masked_linear")
)


def grouped(rows: list[dict]) -> str:
    """One line a case and metric: ours, then every rival with the factor by which ours is better (below 1: worse)."""
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("bench", "case", "metric", "device"))
        unit = "" if row["unit"] in ("1", "share") else f" {row['unit']}"
        what = "" if row["metric"] == row["unit"] else f" ({row['metric']})"
        line = lines.setdefault(key, [row["bench"].removeprefix("bench_"), row["case"], "", "", row["device"]])
        line[2] = f"{number(row['value'])}{unit}{what}"
        rival = f"{row['rival']} {number(row['ratio'])}" if row.get("rival") else "-"
        line[3] = f"{line[3]} · {rival}".removeprefix(" · ")
    return markdown(["", "case", "ours", "speed-up over", "device"], list(lines.values()))


def kernels(rows: list[dict]) -> str:
    """What was measured beside a rival; of the masked matmul only whole steps on a CPU with half the weight kept."""
    chosen = [r for r in rows if r["bench"] in KERNELS and r.get("rival")]
    half = [r for r in chosen if r["case"].endswith(" step") and ":0.5 " in r["case"] and not on_gpu(r)]
    return grouped([r for r in chosen if r["bench"] != "bench_masked_linear" or r in half])


def headline(rows: list[dict]) -> str:
    """The ops on a GPU at the size of BERT-base: one line each, the whole table is in kernels.md."""
    chosen = [row for row in rows if row["bench"] in KERNELS and row["metric"] == "us" and on_gpu(row)]
    chosen = [row for row in chosen if row["case"] in ("bert-base", "85M") and row.get("rival")]
    return grouped([row for row in chosen if not row["rival"].startswith(("one call", "copy"))])


def masked(rows: list[dict]) -> str:
    """The masked matmul on a GPU: a line a grid and pass, a column a kept share; speed-up over dense.

    The median over layers and numbers of tokens, and in brackets the least and the most."""
    cells: dict[tuple, dict[float, dict]] = {}
    for row in rows:
        if row["bench"] == "bench_masked_linear" and row["metric"] == "vs_dense" and on_gpu(row):
            path, grid, part = row["case"].split()
            name, kept = grid.rsplit(":", 1)
            cells.setdefault((name, path, part, row["device"]), {})[float(kept)] = row
    shares = sorted({share for line in cells.values() for share in line}, reverse=True)
    paths, parts = ["default", "following", "tiles", "bits"], ["step", "fwd", "dX", "dW"]
    lines = []
    for key in sorted(cells, key=lambda key: (key[0], paths.index(key[1]), parts.index(key[2]))):
        found = [cells[key].get(share) for share in shares]
        texts = [f"{row['value']:.2f} ({row['least']:.2f} - {row['most']:.2f})" if row else "-" for row in found]
        lines.append([*key[:3], *texts, str(max(row["cases"] for row in found if row)), key[3]])
    return markdown(["grid", "path", "pass", *(f"{share:.0%} kept" for share in shares), "cases", "device"], lines)


def speed(rows: list[dict]) -> str:
    """Whole models: fine-tuning throughput, forward passes, training steps, and what a whole run costs."""
    benches = [f"bench_{what}" for what in ("finetune", "forward", "step", "cost")]
    return grouped([row for row in rows if row["bench"] in benches])


def runtimes(rows: list[dict]) -> str:
    """One forward pass in other runtimes."""
    return grouped([row for row in rows if row["bench"] == "bench_runtimes"])


def budgets(rows: list[dict]) -> str:
    """Budgets of latency, size and accuracy: what was measured in the end, and what it is held against."""
    lines = []
    for row in rows:
        again = row["metric"].endswith(", model")  # the model that the graph was made of
        if row["bench"] == "bench_budgets" and " tried " not in row["case"] and not again:
            value, unit = number(row["value"]), f" {row['unit']}" if row["unit"] else ""
            rival = f"{row['rival']}: {number(row['rival_value'])}" if row.get("rival") else "-"
            what = f" ({row['metric']})" if row["metric"] != row["unit"] else ""
            lines.append([row["case"], f"{value}{unit}{what}", rival, row["device"]])
    return markdown(["run", "measured", "held against", "device"], lines)


def rank(rows: list[dict]) -> str:
    """One line a predictor, one column a measurement: rank correlation of the predicted and the measured loss."""
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["bench"] == "bench_rank":
            case = row["case"]  # with --name, or the task alone
            found = re.fullmatch(r"(.+? seed \d+(?: compensated)?) (.+)", case) or re.fullmatch(r"(\S+) (.+)", case)
            cells.setdefault(found[2], {})[found[1]] = row["value"]
    columns = sorted({case for line in cells.values() for case in line}, key=lambda case: ("compensated" in case, case))
    order = sorted(cells, key=lambda name: -statistics.mean(cells[name].values()))
    lines = [[name, *(f"{cells[name][c]:.2f}" if c in cells[name] else "-" for c in columns)] for name in order]
    return markdown(["predicted by", *columns], lines)


def embedding(rows: list[dict]) -> str:
    """Embedding models: one line a budget and method, means over seeds with standard errors."""
    runs: dict[tuple[float, str, int], dict[str, dict[str, float]]] = {}  # seed -> score -> value
    original: dict[str, float] = {}
    for row in rows:
        found = re.fullmatch(r"\S+ (\d+)%params (\d+) steps (.+) seed (\d+)", row["case"])
        if row["bench"] == "bench_embedding" and found:
            run = runs.setdefault((float(found[1]), found[3], int(found[2])), {}).setdefault(found[4], {})
            run[row["metric"]] = row["value"]
            original[row["metric"]] = row["rival_value"]
    names = [*original, "mean"]

    def line(budget: str, method: str, steps: str, seeds: list[dict[str, float]]) -> list[str]:
        columns = [[run[name] for run in seeds] for name in original]
        columns.append([statistics.mean(run.values()) for run in seeds])
        return [budget, method, steps, *map(mean_and_error, columns), str(len(seeds))]

    lines = [line("all", "-", "-", [original])] if original else []
    order = sorted(runs, key=lambda key: (-key[2], -key[0], key[1] != "ours", key[1]))
    for budget, method, steps in order:
        seeds = list(runs[budget, method, steps].values())
        lines.append(line(f"{budget:.0f} %", method, f"{steps:,}", seeds))
    return markdown(["encoder left", "units chosen by", "steps", *names, "seeds"], lines)


def mean_and_error(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


TABLES = {
    "embedding": embedding,
    "summary": summary,
    "accuracy": accuracy,
    "elsewhere": elsewhere,
    "learning_rates": learning_rates,
    "retention": retention,
    "grids": grids,
    "cost": cost,
    "kernels": kernels,
    "headline": headline,
    "masked": masked,
    "speed": speed,
    "ablation": ablation,
    "rank": rank,
    "runtimes": runtimes,
    "budgets": budgets,
}


def fill(text: str, rows: list[dict]) -> str:
    """text, with the lines between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def replace(found: re.Match) -> str:
        return f"{found[1]}\n{TABLES[found[2]](rows)}\n{found[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    measured = load(ROOT / "bench" / "results")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        page.write_text(fill(page.read_text(encoding="utf-8"), measured), encoding="utf-8")
