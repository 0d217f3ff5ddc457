"""How long does a training step of a trimmed model take, compared with a dense one, for equal and for new lengths?

    python bench/bench_step.py [--model FOLDER --name NAME] [--precision bf16] [--batch 32] [--longest 384] [--steps 48]

Forward, back and AdamW, as in a run; without a model BERT-base with random weights. Every layer is cut to a
different width, half of the units in total, so each new length brings as many matrix shapes as there are layers, and
libraries prepare each of them. Each measurement is a separate process, after three steps of another length. The time
(processor time on a CPU) is the mean over all steps, first ones included.

one: all steps have the mean length. new: every step has a new length. eights: the same, padded to multiples of 8.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import torch
from _harness import record
from transformers import AutoConfig, AutoModelForQuestionAnswering, BertConfig

from sensibert.allocation.allocate import default_width_multiple
from sensibert.core.artifacts import Plan, UnitPlan
from sensibert.core.budget import Budget
from sensibert.models import layout_of
from sensibert.models.eval_mode import quick_attention
from sensibert.run_options import PRECISIONS
from sensibert.trimming.trim import trim

REGIMES = ("one", "new", "eights")


def tapered(model: torch.nn.Module, left: float = 0.5, slope: float = 0.6) -> Plan:
    """From 0.4 times the fraction `left` of the units in the first layer to 1.6 times in the last, or 1 - slope to
    1 + slope times; slope 0 cuts all layers to one width."""
    layout = layout_of(model)
    last, step, keep = max(site.layer for site in layout.sites), default_width_multiple(layout.hidden), {}
    for site in layout.sites:
        unit = step if site.kind == "ffn" else 1
        share = left * (1 - slope + 2 * slope * site.layer / max(1, last))
        keep[site.name] = torch.arange(site.units) < max(unit, round(share * site.units / unit) * unit)
    return UnitPlan(layout, keep, Budget.parse("50%params"), "tapered")


def lengths(regime: str, longest: int, steps: int) -> list[int]:
    """One length per step. All regimes have the same mean, except for the padding of `eights`."""
    drawn = random.Random(0).sample(range(longest // 2, longest + 1), steps)
    if regime == "one":
        return [round(statistics.mean(drawn))] * steps
    return [n + -n % 8 for n in drawn] if regime == "eights" else drawn


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, ...], bf16: bool
) -> None:
    ids, mask, answers = batch
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16), quick_attention(ids.device, bf16, ids.shape[1]):
        model(input_ids=ids, attention_mask=mask, start_positions=answers, end_positions=answers).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def random_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """ids, attention mask, answers. Every second row ends in one token of padding, as rows of most batches do."""
    ids = torch.randint(5, vocab_size, (rows, length), device=device)
    mask, answers = torch.ones_like(ids), torch.zeros(rows, dtype=torch.int64, device=device)
    mask[::2, -1] = 0
    return ids, mask, answers


def measure(queue, config, arguments: argparse.Namespace, trimmed: bool, regime: str) -> None:
    """Put the mean microseconds of a step on the queue."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, bf16 = AutoModelForQuestionAnswering.from_config(config).to(device).train(), arguments.precision == "bf16"
    if trimmed:
        trim(model, tapered(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(length: int) -> None:
        train_step(model, optimizer, random_batch(arguments.batch, length, config.vocab_size, device), bf16)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step(arguments.longest // 4)
    wait()
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # not affected by other processes
    begin = clock()
    for length in lengths(regime, arguments.longest, arguments.steps):
        step(length)
    wait()
    queue.put(1e6 * (clock() - begin) / arguments.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; its config alone is read")
    parser.add_argument("--name", help="of the model, for the row")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--longest", type=int, default=384, help="tokens of the longest batch; the shortest has half")
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    if not 0 < arguments.steps <= arguments.longest // 2:
        parser.error(f"--steps is {arguments.steps}, want 1 to {arguments.longest // 2}, so that no length comes twice")
    config = AutoConfig.from_pretrained(arguments.model) if arguments.model else BertConfig()
    name = arguments.name or (Path(arguments.model).name if arguments.model else "bert-base")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for regime in REGIMES:
        times = []
        for trimmed in (True, False):
            process = context.Process(target=measure, args=(queue, config, arguments, trimmed, regime))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{regime}: a process ended with {process.exitcode}")
            times.append(queue.get())
        case = (
            f"{name} 50%params {arguments.batch}x{arguments.longest} {arguments.precision} {regime} x {arguments.steps}"
        )
        record("bench_step", case, "us", times[0], "us", "dense", times[1])


if __name__ == "__main__":
    main()
