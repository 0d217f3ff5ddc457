"""The tables of the accuracy bench: rows -> Markdown. `tables.py` puts them into the pages."""

import statistics
from collections.abc import Callable, Iterable

from rows import RUNS, key, markdown, number, percent

# The order of columns.
METHODS = ("ours", "fisher", "taylor", "saliency", "soft_gates", "uniform", "torch-pruning", "torch-pruning-magnitude")
METHODS += ("layers", "magnitude", "random")
GRIDS = ("element", "block64")  # masked, not cut
# What people would use instead, as the README calls them.
SHOWN = {"ours": "sensibert", "torch-pruning": "Torch-Pruning", "magnitude": "magnitude", "layers": "dropping layers"}
# Shown by task, but not in the means over tasks: run on a CPU alone, with fewer methods.
APART = ("cola", "snips_slots")
BUDGETS = ("100%params", "75%params", "50%params", "50%flops", "30%params", "20%params", "10%params")


def own_recovery(row: dict) -> list[str]:
    """The settings of recovery that are not the default; none for an untrimmed run."""
    parts = [f"recovery {row['recovery']}"] if row.get("recovery") else []
    frozen = row.get("freeze_embeddings")
    return parts + ([f"embeddings {'frozen' if frozen else 'learn'}"] if frozen is not None else [])


def task_label(row: dict) -> str:
    """The task of an accuracy row, and what distinguishes it from the other rows of that task."""
    parts = [f"{row['train_rows']:,} rows"] if row.get("train_rows") else []
    parts += [f"{row['max_steps']:,} steps"] if row.get("max_steps") else []
    parts += own_recovery(row)
    parts += [row["place"]] if row.get("place") else []
    return row["case"].split()[0] + (f" ({', '.join(parts)})" if parts else "")


def usual_label(row: dict) -> str:
    """The same of the runs with the default recovery, of which the untrimmed run is one."""
    return task_label({**row, "recovery": None, "freeze_embeddings": None})


def is_usual(row: dict) -> bool:
    """Of the default recovery, in the place where most of a task was run; an untrimmed run anywhere."""
    return not own_recovery(row) and not row.get("place")


def _budget(budget: str) -> tuple[int, str]:
    """For sorting: the usual budgets in their order, then others."""
    return (BUDGETS.index(budget) if budget in BUDGETS else len(BUDGETS), budget)


def _extent(row: dict) -> tuple[bool, int]:
    """Of a run, for the largest of a task: a GPU before a CPU, then the number of steps."""
    return row.get("accelerator") is not None, row.get("steps", 0)


def scores(rows: list[dict]) -> list[dict]:
    """The accuracy rows, of each task those of its longest runs: the shorter ones are shown with the ablations.

    Of a task that was run on a GPU those, and equally long ones of a CPU beside them, marked as such. Of several peak
    learning rates of trimmed runs the one at which the untrimmed model scores best; `learning_rates` has the others."""
    found = [row for row in rows if row["bench"] == "bench_accuracy" and row["metric"] == "score"]
    best = _best_rates(found)
    found = [row for row in found if row.get("learning_rate") == best.get(_length(row), row.get("learning_rate"))]
    longest: dict[str, tuple[bool, int]] = {}
    for row in found:
        task = row["case"].split()[0]
        longest[task] = max(longest.get(task, _extent(row)), _extent(row))
    chosen = [row for row in found if _extent(row) == longest[row["case"].split()[0]]]
    beside = [row for row in found if longest[row["case"].split()[0]] == (True, _extent(row)[1]) and row not in chosen]
    return chosen + [{**row, "place": "CPU"} for row in beside]


def _length(row: dict) -> tuple:
    """Equal for runs of one task that differ in learning rate, budget, method or recovery alone."""
    names = ("train_rows", "max_steps", "epochs", "precision", "accelerator")
    return row["case"].split()[0], *(row.get(name) for name in names)


def _best_rates(rows: list[dict]) -> dict[tuple, float]:
    """`_length` -> of the peak learning rates of trimmed runs, the one at which the untrimmed model scores best."""
    trimmed = {(_length(row), row.get("learning_rate")) for row in rows if not row["case"].endswith(" dense")}
    dense = [row for row in rows if row["case"].endswith(" dense")]
    dense = [row for row in dense if (_length(row), row.get("learning_rate")) in trimmed]
    return {_length(row): row.get("learning_rate") for row in sorted(dense, key=lambda row: row["value"])}


