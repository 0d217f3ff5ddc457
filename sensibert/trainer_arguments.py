"""Options -> the arguments of a Trainer, with its device and its trackers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .core.arguments import one_of, show
from .core.device import device_of
from .core.errors import SensibertError
from .core.launch import launched
from .run_options import NO_TRACKER, Options

ONLY_AT_THE_END = 10**9  # steps between evaluations; Trainer then evaluates after the last step alone


def check_run(options: Options) -> None:
    """SensibertError if a file, the device or a tracker that the run needs is missing, or for settings that want one
    process in several."""
    if (count := launched().count) > 1:
        _check_processes(options, count)
    options.want_data()
    options.want_validation_data()
    device_of(options.device)
    for name in options.trackers():
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted((NO_TRACKER, *INTEGRATION_TO_CALLBACK))
            raise SensibertError(f"report_to is {show(name)}, {one_of(name, known)}")
        if name not in get_available_reporting_integrations():
            raise SensibertError(f"report_to is {name!r}, which is not installed; want it installed, or {NO_TRACKER}")


def _check_processes(options: Options, count: int) -> None:
    want, rows = f"and {count} processes were started; want", options.resolved().batch_size
    assert rows is not None  # of resolved options
    for name in ("budgets", "keep", "baseline"):
        if value := getattr(options, name):
            raise SensibertError(f"finetune: {name} is {show(value)} {want} one process, or a run without it")
    if options.trim.trims and options.trim.parsed_budget().measured:
        raise SensibertError(
            f"finetune: the costs of budget {options.trim.budget} are measured {want} one process, or a budget of "
            "params or flops"
        )
    if ":" in options.device:
        raise SensibertError(f"finetune: device is {options.device!r} {want} 'auto' or 'cuda', one GPU for each")
    if rows % count:
        raise SensibertError(f"finetune: batch_size is {rows} {want} a multiple of {count}: they share each batch")


def training_arguments(options: Options, folder: Path, main_metric: str | None = None) -> TrainingArguments:
    """options: resolved. main_metric: of the evaluations; None where there is nothing to evaluate on."""
    assert options.epochs is not None and options.learning_rate is not None and options.batch_size is not None
    device = device_of(options.device)
    on_gpu, count = device.type == "cuda", launched().count
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size // count,
        gradient_accumulation_steps=options.gradient_accumulation,
        weight_decay=options.weight_decay,
        optim="adamw_torch_fused",
        bf16=options.autocast() is not None,
        use_cpu=not on_gpu,
        ddp_backend=None if count == 1 else "nccl" if on_gpu else "gloo",
        seed=options.seed,
        save_strategy="steps" if options.save_steps else "epoch",
        save_steps=options.save_steps or 500,
        save_total_limit=None if options.save_before_cut else 2,  # a limit would delete the one before the cut
        eval_strategy="no" if main_metric is None else "steps",
        eval_steps=options.eval_steps or ONLY_AT_THE_END,
        load_best_model_at_end=options.best,
        metric_for_best_model=main_metric if options.best else None,
        greater_is_better=True if options.best else None,
        logging_steps=0.02,  # of all steps
        logging_nan_inf_filter=False,  # reads the loss of every step; TrimTrainer raises for one that is not finite
        report_to=options.trackers() or NO_TRACKER,
        run_name=Path(options.output).name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # copies from pinned memory
    )
    if on_gpu and count == 1:
        _use_one(arguments, device)
    return arguments


def _use_one(arguments: TrainingArguments, device: torch.device) -> None:
    """Train on this GPU. Trainer would use the first, or replicate the model on all of them."""
    arguments._n_gpu = 1
    if device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
        arguments.__dict__["_setup_devices"] = device
