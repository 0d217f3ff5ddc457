"""How many tokens a second does fine-tuning process, in our loop and in the Trainer that most people use?

    python bench/bench_finetune.py --model MODEL --name NAME --train-file F [--task T --max-length N]
    ... --sizes dense 50%params 30%params --engines ours "Trainer, random order"     # some of them
    ... --shape bert-base        # random weights of that shape; MODEL provides the tokenizer

Counted are real tokens, without padding. On a GPU per second, on a CPU per processor second, which other processes do
not change. Every measurement is a process of its own: `--steps` training steps after `--warm-up` ones, in bf16. A
trimmed model is cut before the first step, to layers of different width (bench_step.py). Beside the rows are printed:
the milliseconds of the passes and of the optimizer in a step (not of a CUDA graph, which is one part); the share of
tokens that is real; on a GPU the largest memory, and the share of the peak that the matrix products of the encoder use
(MFU).

    ours                   what `finetune` runs
    ours, without graphs   the same without CUDA graphs (GPU only)
    TrimTrainer            padded batches of similar length, one step at a time
    Trainer, random order  transformers' Trainer as most people run it: padded to the longest row of the batch
    Trainer, grouped       the same with train_sampling_strategy="group_by_length"
    Trainer, compiled      the latter with torch_compile=True (GPU only, unless named)
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _harness import DEVICE, record
from bench_step import tapered
from transformers import BertConfig, Trainer, TrainerCallback, TrainingArguments, set_seed

from sensibert.inputs import load_data, load_model, load_tokenizer
from sensibert.models import layout_of
from sensibert.run_options import Options
from sensibert.trainer_arguments import training_arguments
from sensibert.training import finetune
from sensibert.trimming.trim import trim

OURS, RIVALS = ("ours", "ours, without graphs", "TrimTrainer"), ("random order", "grouped", "compiled")
SHAPES = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


# Dense products in bf16, by the maker's data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
PARTS = 3  # steps whose parts are timed, after the measured ones: on a GPU that waits for every part


def flops_of_token(model: Any, length: float) -> float:
    """Forward and backward pass of the encoder: 6 for every weight of it, 12 n D for n heads of D in every layer."""
    layout = layout_of(model)
    heads = sum(site.units * site.consumer.span for site in layout.sites if site.kind == "head")
    return 6 * layout.encoder_params + 12 * length * heads


class Clock(TrainerCallback):
    """Seconds and tokens from the end of step `first` to the end of step `last`; then those of the parts of a step."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.begin, self.seconds, self.tokens = first, last, 0.0, 0.0, 0
        self.parts: dict[str, float] = {}  # of the steps after the last one
        self._mark = 0.0

    def read(self) -> float:
        if DEVICE == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _part(self, name: str | None, state: Any) -> None:
        if state.global_step >= self.last:
            now = self.read()
            if name is not None:
                self.parts[name] = self.parts.get(name, 0.0) + 1e3 * (now - self._mark) / PARTS
            self._mark = now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._part(None, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._part("passes", state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._part("optimizer", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.begin, self.tokens = self.read(), state.num_input_tokens_seen
        elif state.global_step == self.last:
            self.seconds, self.tokens = self.read() - self.begin, state.num_input_tokens_seen - self.tokens


class Counting:
    """Counts the tokens of a collator's batches, and gives every batch an attention mask, as transformers does."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.real, self.all = collator, [], []

    def __call__(self, items: list) -> dict:
        batch = self.collator(items)
        self.real.append(sum(len(item["input_ids"]) for item in items))
        self.all.append(batch["input_ids"].numel())
        return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}


def measure(queue: Any, options: Options, size: str, engine: str, steps: int, warm_up: int, shape: str | None) -> None:
    """Put the tokens a second, and more facts, on the queue."""
    data = load_data(options, load_tokenizer(options.model))
    set_seed(0)
    model = load_model(options.model, data)
    if shape is not None:
        sizes = {**SHAPES[shape].to_dict(), "vocab_size": model.config.vocab_size, **data.config_kwargs()}
        model = data.auto_class().from_config(BertConfig(**sizes))
    if size != "dense":
        trim(model, tapered(model, float(size.partition("%")[0]) / 100))
    last = steps + warm_up
    total, clock = last + PARTS, Clock(warm_up, last)
    options = replace(options, max_steps=total)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(options, Path(folder))
        arguments = replace(arguments, save_strategy="no", disable_tqdm=True, max_steps=total)
        if engine in OURS:
            packing = "off" if engine == "TrimTrainer" else "on"
            graphs = engine == "ours"
            trainer = finetune(model, data.train, data.collator, arguments, [clock], packing=packing, graphs=graphs)
            real, share = clock.tokens, None
            if packing == "on":
                share = trainer.state.num_input_tokens_seen / trainer.padded_tokens
        else:
            collator = Counting(data.collator)
            rival = TrainingArguments(
                output_dir=folder, max_steps=total, learning_rate=options.learning_rate, use_cpu=DEVICE == "cpu",
                per_device_train_batch_size=options.batch_size, optim="adamw_torch_fused", save_strategy="no",
                bf16=options.precision == "bf16", report_to="none", disable_tqdm=True, remove_unused_columns=False,
                train_sampling_strategy="random" if engine == "Trainer, random order" else "group_by_length",
                torch_compile=engine == "Trainer, compiled",
            )  # fmt: skip
            Trainer(model, rival, collator, data.train, callbacks=[clock]).train()
            real = sum(collator.real[warm_up:last])
            share = real / sum(collator.all[warm_up:last])
    facts = {"tokens_per_s": real / clock.seconds, "ms": 1e3 * clock.seconds / steps}
    facts |= {f"{name}_ms": value for name, value in clock.parts.items()}
    if share is not None:
        facts["real_share"] = share  # of the tokens; the others are padding
    if DEVICE == "cuda":
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        card = torch.cuda.get_device_name()
        if (peak := next((p for name, p in PEAK_TFLOPS.items() if name in card), None)) is not None:
            facts["mfu"] = (
                facts["tokens_per_s"] * flops_of_token(model, real / (steps * options.batch_size)) / peak / 1e12
            )
    queue.put(facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="of the model, for the row")
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--task")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--sizes", nargs="+", default=["dense", "50%params", "30%params"])
    names = [*OURS, *(f"Trainer, {rival}" for rival in RIVALS)]
    usual = [name for name in names if DEVICE == "cuda" or name not in ("ours, without graphs", "Trainer, compiled")]
    parser.add_argument("--engines", nargs="+", choices=names, default=usual)
    parser.add_argument("--print-only", action="store_true", help="add no rows to bench/results")
    arguments = parser.parse_args()
    name = arguments.name or arguments.shape or Path(arguments.model).name
    options = Options(
        model=arguments.model, output="none", train_file=arguments.train_file, task=arguments.task,
        max_length=arguments.max_length, precision=arguments.precision, batch_size=arguments.batch_size,
    ).resolved()  # fmt: skip
    context, metric = multiprocessing.get_context("spawn"), "tokens_per_s" if DEVICE == "cuda" else "tokens_per_cpu_s"
    failed = False
    for size in arguments.sizes:
        facts = {}
        for engine in arguments.engines:
            queue = context.Queue()
            process = context.Process(
                target=measure,
                args=(queue, options, size, engine, arguments.steps, arguments.warm_up, arguments.shape),
            )
            process.start()
            process.join()
            if process.exitcode:
                print(f"{size}, {engine}: the process ended with {process.exitcode}", file=sys.stderr)
                failed = True
                continue
            facts[engine] = queue.get()
            print(size, engine, *(f"{fact} {value:.4g}" for fact, value in facts[engine].items()), flush=True)
        if arguments.print_only:
            continue
        case = f"{name} {Path(arguments.train_file).parent.name} {size}"
        rivals = [engine for engine in facts if engine not in OURS]
        for engine in (engine for engine in OURS if engine in facts):
            for rival in rivals or [None]:
                value = facts[rival]["tokens_per_s"] if rival else None
                record("bench_finetune", f"{case} {engine}", metric, facts[engine]["tokens_per_s"], "1/s", rival, value)
    if failed:
        raise SystemExit("some measurements failed")


if __name__ == "__main__":
    main()
