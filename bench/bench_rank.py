"""Does the sensitivity rank what the loss then says? Predicted against measured loss when single sites are trimmed.

    python bench/bench_rank.py --data DATA --task banking77 --model MODEL --checkpoint FINE_TUNED_DENSE

In every site (the heads of a layer, the FFN of a layer) the lowest-ranked 25, 50, 75 and 100 % of the units are
silenced, one site at a time, and the loss on validation rows is measured. With the per-sample gate gradients
g_n [units] on training rows, the predictions for removing a set S are, up to a factor that does not move a rank:

    obs             what `Sensitivity.predicted_rise` says: slope along the change of the weights, costs, and gates
    sum over j in S of a statistic of `analyze`, as shipped (fisher: micro-batches of 4; obs: the costs alone)
    units alone     1/2N * sum over j in S, n of g_nj^2
    units together  1/2N * sum_n (sum over j in S of g_nj)^2
    slope           -1/N * sum over j in S, n of g_nj, with the given labels (sampled ones have none)

(the quadratic form of Kwon et al., arXiv 2204.09656). The score is Spearman's rank correlation over all (site, share).
The units that are dropped are those --method ranks lowest, whatever predicts; with obs the kept units of the site take
over before the measurement, as in a run. `slope + twice ...` was found on the checkpoint of seed 0: judge it on others.
How much could be reached at all says the correlation of the measurement on one half of the rows with that on the other.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _harness import RESULTS, record
from bench_accuracy import data_files
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sensibert.core.artifacts import Plan, UnitPlan
from sensibert.core.budget import Budget
from sensibert.core.config import TrimConfig
from sensibert.core.layout import Layout
from sensibert.data.batching import micro_batches
from sensibert.data.task_data import TaskData
from sensibert.inputs import best_device, encode, load_tokenizer, training_examples, validation_examples
from sensibert.models import layers, layout_of
from sensibert.run_options import Options
from sensibert.saving.folder import load
from sensibert.sensitivity import sampled_loss
from sensibert.sensitivity.analyze import analyze
from sensibert.sensitivity.kfac_obs import FisherFactors, collect_factors, consumer
from sensibert.trimming.compensate import compensate
from sensibert.trimming.self_check import silenced

SHARES = (0.25, 0.5, 0.75, 1.0)
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Drop:
    """The lowest-ranked `share` of a site's units."""

    site: str
    kind: str
    share: float
    units: Tensor  # their numbers


def drops(layout: Layout, scores: Mapping[str, Tensor]) -> list[Drop]:
    found = []
    for site in layout.sites:
        order = scores[site.name].argsort(stable=True)
        found += [Drop(site.name, site.kind, share, order[: round(share * site.units)]) for share in SHARES]
    return found


def gate_gradients(model: nn.Module, layout: Layout, batches: Iterable[Batch], sampled: bool, seed: int = 0) -> dict:
    """Site name -> dL_n/dm_j of a gate m = 1 on every unit, one row a sample: [N, units] fp32.

    One gate a sample and unit, so a batch gives the gradients of its samples one by one. L is the cross-entropy with
    the labels of the batch, or with labels sampled from the prediction."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in layout.sites}
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        size, gates, handles = len(batch["labels"]), [], []
        for site in layout.sites:
            gate = torch.ones(size, 1, site.units, device=device, requires_grad=True)

            def gated(module, args, gate=gate, span=site.consumer.span):
                return (args[0] * gate.repeat_interleave(span, -1), *args[1:])

            handles.append(consumer(model, site.consumer.parameter).register_forward_pre_hook(gated))
            gates.append(gate)
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        for handle in handles:
            handle.remove()
        labels = batch["labels"]
        if sampled:
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
            labels = drawn.flatten().to(device)
        grads = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), gates)
        for site, grad in zip(layout.sites, grads, strict=True):
            found[site.name].append(grad[:, 0].cpu())
    return {name: torch.cat(rows) for name, rows in found.items()}


@torch.no_grad()
def losses_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The cross-entropy of every row, in their order."""
    found, device = [], next(model.parameters()).device
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        found.append(F.cross_entropy(model(**batch).logits, labels, reduction="none").cpu())
    return torch.cat(found)


@contextmanager
def remembering(model: nn.Module, first: int, memory: list) -> Iterator[None]:
    """Inside, the layers below `first` do not compute: batch n goes on from memory[n], what the last of them gave."""
    turn = iter(memory)
    below = [layer for _, layer in layers(model)][:first]
    for layer in below[:-1]:
        layer.forward = lambda hidden, *args, **kwargs: hidden
    for layer in below[-1:]:
        layer.forward = lambda hidden, *args, **kwargs: next(turn)
    try:
        yield
    finally:
        for layer in below:
            del layer.forward