def learning_rates(rows: list[dict]) -> str:
    """The untrimmed and the default runs of tasks that were run with several peak learning rates, best rate first."""
    found = [row for row in rows if row["bench"] == "bench_accuracy" and row["metric"] == "score"]
    found = [row for row in found if row["case"].split()[-1] in ("dense", "ours") and not own_recovery(row)]
    rates: dict[tuple, dict[float, list[dict]]] = {}
    for row in found:
        rates.setdefault(_length(row), {}).setdefault(row.get("learning_rate"), []).append(row)
    lines = []
    for length, of in rates.items():
        dense = {rate: row for rate, group in of.items() for row in group if row["case"].endswith(" dense")}
        if len(dense) < 2:
            continue
        for rate in sorted(dense, key=lambda rate: -dense[rate]["value"]):
            ours = {row["case"].split()[1]: _seeds(row) for row in of[rate] if row["case"].endswith(" ours")}
            lines.append([length[0], number(rate), _seeds(dense[rate])])
            lines[-1] += [ours.get(budget, "-") for budget in ("50%params", "20%params")]
    return markdown(["task", "peak learning rate", "untrimmed", "ours at 50 %", "ours at 20 %"], lines)


def _seeds(row: dict) -> str:
    return f"{_score(row)}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"


def off_budget(row: dict, budget: str) -> str:
    """` at 33 %` where a method could not come within a point of a budget in % of the parameters."""
    if not budget.endswith("%params") or "encoder_share" not in row:
        return ""
    share = 100 * row["encoder_share"]
    return f" at {share:.0f} %" if abs(share - float(budget.removesuffix("%params"))) > 1 else ""


def columns_of(methods: set[str]) -> list[str]:
    """In the usual order, unknown ones last."""
    return sorted(methods, key=lambda name: (METHODS.index(name) if name in METHODS else len(METHODS), name))


def accuracy(rows: list[dict]) -> str:
    """The runs with the default recovery: one line a task and budget, one column a method.

    All lines of a task show its untrimmed run. A cell with fewer seeds than its line says so."""
    return _accuracy(scores(rows), is_usual)


def elsewhere(rows: list[dict]) -> str:
    """The same of the other runs: with another recovery, and on a CPU where the task was run on a GPU too."""
    return _accuracy(scores(rows), lambda row: not is_usual(row))


def _score(row: dict) -> str:
    return f"{row['value']:.2f}" + (f" ± {row['std']:.2f}" if row.get("std") is not None else "")


def _accuracy(rows: list[dict], shown: Callable[[dict], bool]) -> str:
    most: dict[tuple[str, str], int] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    controls: dict[str, str] = {}  # an untrimmed run has no recovery
    control: dict[str, str] = {}
    for row in filter(shown, rows):
        place = task_label(row), row["case"].split()[1]
        most[place] = max(most.get(place, 1), row.get("seeds", 1))
    for row in rows:
        _, budget, method = row["case"].split(maxsplit=2)
        task, seeds = task_label(row), row.get("seeds", 1)
        text = _score(row)
        control[task] = usual_label(row)
        if method == "dense":
            controls[task] = text
        if method == "dense" or not shown(row):
            continue
        text += (f" ({100 * row['ratio']:.1f} %)" if row.get("ratio") is not None else "") + off_budget(row, budget)
        text += f", {seeds} seed{'s' * (seeds > 1)}" if seeds < most[task, budget] else ""
        cells.setdefault((task, budget), {})[method] = text
    methods = columns_of({name for cell in cells.values() for name in cell})
    labels = [label for label, _ in cells]
    order = sorted(cells, key=lambda at: (at[0].split()[0], labels.index(at[0]), _budget(at[1])))
    lines = [
        [*at, controls.get(control[at[0]], "-"), *(cells[at].get(m, "-") for m in methods), str(most[at])]
        for at in order
    ]
    return markdown(["task", "budget", "untrimmed", *methods, "seeds"], lines)


