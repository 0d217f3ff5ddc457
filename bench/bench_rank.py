"""Does the sensitivity predict the loss? Predicted against measured loss when single sites are trimmed.

    python bench/bench_rank.py --data DATA --task banking77 --model MODEL --checkpoint FINE_TUNED_DENSE

In every site (the heads of a layer, the FFN of a layer) the lowest-ranked 25, 50, 75 and 100 % of the units are
silenced, one site at a time, and the loss on validation rows is measured. With the per-sample gate gradients
g_n [units] on training rows, the predictions for removing a set S are, up to a factor that does not change ranks:

    obs             `Sensitivity.predicted_rise`: slope along the change of the weights, costs, and gates
    sum over j in S of a statistic of `analyze` with its defaults (fisher: micro-batches of 4; obs: only the costs)
    units alone     1/2N * sum over j in S, n of g_nj^2
    units together  1/2N * sum_n (sum over j in S of g_nj)^2
    slope           -1/N * sum over j in S, n of g_nj, with the given labels (sampled ones have none)

(the quadratic form of Kwon et al., arXiv 2204.09656). The score is Spearman's rank correlation over all (site, share).
For every predictor, the dropped units are those that --method ranks lowest. With obs the kept units of the site
compensate before the measurement, as in a run. `slope + twice ...` was chosen on the checkpoint of seed 0: judge it on
others. The correlation between measurements on two halves of the rows is an upper limit for every predictor.
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
from sensibert.inputs import encode, load_tokenizer, to_device, training_examples, validation_examples
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
    result = []
    for site in layout.sites:
        order = scores[site.name].argsort(stable=True)
        result += [Drop(site.name, site.kind, share, order[: round(share * site.units)]) for share in SHARES]
    return result


def gate_gradients(model: nn.Module, layout: Layout, batches: Iterable[Batch], sampled: bool, seed: int = 0) -> dict:
    """Site name -> dL_n/dm_j of a gate m = 1 on every unit: fp32 [N, units], one row per sample.

    There is one gate per sample and unit, so a batch gives the gradients of each sample. L is the cross-entropy with
    the labels of the batch, or with labels sampled from the prediction."""
    parts: dict[str, list[Tensor]] = {site.name: [] for site in layout.sites}
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
            parts[site.name].append(grad[:, 0].cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}


@torch.no_grad()
def losses_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The cross-entropy of every row, in order."""
    losses, device = [], next(model.parameters()).device
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        losses.append(F.cross_entropy(model(**batch).logits, labels, reduction="none").cpu())
    return torch.cat(losses)


@contextmanager
def remembering(model: nn.Module, first: int, memory: list) -> Iterator[None]:
    """A context in which layers below `first` do not compute: batch n starts from memory[n], the output of the last."""
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
def compensated(
    model: nn.Module, plan: Plan, drop: Drop, factors: Mapping[str, FisherFactors] | None
) -> Iterator[None]:
    """A context in which the kept units of the site compensate for the dropped ones."""
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
    chosen: list[Drop],
    batches: list[Batch],
    factors: Mapping[str, FisherFactors] | None = None,
) -> Tensor:
    """Loss with each drop minus loss without, row by row: [drops, rows]. With factors, the kept units compensate."""
    outputs: list[list] = [[] for _ in layers(model)]
    handles = [
        layer.register_forward_hook(lambda module, args, output, rows=rows: rows.append(output))
        for (_, layer), rows in zip(layers(model), outputs, strict=True)
    ]
    dense, rises = losses_of(model, batches), []
    for handle in handles:
        handle.remove()
    print(f"dense: {dense.mean():.4f}", flush=True)
    for drop in chosen:
        keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites}
        keep[drop.site][drop.units] = False
        first = layout.site(drop.site).layer
        plan = UnitPlan(layout, keep, Budget(1.0, "params", True), "rank")
        with compensated(model, plan, drop, factors), silenced(model, plan):
            with remembering(model, first, outputs[first - 1]):
                rises.append(losses_of(model, batches) - dense)
        print(f"{drop.site} {drop.share:.0%}: {rises[-1].mean():+.4f}", flush=True)
    return torch.stack(rises)