@contextmanager
def taken_over(model: nn.Module, plan: Plan, drop: Drop, factors: Mapping[str, FisherFactors] | None) -> Iterator[None]:
    """Inside, the units of the site that stay do what they can for the dropped ones."""
    weight = consumer(model, plan.layout.site(drop.site).consumer.parameter)
    before = copy.deepcopy(weight.state_dict())
    if factors is not None:
        compensate(model, plan, factors)
    try:
        yield
    finally:
        weight.load_state_dict(before)


def measured(
    model: nn.Module,
    layout: Layout,
    wanted: list[Drop],
    batches: list[Batch],
    factors: Mapping[str, FisherFactors] | None = None,
) -> Tensor:
    """Loss with each drop minus loss without, row by row: [drops, rows]. With factors, the kept units take over."""
    outputs: list[list] = [[] for _ in layers(model)]
    handles = [
        layer.register_forward_hook(lambda module, args, output, rows=rows: rows.append(output))
        for (_, layer), rows in zip(layers(model), outputs, strict=True)
    ]
    dense, found = losses_of(model, batches), []
    for handle in handles:
        handle.remove()
    print(f"dense: {dense.mean():.4f}", flush=True)
    for drop in wanted:
        keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites}
        keep[drop.site][drop.units] = False
        first = layout.site(drop.site).layer
        plan = UnitPlan(layout, keep, Budget(1.0, "params", True), "rank")
        with taken_over(model, plan, drop, factors), silenced(model, plan):
            with remembering(model, first, outputs[first - 1]):
                found.append(losses_of(model, batches) - dense)
        print(f"{drop.site} {drop.share:.0%}: {found[-1].mean():+.4f}", flush=True)
    return torch.stack(found)


