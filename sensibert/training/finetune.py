"""Fine-tune a model: in the loop on packed batches where that is possible, else in `TrimTrainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode

from ..core.arguments import checked, one_of
from ..core.config import PACKING
from ..core.errors import SensibertError
from ..core.files import writing
from ..models.packed import pooling_of
from .fast_loop import FastTrainer
from .processes import Processes, sharding
from .run_memory import was_packed
from .trainer import ADAMW, TrimTrainer


@checked
def finetune(
    model: nn.Module,
    train: Dataset | Iterable,
    collator: Callable | None,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: str | Path | None = None,
    packing: str = "auto",
    graphs: bool = True,
    printed: bool = True,
    **trainer_options: Any,
) -> TrimTrainer:
    """Train a model in place, from a checkpoint of the same run if one is given; return the trainer.

    callbacks: they may trim the model between two steps. packing: "auto" packs batches of `Features` where model and
    arguments allow it, unless the run of the checkpoint pads; "on" raises SensibertError where they do not, "off" pads
    them. graphs: on a GPU the packed steps of one process run as CUDA graphs. printed: whether Trainer prints its logs
    if disable_tqdm is set. trainer_options: lr_shape, teacher, distil and score of `TrimTrainer`, and those of Trainer.
    SensibertError for a loss that is not finite, a damaged checkpoint, or a batch that the memory of the GPU does not
    hold."""
    if packing not in PACKING:
        raise SensibertError(f"finetune: packing is {packing!r}, {one_of(packing, PACKING)}")
    if isinstance(train, Sized) and not len(train):
        raise SensibertError("finetune: train is empty, want at least one row")
    if packing == "auto" and checkpoint is not None and _was_padded(Path(checkpoint)):
        packing = "off"  # its rows come in the order that the run began with
    trainer = _trainer(
        packing,
        graphs,
        model=model,
        args=arguments,
        train_dataset=train,
        data_collator=collator,
        callbacks=list(callbacks),
        **trainer_options,
    )
    if not printed:
        trainer.remove_callback(PrinterCallback)
    with writing(f"a checkpoint to {arguments.output_dir}", "; --resume continues from the last complete checkpoint"):
        try:
            with Processes.of(arguments).training():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            count, batches = arguments.world_size, arguments.gradient_accumulation_steps
            size = arguments.per_device_train_batch_size * count
            raise SensibertError(
                f"finetune: the GPU is out of memory in step {trainer.state.global_step + 1} with batches of {size} "
                f"rows; try --batch-size {max(count, size // 2)} --gradient-accumulation {2 * batches}, which takes "
                "the same steps, --precision bf16, or a smaller --max-length"
            ) from error
    return trainer


def _was_padded(checkpoint: Path) -> bool:
    """Whether the run of a checkpoint trained on padded batches.

    Where it does not say so, it is of a version that padded in several processes, and at first neither packed nor
    counted tokens."""
    if (packed := was_packed(checkpoint)) is not None:
        return not packed
    if (checkpoint / "rng_state_1.pth").exists():
        return True
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):  # `check_checkpoint` says what is wrong with it
        return False
    return state.global_step > 0 and not state.num_input_tokens_seen


def _trainer(packing: str, graphs: bool, **options: Any) -> TrimTrainer:
    if packing == "off":
        return TrimTrainer(**options)
    arguments, packer = options["args"], getattr(options["data_collator"], "packer", None)
    pack = None if packer is None else packer(options["train_dataset"], arguments.train_batch_size)
    reason = "the data are not those of a TaskData with its collator" if pack is None else why_not_packed(arguments)
    if pack is not None and reason is None:
        try:
            teacher = options.get("teacher")
            if teacher is not None and (given := teacher()) is not None:
                pooling_of(given)
            return FastTrainer(pooling_of(options["model"]), pack, graphs, **options)
        except SensibertError as error:
            if packing == "on":
                raise
            logging.getLogger("sensibert").warning("%s: batches are padded", error)
    elif packing == "on":
        raise SensibertError(f"finetune: packing is 'on', but {reason}; want packing 'auto'")
    return TrimTrainer(**options)


BY_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that step at an evaluation
# Arguments of Trainer that the loop on packed batches does not read, and the values that it stands for.
UNREAD = {
    "fp16": False, "label_smoothing_factor": 0.0, "torch_compile": False, "gradient_checkpointing": False,
    "neftune_noise_alpha": None, "deepspeed": None, "include_num_input_tokens_seen": "no",
    "dataloader_drop_last": False,
}  # fmt: skip


def why_not_packed(arguments: TrainingArguments) -> str | None:
    """The argument that keeps a training from running on packed batches; None if none does."""
    if arguments.optim not in ADAMW:
        return f"optim is {OptimizerNames(arguments.optim).value}"
    if arguments.n_gpu > 1:
        return f"n_gpu is {arguments.n_gpu}"
    if arguments.device.type == "cuda" and not arguments.bf16:
        return "the precision is fp32 on a GPU, where packed attention needs bf16"
    if (schedule := SchedulerType(arguments.lr_scheduler_type)) in BY_METRICS:
        return f"lr_scheduler_type is {schedule.value}"
    if arguments.world_size > 1 and (reason := _why_not_shared(arguments)) is not None:
        return reason
    for name, usual in UNREAD.items():
        if (value := getattr(arguments, name, usual)) and value != usual:
            return f"{name} is {value}"
    return None


def _why_not_shared(arguments: TrainingArguments) -> str | None:
    """`why_not_packed` for several processes."""
    if (kind := sharding(arguments)) is not None:
        return f"training uses {kind}"
    if arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        return f"parallel_mode is {arguments.parallel_mode.value}"
    if arguments.parallelism_config is not None:
        return "parallelism_config is set"
    for name, usual in {"split_batches": False, "even_batches": True}.items():  # Trainer counts the steps by them
        if (value := getattr(arguments.accelerator_config, name)) != usual:
            return f"{name} of accelerator_config is {value}"
    return None