def grouped(gradients: Tensor, size: int) -> Tensor:
    """[N, units] -> [N / size, units]: the gradients of the mean losses of micro-batches."""
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
    """Name -> (drop -> predicted loss, up to a factor), without the names in known."""

    def batches(size: int):
        return micro_batches(data.train, data.collator, samples, size, seed)

    by_name = {}
    for statistic in [name for name in ("fisher", "taylor", "saliency", "magnitude") if name not in known]:
        by_name[statistic] = summed(analyze(model, batches(4), statistic, sampled_loss, seed).scores)
    sampled, given = (gate_gradients(model, layout, batches(16), kind, seed) for kind in (True, False))
    by_four = {name: grouped(gradients, 4) for name, gradients in sampled.items()}
    by_name |= {"units alone, sampled labels": alone(sampled), "units alone, given labels": alone(given)}
    by_name |= {"units together, sampled labels": together(sampled), "units together, given labels": together(given)}
    by_name["units together, sampled labels, micro-batches of 4"] = together(by_four)
    by_name["slope"] = slope(given)
    for kind, quadratic in (("alone", alone(sampled)), ("together", together(sampled))):
        by_name[f"slope + units {kind}, sampled labels"] = plus(slope(given), quadratic)
        by_name[f"slope + twice units {kind}, sampled labels"] = plus(slope(given), quadratic, 2.0)
    return by_name


def draw(path: Path, dropped: list[Drop], actual: list[float], predicted: dict[str, list[float]]) -> None:
    """Measured against predicted, both by rank and by value (increases below 1e-4 are drawn at 1e-4)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(predicted), 4.4), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(predicted), squeeze=False)[0], predicted.items()):
        for kind, color in (("head", "#2f6f9f"), ("ffn", "#c0603a")):
            for share, marker in zip(SHARES, "ovs*"):
                chosen = [i for i, drop in enumerate(dropped) if (drop.kind, drop.share) == (kind, share)]
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
    parser.add_argument(
        "--keep", type=Path, help="file for the measurements, which take most of the time; read if it exists"
    )
    parser.add_argument("--name", default="", help="of the checkpoint, for the rows, such as ` seed 1`")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    train, validation = map(str, data_files(Path(arguments.data) / arguments.task))
    model = load(arguments.checkpoint)[0].eval()
    to_device(model)
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
    chosen = drops(layout, sensitivity.scores)
    rows = micro_batches(data.validation, data.collator, arguments.rows, 64, arguments.seed)
    if arguments.keep is not None and arguments.keep.exists():
        # Not checked: it must be of the same drops, rows and method.
        by_row = torch.load(arguments.keep, weights_only=True)
    else:
        by_row = measured(model, layout, chosen, list(rows), factors)
        if arguments.keep is not None:
            torch.save(by_row, arguments.keep)
    by_name = {arguments.method: summed(sensitivity.scores)}
    if sensitivity.curves:
        costs = {"obs, costs alone": by_name.pop("obs")}
        by_name = {"obs": lambda drop: sensitivity.predicted_rise(drop.site, len(drop.units))} | costs
    by_name |= predictors(model, data, layout, arguments.samples, arguments.seed, by_name)
    report(f"{arguments.task}{arguments.name}", chosen, by_row, by_name)


def report(task: str, chosen: list[Drop], by_row: Tensor, by_name: dict[str, Callable[[Drop], float]]) -> None:
    """Record the rows, and draw the first of `by_name`, which is ours, and the best of the others."""
    actual = by_row.mean(1).tolist()
    predicted = {name: [predict(drop) for drop in chosen] for name, predict in by_name.items()}
    scores = {name: spearman(values, actual) for name, values in predicted.items()}
    ours = next(iter(by_name))
    for name, score in scores.items():
        rival = {} if name == ours else {"rival": ours, "rival_value": scores[ours]}
        record("bench_rank", f"{task} {name}", "spearman", score, "1", **rival)
    halves = (by_row[:, half::2].mean(1).tolist() for half in (0, 1))
    record("bench_rank", f"{task} measured on the other half of the rows", "spearman", spearman(*halves), "1")
    best = max((name for name in scores if name != ours), key=scores.get)
    path = RESULTS / f"bench_rank_{task.replace(' ', '_')}.png"
    draw(path, chosen, actual, {name: predicted[name] for name in (ours, best)})


if __name__ == "__main__":
    main()
