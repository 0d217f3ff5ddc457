"""The inputs of a run, with digests, and their comparison with those of the checkpoint that it resumes from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .data.encode import Features
from .data.task_data import TaskData
from .models.embedding import EmbeddingModel
from .models.modules import weights_digest
from .models.structure import STRUCTURE
from .run_options import SNAPSHOT, Options
from .training.checkpoints import want_same
from .training.evaluations import evaluations_of
from .training.run_memory import RunMemory

# Entries of a model's config that change nothing of what it computes, or are compared elsewhere.
NOT_COMPARED = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id", "auto_map"),
    "sensibert",
)


def made_from(
    options: Options, data: TaskData, model: PreTrainedModel | EmbeddingModel, teacher: nn.Module | None
) -> dict[str, object]:
    """What the weights of a run depend on besides its settings, with digests of weights and encoded rows."""

    def rows(features: Features | None) -> str:
        return "none" if features is None else f"{len(features)} rows with digest {features.digest()[:16]}"

    def weights(given: nn.Module) -> str:
        return f"weights with digest {weights_digest(given)[:16]}"

    labels = ", ".join(data.label_names) or "none"
    found: dict[str, object] = {"seed": options.seed, "task": data.task.name, "labels": labels}
    found["max_length"] = options.max_length or data.task.max_length
    found |= {"train_file": rows(data.train), "validation_file": rows(data.validation), "model": weights(model)}
    config = json.loads(json.dumps(model.config.to_dict(), default=str))  # as it is read from a checkpoint
    found["config"] = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    if options.teacher is None:
        return found
    teaches = SNAPSHOT if options.teacher == SNAPSHOT or teacher is None else weights(teacher)
    return found | {"teacher": teaches, "distil": options.distil, "temperature": options.temperature}


def want_same_inputs(checkpoint: Path, memory: RunMemory, inputs: dict[str, object]) -> None:
    """SensibertError naming the first input that is not the one that the checkpoint was made from."""
    was, now = dict(memory.inputs), dict(inputs)
    if not was:  # of version 0.1
        logging.getLogger("sensibert").warning(
            "resume: %s does not say which model and data it was made from, so they are not compared", checkpoint
        )
        return
    if not (checkpoint / STRUCTURE).exists():  # before the cut: no snapshot was made
        scored = evaluations_of(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)))
        for each in (was, now):
            if not scored:
                each.pop("validation_file")
            if each.get("teacher") == SNAPSHOT:
                for name in ("teacher", "distil", "temperature"):
                    del each[name]
    then, here = (cast("dict[str, object]", part.pop("config", {})) for part in (was, now))
    want_same(checkpoint, was, now)
    shared = then.keys() & here.keys()  # another version of transformers may have other entries
    want_same(checkpoint, *({f"config.{name}": part[name] for name in sorted(shared)} for part in (then, here)))