def summary(rows: list[dict]) -> str:
    """The README's table: scores of every task at half of the encoder, then the mean share kept, a line a budget."""
    cells: dict[str, dict[str, str]] = {}
    for row in filter(is_usual, scores(rows)):
        task, budget, method = row["case"].split(maxsplit=2)
        if task in APART:
            continue
        if method == "dense" or (budget == "50%params" and method in SHOWN):
            cells.setdefault(task, {})[method] = _score(row)
    lines = [[task, cells[task].get("dense", "-")] for task in sorted(cells) if len(cells[task]) > 1]
    lines = [[*line, *(cells[line[0]].get(method, "-") for method in SHOWN)] for line in lines]
    found = kept([row for row in scores(rows) if row["case"].split()[-1] in SHOWN])
    for budget in (name for name in ("50%params", "30%params", "20%params", "10%params") if name in found):
        shares = {name: {task: share_kept(runs) for task, runs in of.items()} for name, of in found[budget].items()}
        most = max(map(len, shares.values()))
        texts = [_mean(shares[m]) + _fewer(len(shares[m]), most) if m in shares else "-" for m in SHOWN]
        lines.append([f"score kept at {budget.removesuffix('%params')} %", "100 %", *texts])
    return markdown(["", "untrimmed", *SHOWN.values()], lines)


def _fewer(tasks: int, most: int) -> str:
    return f" ({tasks} task{'s' * (tasks > 1)})" if tasks < most else ""


def retention(rows: list[dict]) -> str:
    """One line a budget, one column a method: the share of the untrimmed score that is kept, mean over tasks.

    Of a task the mean over all its runs with the default recovery, of a GPU and of a CPU, each beside the untrimmed run
    of the same seed and place. What a task has above the untrimmed score does not make up for another: it counts as
    100 %. For `ours` the lowest task is named; beside a rival is what `ours` keeps on the same tasks in the same
    places, and the number of tasks, where fewer than those of `ours`."""
    return _retention([row for row in scores(rows) if row["case"].split()[-1] not in GRIDS])


def grids(rows: list[dict]) -> str:
    """The same of the grids whose blocks are masked, beside `ours`, and of no other method."""
    found = [row for row in scores(rows) if row["case"].split()[-1] in ("ours", *GRIDS)]
    budgets = {row["case"].split()[1] for row in found if row["case"].split()[-1] in GRIDS}
    return _retention([row for row in found if row["case"].split()[1] in budgets])


def kept(rows: list[dict]) -> dict[str, dict[str, dict[str, dict[str, tuple[float, int]]]]]:
    """budget -> method -> task -> place -> (share of the untrimmed score, over how many seeds); default recovery.

    Without tasks that are APART."""
    found: dict = {}
    for row in rows:
        task, budget, method = row["case"].split(maxsplit=2)
        if (
            task not in APART
            and row.get("ratio") is not None
            and method != "dense"
            and budget != "100%params"
            and not own_recovery(row)
        ):
            label, place = task_label({**row, "place": ""}), row.get("place", "")
            runs = found.setdefault(budget, {}).setdefault(method, {}).setdefault(label, {})
            runs[place] = row["ratio"], row.get("seeds", 1)
    return found


def _retention(rows: list[dict]) -> str:
    found = kept(rows)
    rivals = columns_of({method for methods in found.values() for method in methods} - {"ours"})
    lines = []
    for budget in sorted(found, key=_budget):
        all_ours = found[budget].get("ours", {})
        ours = {label: share_kept(runs) for label, runs in all_ours.items()}
        number = sum(seeds for runs in all_ours.values() for _, seeds in runs.values())
        cells = [f"{_mean(ours)}, {_lowest(ours)}" if ours else "-"]
        for rival in rivals:
            theirs = found[budget].get(rival, {})
            same = [
                share_kept(all_ours[label], runs)
                for label, runs in theirs.items()
                if runs.keys() <= all_ours.get(label, {}).keys()
            ]
            notes = [f"ours {percent(statistics.mean(same))}"] if same and len(same) == len(theirs) else []
            notes += [f"{len(theirs)} task{'s' * (len(theirs) > 1)}"] if len(theirs) < len(ours) else []
            shares = {label: share_kept(runs) for label, runs in theirs.items()}
            cells.append((_mean(shares) + (f" ({', '.join(notes)})" if notes else "")) if shares else "-")
        lines.append([budget, f"{len(ours)}, {number}", *cells])
    return markdown(["budget", "tasks, runs of ours", "ours, lowest task", *rivals], lines)


def pooled(runs: Iterable[tuple[float, int]]) -> float:
    """Mean of (share of the dense score, over how many seeds), every seed counted once."""
    shares, seeds = zip(*runs, strict=True)
    return sum(share * number for share, number in zip(shares, seeds, strict=True)) / sum(seeds)


def share_kept(runs: dict[str, tuple[float, int]], like: dict[str, tuple[float, int]] | None = None) -> float:
    """Mean of what stays over the runs of all places, at most 1; like: over the places, and as many runs, as there."""
    weights = {place: seeds for place, (_, seeds) in (like or runs).items()}
    return min(1.0, pooled((runs[place][0], seeds) for place, seeds in weights.items()))


