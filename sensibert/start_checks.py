"""What a Trainer, its model and its data must have so that trimming works: checked before the first step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments

from .core.config import TrimConfig
from .core.errors import SensibertError, described, first_line
from .core.rows import Rows
from .core.statistics import STATISTICS
from .data.batching import micro_batches
from .models import base_of, eval_mode, sites
from .models.reloadable import stock_class
from .models.wrapped import has_classes, inner_batches, inner_model, is_wrapped
from .sensitivity import sampled_loss
from .sensitivity.gradients import Loss, given_loss
from .sensitivity.sampled_loss import loss_of
from .training.processes import check_processes
from .trimming.self_check import probe


def check_parallel(
    args: TrainingArguments, trained: nn.Module, config: TrimConfig, optimizer: torch.optim.Optimizer
) -> None:
    """SensibertError for several processes, or GPUs, in which trimming is not supported. trained: of the Trainer."""
    check_processes(args)
    if args.world_size == 1:
        return
    want = f"world_size is {args.world_size}; want one process, or"
    if is_wrapped(trained) and has_classes(trained) and args.ddp_find_unused_parameters is not False:
        raise SensibertError(
            f"TrimCallback: ddp_find_unused_parameters is {args.ddp_find_unused_parameters} and the model is a "
            f"{type(trained).__name__}, whose backward pass fails with it in several processes; want False"
        )
    own = {id(parameter) for parameter in trained.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own and p.requires_grad]
    if others:  # DistributedDataParallel reduces the gradients of the model alone
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in others)
        raise SensibertError(
            f"TrimCallback: the optimizer also trains weights of the loss, outside of the {type(trained).__name__} "
            f"({shapes}), which would differ among the processes, and {want} a loss without weights"
        )
    if config.parsed_budget().measured:
        raise SensibertError(
            f"TrimCallback: the costs of budget {config.budget} are measured and {want} a budget of params or flops"
        )


def check_trainer(
    args: TrainingArguments, model: nn.Module, data: Dataset | None, optimizer: torch.optim.Optimizer
) -> list[str]:
    """SensibertError for a Trainer that would fail at or after the cut. Returns warnings."""
    warnings = []
    if isinstance(model, PreTrainedModel):
        try:
            stock_class(model)
        except SensibertError as error:  # the trimmed model could not be saved
            if args.save_strategy != "no":
                raise SensibertError(f"{error}; to train it, want save_strategy='no'") from None
            warnings.append(str(error))
    if isinstance(data, IterableDataset):
        raise SensibertError(
            "TrimCallback: train_dataset is an IterableDataset, want one with a length and an index: the analysis "
            "draws rows from it"
        )
    trimmable = {member.parameter for site in sites(model) for member in site.members}
    if not any(weight.requires_grad for name, weight in base_of(model).named_parameters() if name in trimmable):
        raise SensibertError(
            "TrimCallback: every trimmable parameter has requires_grad=False; unfreeze the encoder, or remove "
            "TrimCallback"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(weight) in held for name, weight in base_of(model).named_parameters() if name in trimmable):
        raise SensibertError("TrimCallback: the optimizer holds none of the tensors to cut, want that of this model")
    return warnings


BATCHES = "rows with input_ids, in batches that the model accepts"


def check_analysis(
    trained: nn.Module,
    config: TrimConfig,
    rows: Rows,
    collate: Callable[[list], dict],
    loss: Loss,
    seed: int,
    autocast: torch.dtype | None = None,
    chosen: bool = False,
) -> None:
    """Run what the cut needs of the model, a forward pass and a loss, on one micro-batch, and change nothing.

    trained: the model of the Trainer. config: resolved. chosen: the plan comes from `choose`. SensibertError with what
    to change if the analysis would fail."""
    assert config.method is not None  # of a resolved config
    model = inner_model(trained)
    rule, units = STATISTICS[config.method], config.parsed_grid() is None
    needs: list[tuple[Loss | None, str]] = []  # what the outputs must allow, and otherwise advice
    other, name = "layer-obs" if units else "magnitude", type(trained).__name__
    if config.method != "layer-obs" and (config.compensate or (rule.sampled and not chosen)):
        if loss is sampled_loss and not has_classes(trained):
            raise SensibertError(
                f"TrimCallback: method {config.method!r} draws labels from the classes of a head, and {name} has none; "
                f"want method={other!r}, which needs no labels"
            )
        needs.append(
            (loss_of(model, loss), f"logits (return_dict=True), or loss= of TrimCallback, or method={other!r}")
        )
    if rule.data and not rule.sampled and rule.reduce != "factors" and not chosen:
        if is_wrapped(trained):
            raise SensibertError(
                f"TrimCallback: method {config.method!r} needs the loss, which is computed outside of the {name}; "
                f"want method={other!r}"
            )
        other = "obs" if units else "fisher"
        needs.append((given_loss, f"labels and a model that returns their loss, or method={other!r}"))
    if not needs and (config.compensate or (rule.data and not chosen)):
        needs.append((None, ""))

    def run(needed: Loss | None) -> None:
        with eval_mode(model, autocast) as device, _undisturbed(device, collate, rows, model):
            few = micro_batches(rows, collate, config.micro_batch, config.micro_batch, seed)
            batch = next(inner_batches(trained, few))
            batch = {name: value.to(device) for name, value in batch.items()}
            outputs = model(**batch)
            if needed is not None and not needed(outputs, batch, torch.Generator().manual_seed(seed)).requires_grad:
                raise SensibertError("analyze: the loss has no gradient")

    if units:
        try:
            with _undisturbed(next(model.parameters()).device, collate, rows, model):
                probe(model)
        except Exception as error:
            reason = first_line(error) if isinstance(error, SensibertError) else described(error)
            raise SensibertError(
                f"TrimCallback: a trim checks itself by input_ids and attention_mask of the encoder alone, and "
                f"{type(model).__name__} fails there ({reason}); want a base_model that runs by itself"
            ) from error
    for needed, advice in needs:
        try:
            run(needed)
        except Exception as error:  # whatever a collator, a model or a loss may raise
            reason, want = first_line(error), advice
            if not isinstance(error, SensibertError):
                reason, want = described(error), ", and ".join(filter(None, (BATCHES, advice)))
            raise SensibertError(
                f"TrimCallback: method {config.method!r} cannot analyze {type(model).__name__} ({reason}); want {want}"
            ) from error


Generator = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def _undisturbed(device: torch.device, collate: object, rows: object, model: nn.Module) -> Iterator[None]:
    """A context that leaves random states as they were, of the libraries and of the generators that a collator, a data
    set and a model hold, and the attributes of a collator."""
    inner = getattr(collate, "data_collator", collate)  # Trainer wraps it to drop columns
    owners = list({id(owner): owner for owner in (collate, inner, getattr(inner, "__self__", None))}.values())
    attributes = [now for owner in owners if isinstance(now := getattr(owner, "__dict__", None), dict)]
    before = [(now, dict(now)) for now in attributes]
    held = [value for owner in (*owners, rows, *model.modules()) for value in _held(owner)]
    restore = [_restored(value) for value in held if isinstance(value, Generator)]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for again in restore:
            again()
        for now, then in before:
            for made in now.keys() - then.keys():
                del now[made]
            now.update(then)


def _held(owner: object) -> list[object]:
    """What an object, a function or a functools.partial holds."""
    cells = [cell.cell_contents for cell in getattr(owner, "__closure__", None) or () if cell != CellType()]
    keywords = getattr(owner, "keywords", None)
    given = [*(getattr(owner, "args", None) or ()), *(keywords.values() if isinstance(keywords, dict) else ())]
    inner = getattr(owner, "func", None)
    return [*_attributes(owner).values(), *cells, *given, *(_held(inner) if inner is not None else ())]


def _attributes(owner: object) -> dict[str, object]:
    return known if isinstance(known := getattr(owner, "__dict__", None), dict) else {}


def _restored(generator: Any) -> Callable[[], None]:
    """A function that puts a random generator back into its present state."""
    if isinstance(generator, torch.Generator):
        state: Any = generator.get_state()
        return lambda: (generator.set_state(state), None)[1]
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    return partial(generator.setstate, generator.getstate())
