"""Which method keeps most of the score at equal encoder parameters and equal steps?

    python bench/bench_accuracy.py --data DATA --model MODEL --task banking77 --budgets 50%params 30%params
    ... --methods dense ours uniform layers torch-pruning torch-pruning-magnitude magnitude random
    ... --methods element block64 --budgets 50%params 10%params   # `ours` on other grids: masked, not cut
    ... --override recover_peak=1 --override schedule=cubic    # an ablation: `ours` with these options
    ... --train-rows 20000 --max-steps 500                   # a part of a large set; the rows say so

DATA has one folder per task, with train and validation files. Each finished run is a line of
results/bench_accuracy_runs. jsonl (with --override of bench_accuracy_ablation.jsonl). Runs with a line are skipped, so
start an interrupted bench again; processes with other seeds or tasks may run at the same time. Runs of one seed share
their untrimmed warm-up: the first run that trims saves its last step before the cut, and the others continue from it
(with the same bits as separate runs; their `seconds` include the warm-up). `ours` is the default recipe;
`dense` is the control with the same steps; the rivals are those of rivals.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from pathlib import Path

from _harness import DEVICE, machine
from _rows import RECOVERING, RESULTS, SETTING, control, identity, read
from rivals import RIVALS, Layers

from sensibert.commands import evaluate_folder
from sensibert.core.config import TrimConfig
from sensibert.core.schedule import RECOVERIES, Schedule
from sensibert.core.settings import former_names
from sensibert.data.files import load_examples
from sensibert.data.tasks import get_task
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import PRECISIONS, SNAPSHOT, Options, all_names
from sensibert.training.checkpoints import partial_folder

RUNS, ABLATION = RESULTS / "bench_accuracy_runs.jsonl", RESULTS / "bench_accuracy_ablation.jsonl"
OURS = {
    "ours": {},
    "uniform": {"allocation": "uniform"},
    "element": {"grid": "element"},
    "block64": {"grid": "block64"},
}
SCORES = {"cola": "matthews"}  # sets with a score of their own; otherwise that of the task
OURS |= {name: {"method": name} for name in ("fisher", "magnitude", "random")}
# Options that change nothing before the cut: runs that differ in these alone share their warm-up.
AFTER_THE_CUT = {"method", "allocation", "width_multiple", "grid", "samples", "micro_batch", "compensate", "schedule"}
AFTER_THE_CUT |= {"trim_duration", "milestones", "rewarm_ratio", "recover_peak", "recover_dropout", *RECOVERING}
# The same where the run is its own teacher.
TEACHING = {"teacher", "distil", "temperature"}
HALF = ("50%params", "50%flops")
GIVEN = {"model", "output", "task", "train_file", "validation_file", "budget", "seed", "epochs", "learning_rate"}
GIVEN |= {"max_steps", "precision", "save_before_cut", "keep_checkpoints", "save_steps", "resume"}
GIVEN |= {"overwrite", "quiet"}


def append(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def parse_override(text: str) -> tuple[str, object]:
    """`name=value` with a JSON value, or a bare word, for a setting of a run; former names are accepted."""
    name, sign, value = text.partition("=")
    name, known = former_names(TrimConfig, Schedule).get(name, name), sorted(all_names() - GIVEN)
    if not sign or name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value with a name of {', '.join(known)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, None if value == "none" else value


def data_files(folder: Path) -> tuple[Path, Path]:
    files = [sorted(folder.glob(f"{split}.*")) for split in ("train", "validation")]
    if not all(files):
        raise SystemExit(f"{folder}: want train.* and validation.*")
    return files[0][0], files[1][0]


def subset(train: Path, rows: int, folder: Path) -> Path:
    """Write `rows` fixed random rows of a csv or jsonl file, in their order, to a file in folder."""
    columns = load_examples(str(train)).columns
    total = len(next(iter(columns.values())))
    if not 0 < rows <= total:
        raise SystemExit(f"--train-rows is {rows}, want 1 to {total:,}, the rows of {train}")
    chosen = sorted(random.Random(0).sample(range(total), rows))
    is_csv = ".csv" in train.name
    path = folder / f"{train.parent.name}-train-{rows}.{'csv' if is_csv else 'jsonl'}"
    table = [[column[i] for column in columns.values()] for i in chosen]
    with open(path, "w", newline="", encoding="utf-8") as file:
        if is_csv:
            csv.writer(file).writerows([list(columns), *table])
        else:
            file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in table)
    return path


def run_key(arguments: argparse.Namespace, budget: str, method: str, seed: int) -> dict:
    """The KEY entries of a run, for its row, without those that have their default."""
    row = {"task": arguments.task, "budget": budget, "method": method, "seed": seed}
    row |= {"epochs": arguments.epochs, "learning_rate": arguments.learning_rate}
    optional = ("train_rows", "max_steps", "override", *(RECOVERING if method != "dense" else ()))
    row |= {name: getattr(arguments, name) for name in optional if getattr(arguments, name) not in (None, {})}
    if budget in HALF and method != "dense":
        row.setdefault("freeze_embeddings", True)
    row |= {"precision": arguments.precision} if arguments.precision != Options.precision else {}
    return row | ({"accelerator": DEVICE} if DEVICE != "cpu" else {})


def recorded(key: dict) -> dict:
    """The entries of a run key that its row has: rows of half without `freeze_embeddings` have embeddings that learn,
    since they did by default there."""
    learn = key["budget"] in HALF and key.get("freeze_embeddings") is False
    return {name: value for name, value in key.items() if not (learn and name == "freeze_embeddings")}


def before_the_cut(override: dict) -> dict:
    """The entries of an override, or of a run key, that the warm-up depends on."""
    later = AFTER_THE_CUT | (TEACHING if override.get("teacher", SNAPSHOT) == SNAPSHOT else set())
    return {name: value for name, value in override.items() if name not in later}


def folder_name(key: dict, override: dict, *more: str) -> str:
    setting = {name: key[name] for name in SETTING if name in key} | override
    parts = (key["task"], key["seed"], *(f"{name}={value}" for name, value in sorted(setting.items())), *more)
    return "-".join(map(str, parts)).replace("/", "_")


def options_of(key: dict, **usual) -> Options:
    """The Options of a run."""
    method = key["method"]
    settings = {"method": "dense"} if method == "dense" else {"budget": key["budget"], **OURS.get(method, {})}
    settings |= {"compensate": False} if method in RIVALS else {}  # rivals only choose the units
    settings |= key.get("override", {})
    settings |= {name: key[name] for name in ("seed", *SETTING) if name in key}
    settings = {name: value for name, value in settings.items() if name not in ("train_rows", "accelerator")}
    return Options.from_settings({"resume": True, "overwrite": True, "quiet": True, **usual, **settings})


def dense_steps(options: Options, result: dict) -> float:
    """Cost in steps of the dense model, by the encoder's FLOPs; without the analysis, at most 1/64 of the steps."""
    trim = options.trim
    cuts = trim.schedule.cuts(result["steps"]) if trim.trims else {}
    left, share, begin, total = result["flops_after"] / result["flops_before"], 1.0, 0, 0.0
    for step, progress in [*cuts.items(), (result["steps"], 1.0)]:
        total, begin = total + (step - begin) * share, step
        share = trim.schedule.ratio(progress, left)
    return round(total, 1)


