"""Are budgets of latency, size and accuracy kept, and what do they cost?

    python bench/bench_budgets.py --model MODEL --data FOLDER --runtime torch --budgets 70%latency 8ms 12MB [--seed 0]
        [--vocabulary train] [--epochs 3]
    python bench/bench_budgets.py --model MODEL --data FOLDER --keep 99% [--seed 0]
    python bench/bench_budgets.py --model MODEL --data FOLDER --smallest 98% --between 4 24 [--tries 4] [--scratch DIR]

FOLDER holds train.csv and validation.csv. Rows of a case: `ms` or `MB`, as measured in the end, with the budget as the
rival; the main metric, with that of the parameter budget as the rival. The parameter budget is the largest whose plan
costs no more by the same table, for the same sensitivity. With --keep: what is left of the encoder, and the score on
the half of the validation rows that did not choose the budget, with the floor as the rival. With --smallest: megabytes
of the smallest file that keeps that fraction of the score of the model without trimming, by bisection of budgets; every
budget is a whole run. With --scratch, runs that are finished are not made again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from _harness import record

from sensibert.allocation import allocate
from sensibert.core.arguments import fraction
from sensibert.core.artifacts import Plan, Sensitivity
from sensibert.core.budget import Budget
from sensibert.core.cost import counts_of, spent
from sensibert.recipe import finetune_and_trim
from sensibert.run_options import Options


def equal_params(folder: Path) -> str:
    """The largest budget of parameters, in steps of 1 %, that meets the measured budget of a run."""
    scores, budget = Sensitivity.load(folder / "sensitivity.safetensors"), Plan.load(folder / "plan.safetensors").budget
    allowed = budget.value
    if budget.relative:
        allowed *= spent(scores.layout, counts_of(scores.layout), budget)
    for percent in range(99, 0, -1):
        plan = allocate(scores, Budget(percent / 100, "params", True))
        if spent(scores.layout, counts_of(scores.layout, plan.keep), budget) <= allowed:
            return f"{percent}%params"
    raise ValueError(f"{budget}: no budget of parameters meets it")


def run(arguments: argparse.Namespace, output: Path, **settings: object) -> dict:
    options = Options.from_settings(
        model=arguments.model,
        train_file=str(arguments.data / "train.csv"),
        validation_file=str(arguments.data / "validation.csv"),
        output=str(output),
        vocabulary=arguments.vocabulary,
        epochs=arguments.epochs,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        precision="auto",
        quiet=True,
        resume=output.exists(),
        **settings,
    )
    return finetune_and_trim(options)


def measure(arguments: argparse.Namespace, budget: str, scratch: Path) -> None:
    """The rows of a budget of latency or size."""
    result = run(arguments, scratch / "measured", budget=budget, runtime=arguments.runtime)
    measured, metric = result["measured"], next(iter(result["metrics"]))
    case = f"{arguments.name} {arguments.data.name} {budget} {arguments.runtime}"
    case += f" vocabulary {arguments.vocabulary}" * bool(arguments.vocabulary)
    case += f" {arguments.epochs:g} epochs" * (arguments.epochs != 3) + f" seed {arguments.seed}"
    unit = measured["unit"]
    record("bench_budgets", case, unit, measured["after"], unit, "budget", measured["budget"])
    scores = {metric: result["metrics"][metric]}
    if "graph" in result:
        scores |= {f"{metric}, {name}": found[metric] for name, found in result["graph"]["metrics"].items()}
    counted = None if arguments.alone else equal_params(scratch / "measured")
    rival = counted and run(arguments, scratch / "counted", budget=counted)["metrics"][metric]
    for name, score in scores.items():
        against = (counted, rival) if name == metric else (None, None)
        record("bench_budgets", case, name, score, "", *against)


def keep(arguments: argparse.Namespace, scratch: Path) -> None:
    """The rows of a floor of the score."""
    result = run(arguments, scratch / "kept", keep=arguments.keep)
    case = f"{arguments.name} {arguments.data.name} keep {arguments.keep} seed {arguments.seed}"
    left = 100 * result["encoder_params_after"] / result["encoder_params_before"]
    record("bench_budgets", case, "encoder left", left, "%")
    kept = result["keep"]
    record("bench_budgets", case, "of the baseline", 100 * kept["of_baseline"], "%", "floor", 100 * kept["floor"])


def middle(low: float, high: float) -> float:
    """A budget in MB between two others, with three digits: costs of sizes are ratios."""
    return float(f"{math.sqrt(low * high):.3g}")


def smallest(arguments: argparse.Namespace, scratch: Path) -> None:
    """The rows of the smallest file that keeps a fraction of the dense score."""
    dense = run(arguments, scratch / "dense", method="baseline")
    metric = next(iter(dense["metrics"]))
    floor = fraction("smallest", arguments.smallest, "98%") * dense["metrics"][metric]
    case = f"{arguments.name} {arguments.data.name} smallest {arguments.smallest} {arguments.runtime}"
    case += f" seed {arguments.seed}"
    (low, high), best = arguments.between, None
    for number in range(arguments.tries):
        size = high if number == 0 else middle(low, high)  # the largest must hold, or nothing is known
        budget = f"{size:g}MB"
        result = run(arguments, scratch / budget, budget=budget, runtime=arguments.runtime)
        scores = result["graph"]["metrics"] if "graph" in result else {"torch": result["metrics"]}
        score, megabytes = scores[list(scores)[-1]][metric], result["measured"]["after"]
        form = next((form for form in (result["size"] or {"forms": []})["forms"] if form["chosen"]), {})
        print(f"{budget}: {megabytes:.4g} MB, {metric} {score:.4f}, floor {floor:.4f}, {form}", flush=True)
        record("bench_budgets", f"{case} tried {budget}", metric, score, "", arguments.smallest, floor)
        if score >= floor:
            best, high = megabytes, size
        elif number == 0:
            raise SystemExit(f"{budget} does not keep {arguments.smallest}: want a larger --between")
        else:
            low = size
    record("bench_budgets", case, "MB", best, "MB", "dense", dense["mb_after"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="MiniLM", help="of the model, for the rows")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--runtime", default="torch")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budgets", nargs="+", default=[])
    what.add_argument("--keep")
    what.add_argument("--smallest", help="fraction of the dense score, 98%%")
    parser.add_argument("--between", type=float, nargs=2, default=(4.0, 24.0), help="MB")
    parser.add_argument("--tries", type=int, default=4, help="runs of --smallest beside the dense one")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--vocabulary")
    parser.add_argument("--alone", action="store_true", help="without the run of the parameter budget")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        if arguments.smallest:
            smallest(arguments, scratch)
        for number, budget in enumerate(arguments.budgets):
            measure(arguments, budget, scratch / str(number))
        if arguments.keep:
            keep(arguments, scratch)


if __name__ == "__main__":
    main()