def grouped(gradients: Tensor, size: int) -> Tensor:
    """[N, units] -> [N / size, units]: the gradients of micro-batches, as the mean loss of each has them."""
    return gradients[: len(gradients) // size * size].unflatten(0, (-1, size)).mean(1)


def alone(gradients: Mapping[str, Tensor]) -> Callable[[Drop], float]:
    return lambda drop: float(gradients[drop.site][:, drop.units].square().sum(1).mean()) / 2


def together(gradients: Mapping[str, Tensor]) -> Callable[[Drop], float]:
    return lambda drop: float(gradients[drop.site][:, drop.units].sum(1).square().mean()) / 2


def slope(gradients: Mapping[str, Tensor]) -> Callable[[Drop], float]:
    return lambda drop: -float(gradients[drop.site][:, drop.units].sum(1).mean())


def plus(first: Callable[[Drop], float], second: Callable[[Drop], float], weight: float = 1.0):
    return lambda drop: first(drop) + weight * second(drop)


def summed(scores: Mapping[str, Tensor]) -> Callable[[Drop], float]:
    return lambda drop: float(scores[drop.site][drop.units].sum())


def spearman(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def predictors(model: nn.Module, data: TaskData, layout: Layout, samples: int, seed: int, known: Iterable[str]) -> dict:
    """Name -> (drop -> predicted loss, up to a factor), of those that are not known."""

    def batches(size: int):
        return micro_batches(data.train, data.collator, samples, size, seed)

    found = {}
    for statistic in [name for name in ("fisher", "taylor", "saliency", "magnitude") if name not in known]:
        found[statistic] = summed(analyze(model, batches(4), statistic, sampled_loss, seed).scores)
    sampled, given = (gate_gradients(model, layout, batches(16), kind, seed) for kind in (True, False))
    by_four = {name: grouped(gradients, 4) for name, gradients in sampled.items()}
    found |= {"units alone, sampled labels": alone(sampled), "units alone, given labels": alone(given)}
    found |= {"units together, sampled labels": together(sampled), "units together, given labels": together(given)}
    found["units together, sampled labels, micro-batches of 4"] = together(by_four)
    found["slope"] = slope(given)
    for kind, quadratic in (("alone", alone(sampled)), ("together", together(sampled))):
        found[f"slope + units {kind}, sampled labels"] = plus(slope(given), quadratic)
        found[f"slope + twice units {kind}, sampled labels"] = plus(slope(given), quadratic, 2.0)
    return found


def draw(path: Path, wanted: list[Drop], actual: list[float], predicted: dict[str, list[float]]) -> None:
    """Measured against predicted, both by rank and by value (increases below 1e-4 stand at the edge)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(predicted), 4.4), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(predicted), squeeze=False)[0], predicted.items()):
        for kind, color in (("head", "#2f6f9f"), ("ffn", "#c0603a")):
            for share, marker in zip(SHARES, "ovs*"):
                chosen = [i for i, drop in enumerate(wanted) if (drop.kind, drop.share) == (kind, share)]
                x, y = [values[i] for i in chosen], [max(actual[i], 1e-4) for i in chosen]
                label = f"{'heads' if kind == 'head' else 'FFN'}, {share:.0%} dropped"
                axis.scatter(x, y, color=color, marker=marker, label=label)
        if min(values) > 0:
            axis.set_xscale("log")
        else:
            axis.set_xscale("symlog", linthresh=max(map(abs, values)) / 20)
            axis.tick_params(axis="x", labelrotation=30)
        axis.set(yscale="log", xlabel=f"predicted: {name}")
        axis.set(ylabel="measured increase of the loss", title=f"rank correlation {spearman(values, actual):.3f}")
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True, help="a folder of DATA with a classification task")
    parser.add_argument("--model", required=True, help="where the tokenizer is")
    parser.add_argument("--checkpoint", required=True, help="the fine-tuned dense model")
    parser.add_argument("--method", default=TrimConfig().resolved().method, help="the statistic that ranks the units")
    parser.add_argument("--samples", type=int, default=512, help="training rows for the predictions")
    parser.add_argument("--rows", type=int, default=512, help="validation rows for the measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="file for the measurements, which take most of the time: used again")
    parser.add_argument("--name", default="", help="of the checkpoint, for the rows, such as ` seed 1`")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    train, validation = map(str, data_files(Path(arguments.data) / arguments.task))
    model = load(arguments.checkpoint)[0].eval().to(best_device())
    options = Options(model=arguments.model, train_file=train, validation_file=validation).resolved()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    examples = training_examples(options), validation_examples(options)
    data = encode(options, load_tokenizer(arguments.model), *examples, names)
    layout = layout_of(model)

    def train_rows(size: int):
        return micro_batches(data.train, data.collator, arguments.samples, size, arguments.seed)

    factors = None
    if arguments.method == "obs":
        factors = collect_factors(model, layout, train_rows(32), sampled_loss, arguments.seed)
    few = train_rows(TrimConfig.micro_batch)
    sensitivity = analyze(model, few, arguments.method, sampled_loss, arguments.seed, factors=factors)
    wanted = drops(layout, sensitivity.scores)
    rows = micro_batches(data.validation, data.collator, arguments.rows, 64, arguments.seed)
    if arguments.keep is not None and arguments.keep.exists():
        by_row = torch.load(arguments.keep)  # of the same drops, rows and method: nothing here can tell
    else:
        by_row = measured(model, layout, wanted, list(rows), factors)
        if arguments.keep is not None:
            torch.save(by_row, arguments.keep)
    found = {arguments.method: summed(sensitivity.scores)}
    if sensitivity.curves:
        costs = {"obs, costs alone": found.pop("obs")}
        found = {"obs": lambda drop: sensitivity.predicted_rise(drop.site, len(drop.units))} | costs
    found |= predictors(model, data, layout, arguments.samples, arguments.seed, found)
    report(f"{arguments.task}{arguments.name}", wanted, by_row, found)


def report(task: str, wanted: list[Drop], by_row: Tensor, found: dict[str, Callable[[Drop], float]]) -> None:
    """Rows, and the picture of the first of `found`, which is ours, beside the best of the others."""
    actual = by_row.mean(1).tolist()
    predicted = {name: [predict(drop) for drop in wanted] for name, predict in found.items()}
    scores = {name: spearman(values, actual) for name, values in predicted.items()}
    ours = next(iter(found))
    for name, score in scores.items():
        rival = {} if name == ours else {"rival": ours, "rival_value": scores[ours]}
        record("bench_rank", f"{task} {name}", "spearman", score, "1", **rival)
    halves = (by_row[:, half::2].mean(1).tolist() for half in (0, 1))
    record("bench_rank", f"{task} measured on the other half of the rows", "spearman", spearman(*halves), "1")
    best = max((name for name in scores if name != ours), key=scores.get)
    path = RESULTS / f"bench_rank_{task.replace(' ', '_')}.png"
    draw(path, wanted, actual, {name: predicted[name] for name in (ours, best)})


if __name__ == "__main__":
    main()