def run(arguments: argparse.Namespace, key: dict, work: Path) -> dict:
    """One run. It starts from the shared warm-up of its seed, or saves it if there is none."""
    method, override = key["method"], key.get("override", {})
    train, validation = data_files(Path(arguments.data) / key["task"])
    if "train_rows" in key:
        train = subset(train, key["train_rows"], work)
    warm = work / folder_name(before_the_cut(key), before_the_cut(override), "warm")
    output = work / folder_name(key, override, key["budget"], method)
    trims, branch, rival = method != "dense", warm.exists(), RIVALS[method]() if method in RIVALS else None
    partial = partial_folder(output)
    if isinstance(rival, Layers):
        shutil.rmtree(partial, ignore_errors=True)  # its own checkpoint would contain the dropped layers
    if branch and not any(partial.glob("checkpoint-*")):
        shutil.copytree(warm, partial, dirs_exist_ok=True)
    first = trims and not branch
    options = options_of(
        key,
        model=arguments.model,
        output=str(output),
        train_file=str(train),
        save_before_cut=first,
        keep_checkpoints=first,
        save_steps=10**9,
    )
    # The number of layers nearest to the budget may be above it.
    result = finetune_and_trim(options, rival, accept_unfinished=isinstance(rival, Layers))
    if isinstance(rival, Layers):
        result["encoder_params_after"] = rival.finish(output)
    scored = evaluate_folder(Options(model=str(output), validation_file=str(validation)))
    if first:
        warm.mkdir()
        dense = min(partial.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        shutil.move(dense, warm / dense.name)
        shutil.rmtree(partial)
    metric = SCORES.get(key["task"], get_task(scored["task"]).main_metric)
    kept = ("steps", "encoder_params_before", "encoder_params_after", "flops_before", "flops_after", "seconds")
    facts = {"metric": metric, "score": scored["metrics"][metric], **{name: result[name] for name in kept}}
    facts["dense_steps"] = dense_steps(options, result)
    shutil.rmtree(output)
    return {**recorded(key), **facts, **machine()}


def ablation(row: dict, runs: list[dict]) -> dict:
    """The row of one run with --override, compared with the dense run of the same seed."""
    dense, value = control(row, runs), 100 * row["score"]
    changed = "".join(f", {name} {setting}" for name, setting in sorted(row["override"].items()))
    shared = {"bench": "bench_accuracy_ablation", "case": f"{row['task']} {row['budget']} ours{changed}"}
    shared |= {"metric": "score", "value": round(value, 2), "unit": "%", "rival": "dense" if dense else None}
    shared |= {"rival_value": dense and round(dense, 2), "ratio": dense and round(value / dense, 4), "seeds": 1}
    return {**shared, **{name: fact for name, fact in row.items() if name not in shared and name != "score"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, help="a folder of DATA")
    parser.add_argument("--budgets", nargs="+", default=["50%params"])
    known = ["dense", *OURS, *RIVALS]
    parser.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help=f"of {', '.join(known)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--precision", choices=PRECISIONS, default=Options.precision, help="scores are always in fp32")
    parser.add_argument("--recovery", choices=RECOVERIES, help="of all methods; default: that of the task")
    parser.add_argument(
        "--freeze-embeddings",
        action=argparse.BooleanOptionalAction,
        help="after the cut, for all methods; default: up to a 50 %% budget",
    )
    parser.add_argument("--train-rows", type=int, help="train on this many rows, the same in every run")
    parser.add_argument("--override", action="append", type=parse_override, metavar="NAME=VALUE", default=[])
    parser.add_argument("--work", default="/tmp/bench_accuracy", help="folder for the runs' files")
    arguments = parser.parse_args()
    arguments.override = dict(arguments.override)
    if arguments.override and arguments.methods not in (None, ["ours"]):
        parser.error("--override changes the method ours, want no other --methods")
    methods = arguments.methods or (["ours"] if arguments.override else ["dense", "ours", "magnitude", "random"])
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        cases = [(budget, m) for budget in arguments.budgets for m in methods if m != "dense"]
        cases += [("100%params", "dense")] if "dense" in methods else []  # last: from the warm-up of the others
        for budget, method in cases:
            key = run_key(arguments, budget, method, seed)
            if any(identity(row) == identity(recorded(key)) for row in read(RUNS) + read(ABLATION)):
                continue
            row = run(arguments, key, work)
            if arguments.override:
                append(ABLATION, ablation(row, read(RUNS)))
            else:
                append(RUNS, row)
            case = " ".join(map(str, (arguments.task, budget, method, *arguments.override.items(), "seed", seed)))
            print(f"{case}: {100 * row['score']:.2f}", flush=True)


if __name__ == "__main__":
    main()
