"""Which method keeps most of the score at equal encoder parameters and equal steps?

    python bench/bench_accuracy.py --data DATA --model MODEL --task banking77 --budgets 50%params 30%params

DATA holds a folder a task with train and validation files. Each finished run is a line of results/bench_accuracy_runs.
jsonl; a run that is there already is not made again, so an interrupted bench is simply started again. Runs of one seed
share their dense warm-up: it is trained once and all methods branch from its last step (bit for bit what separate runs
would do; their `seconds` include it). `ours` is the default recipe; `dense` is the control with the same steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from _harness import RESULTS, machine

from sensibert.checkpoints import partial_folder
from sensibert.options import Options
from sensibert.recipe import finetune_and_trim
from sensibert.steps import evaluate_folder
from sensibert.tasks import get_task

RUNS, ROWS = RESULTS / "bench_accuracy_runs.jsonl", RESULTS / "bench_accuracy.jsonl"
METHODS = {"ours": "fisher", "magnitude": "magnitude", "random": "random"}  # the name in a row -> --method
KEY = ("task", "budget", "method", "seed", "epochs", "learning_rate")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def data_files(folder: Path) -> tuple[str, str]:
    found = [sorted(folder.glob(f"{split}.*")) for split in ("train", "validation")]
    if not all(found):
        raise SystemExit(f"{folder}: want train.* and validation.*")
    return str(found[0][0]), str(found[1][0])


def key(arguments: argparse.Namespace, budget: str, method: str, seed: int) -> tuple:
    return arguments.task, budget, method, seed, arguments.epochs, arguments.learning_rate


def run(arguments: argparse.Namespace, budget: str, method: str, seed: int, work: Path) -> dict:
    """One run, from the shared warm-up of its seed if there is one; the first run of a seed leaves it behind."""
    train, validation = data_files(Path(arguments.data) / arguments.task)
    warm, output = work / f"{arguments.task}-{seed}-warm", work / f"{arguments.task}-{seed}-{budget}-{method}"
    trims, branch = method != "dense", warm.exists()
    partial = partial_folder(output)
    if trims and branch and not any(partial.glob("checkpoint-*")):
        shutil.copytree(warm, partial, dirs_exist_ok=True)
    result = finetune_and_trim(
        Options(
            model=arguments.model,
            output=str(output),
            train_file=train,
            budget=budget if trims else Options.budget,
            method=METHODS.get(method, method),
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            seed=seed,
            save_before_cut=trims and not branch,
            keep_checkpoints=trims and not branch,
            save_steps=10**9,
            resume=True,
            overwrite=True,
            quiet=True,
        )
    )
    scored = evaluate_folder(Options(model=str(output), output="", validation_file=validation))
    if trims and not branch:
        warm.mkdir()
        dense = min(partial.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        shutil.move(dense, warm / dense.name)
        shutil.rmtree(partial)
    metric = get_task(scored["task"]).main_metric
    kept = ("steps", "encoder_params_before", "encoder_params_after", "flops_before", "flops_after", "seconds")
    asked = dict(
        zip(KEY, (arguments.task, budget, method, seed, arguments.epochs, arguments.learning_rate), strict=True)
    )
    facts = {"metric": metric, "score": scored["metrics"][metric], **{name: result[name] for name in kept}}
    shutil.rmtree(output)
    return {**asked, **facts, **machine()}


def summarize(runs: list[dict]) -> list[dict]:
    """A row a (task, budget, method): mean and standard deviation over seeds, beside the dense control's mean."""
    groups: dict[tuple, list[dict]] = {}
    for row in runs:
        groups.setdefault((row["task"], row["budget"], row["method"], row["epochs"], row["learning_rate"]), []).append(
            row
        )
    rows = []
    for (task, budget, method, *setting), found in groups.items():
        seeds = {row["seed"] for row in found}
        control = groups.get((task, "100%params", "dense", *setting), [])
        control = [100 * row["score"] for row in control if row["seed"] in seeds]  # the same seeds, or none
        scores, last = [100 * row["score"] for row in found], found[-1]
        dense = statistics.mean(control) if len(control) == len(seeds) else None
        seconds = [row["seconds"]["total"] for row in found if "seconds" in row]  # taken out of runs that were paused
        shared = {"bench": "bench_accuracy", "case": f"{task} {budget} {method}"}
        more = {"seeds": len(found), "epochs": setting[0], "learning_rate": setting[1], "steps": last["steps"]}
        more |= {name: last[name] for name in ("encoder_params_after", "device", "torch", "commit", "date")}
        score = statistics.mean(scores)
        ratio = round(score / dense, 4) if dense else None
        rival = {"rival": "dense" if dense else None, "rival_value": dense and round(dense, 2), "ratio": ratio}
        spread = round(statistics.stdev(scores), 2) if len(scores) > 1 else None
        rows.append(
            {**shared, "metric": "score", "value": round(score, 2), "std": spread, "unit": "%", **rival, **more}
        )
        rows.append({**shared, "metric": "retention", "value": ratio, "unit": "share", **rival, **more})
        if len(seconds) == len(found):
            rows.append(
                {**shared, "metric": "seconds", "value": round(statistics.mean(seconds), 1), "unit": "s", **more}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, help="a folder of DATA")
    parser.add_argument("--budgets", nargs="+", default=["50%params"])
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--work", default="/tmp/bench_accuracy", help="folder for the runs' files")
    arguments = parser.parse_args()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        cases = [("100%params", "dense")] if "dense" in arguments.methods else []
        cases += [(budget, m) for budget in arguments.budgets for m in arguments.methods if m != "dense"]
        for budget, method in cases:
            asked = key(arguments, budget, method, seed)
            if any(tuple(row[name] for name in KEY) == asked for row in read(RUNS)):
                continue
            row = run(arguments, budget, method, seed, work)
            append(RUNS, row)
            ROWS.write_text("".join(json.dumps(line) + "\n" for line in summarize(read(RUNS))))
            print(f"{arguments.task} {budget} {method} seed {seed}: {100 * row['score']:.2f}", flush=True)


if __name__ == "__main__":
    main()