def _mean(shares: dict[str, float]) -> str:
    return percent(statistics.mean(shares.values()))


def _lowest(shares: dict[str, float]) -> str:
    label = min(shares, key=shares.get)
    return f"{label} {percent(shares[label])}"


def cost(rows: list[dict]) -> str:
    """One line a budget: FLOPs of a whole run of `ours` relative to the untrimmed run; least and most of the tasks.

    No seconds, since the runs shared their machine: bench_cost measures those."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in scores(rows):
        task, budget, method = row["case"].split(maxsplit=2)
        if method == "ours" and row.get("dense_steps"):
            found.setdefault(budget, {}).setdefault(task, []).append(row["dense_steps"] / row["steps"])
    lines = []
    for budget in sorted(found, key=_budget):
        shares = [share for of_task in found[budget].values() for share in of_task]
        lines.append([budget, f"{min(shares):.2f} - {max(shares):.2f}", str(len(found[budget]))])
    return markdown(["budget", "FLOPs of a run, untrimmed run = 1", "tasks"], lines)


def ablation(rows: list[dict]) -> str:
    """One line a change of the recipe, below its controls with the same steps: mean and deviation over seeds.

    Beside a change is the score of the default recipe on the same seeds, since seeds differ. Where all
    embeddings were treated otherwise than by default, so were those of the controls. Of the controls that the accuracy
    tables have, only the untrimmed and the default run are repeated."""
    shown = {key(row) for row in scores(rows) if row["case"].split()[-1] not in ("ours", "dense")}
    tried: dict[tuple, dict[str, list[dict]]] = {}
    shared = ("epochs", "precision", "accelerator", "freeze_embeddings")
    for row in rows:
        if row["bench"] == "bench_accuracy_ablation" and "epochs" in row:
            case, _, change = row["case"].partition(", ")
            where = (case.removesuffix(" ours"), *(row.get(name) for name in shared))
            tried.setdefault(where, {}).setdefault(change, []).append(row)
    lines = []
    for (case, *setting), changes in sorted(tried.items(), key=lambda item: -item[0][1]):  # long runs first
        alike = [{**row, shared[-1]: setting[-1]} if row["case"].endswith(" dense") else row for row in rows]
        same = [row for row in alike if [row.get(name) for name in shared] == setting]
        usual = [row for row in same if row["bench"] == RUNS and not row.get("recovery")]
        runs = {(row["case"], row["seed"]): 100 * row["score"] for row in usual}
        how = ", ".join([number(setting[0]), *filter(None, setting[1:-1]), *own_recovery({shared[-1]: setting[-1]})])
        for row in same:
            what = _control_label(row, case)
            if what is not None and key(row) not in shown:
                cells = _cells([row["value"]], row.get("std"), row.get("ratio"), [], row.get("seeds", 1))
                lines.append([case, how, what, *cells])
        for change, found in sorted(changes.items()):
            values, seeds = [row["value"] for row in found], [row.get("seed") for row in found]
            spread = statistics.stdev(values) if len(values) > 1 else None
            task = case.split()[0]
            dense = [runs.get((f"{task} 100%params dense", row.get("seed")), row["rival_value"]) for row in found]
            ratio = statistics.mean(values) / statistics.mean(dense) if all(dense) else None
            default = [runs.get((f"{case} ours", seed)) for seed in seeds]
            lines.append([case, how, change, *_cells(values, spread, ratio, default, len(values))])
    return markdown(
        ["task, budget", "epochs", "what was changed", "score", "of untrimmed", "default, same seeds", "seeds"], lines
    )


def _control_label(row: dict, case: str) -> str | None:
    """How a row is named among the controls of a case; None: it is none of them."""
    if row["bench"] != "bench_accuracy" or row["metric"] != "score" or not row["case"].startswith(f"{case} "):
        return None
    method = row["case"].removeprefix(f"{case} ")
    if method == "ours" and row.get("recovery"):
        return f"recovery {row['recovery']}"
    names = {"ours": "**the default recipe**", "dense": "untrimmed"}
    return None if row.get("recovery") else names.get(method, method)


def _cells(values: list[float], spread: float | None, ratio: float | None, usual: list, seeds: int) -> list[str]:
    score = f"{statistics.mean(values):.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    default = f"{statistics.mean(usual):.2f}" if usual and None not in usual else "-"
    return [score, f"{100 * ratio:.1f} %" if ratio is not None else "-", default, str(seeds)]
