"""What a Trainer, its model and its data must have so that trimming works: checked before the first step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
from .sensitivity.gradients import Loss, given_loss
from .training.trainer import want_one_process


def check_trainer(args: TrainingArguments, model: nn.Module, data: Dataset | None) -> list[str]:
    """SensibertError for a Trainer that would fail at or after the cut. Returns warnings."""
    warnings = []
    want_one_process(args)
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
    return warnings


BATCHES = "rows with input_ids, in batches that the model accepts"


def check_analysis(
    model: nn.Module,
    config: TrimConfig,
    rows: Rows,
    collate: Callable[[list], dict],
    loss: Loss,
    seed: int,
    autocast: torch.dtype | None = None,
    chosen: bool = False,
) -> bool:
    """Run what the cut needs of the model, a forward pass and a loss, on one micro-batch, and change nothing.

    config: resolved. chosen: the plan comes from `choose`. Returns whether `loss` works, by which whole tensors are
    ranked. SensibertError with what to change if the analysis would fail."""
    assert config.method is not None  # of a resolved config
    rule, units = STATISTICS[config.method], config.parsed_grid() is None
    needs: list[tuple[Loss | None, str]] = []  # what the outputs must allow, and otherwise advice
    if config.method != "layer-obs" and (config.compensate or (rule.sampled and not chosen)):
        other = "layer-obs" if units else "magnitude"
        needs.append((loss, f"logits (return_dict=True), or loss= of TrimCallback, or method={other!r}"))
    if rule.data and not rule.sampled and rule.reduce != "factors" and not chosen:
        other = "obs" if units else "fisher"
        needs.append((given_loss, f"labels and a model that returns their loss, or method={other!r}"))
    if not needs and (config.compensate or (rule.data and not chosen)):
        needs.append((None, ""))

    def run(needed: Loss | None) -> None:
        with eval_mode(model, autocast) as device, _undisturbed(device, collate):
            batch = next(micro_batches(rows, collate, config.micro_batch, config.micro_batch, seed))
            batch = {name: value.to(device) for name, value in batch.items()}
            outputs = model(**batch)
            if needed is not None and not needed(outputs, batch, torch.Generator().manual_seed(seed)).requires_grad:
                raise SensibertError("analyze: the loss has no gradient")

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
    try:
        if loss not in (needed for needed, _ in needs):
            run(loss)
    except Exception:  # only reports use the ranking
        return False
    return True


@contextmanager
def _undisturbed(device: torch.device, collate: object) -> Iterator[None]:
    """A context that leaves the random state, and the attributes and random generators of a collator, as they were."""
    inner = getattr(collate, "data_collator", collate)  # Trainer wraps it to drop columns
    owners = {id(owner): owner for owner in (collate, inner, getattr(inner, "__self__", None))}.values()
    attributes = [now for owner in owners if isinstance(now := getattr(owner, "__dict__", None), dict)]
    before = [(now, dict(now)) for now in attributes]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        for now, _ in before:
            for name, value in now.items():
                if isinstance(value, torch.Generator | np.random.Generator | random.Random):
                    now[name] = copy.deepcopy(value)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for now, then in before:
            for made in now.keys() - then.keys():
                del now[made]
            now.update(then)
