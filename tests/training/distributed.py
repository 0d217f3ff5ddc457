"""Programs that train in several processes over gloo, for test_distributed.py."""

import json
import os
import signal
import sys
from pathlib import Path
from socket import socket

from tests.fresh import Started


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(case: str, folder: Path, count: int) -> list[Started]:
    """Start the processes of a case, each with the environment variables that torchrun sets."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Started(_process, case, folder, cwd=folder, **environment, **number) for number in numbers]


def run(case: str, folder: Path, count: int, ending: int | None = None) -> list[dict]:
    """What every process of a case found, in the order of the processes. ending: only of the first ones, so many."""
    folder.mkdir(exist_ok=True)
    processes = start(case, folder, count)
    try:
        return [_found(process) for process in processes[:ending]]
    finally:
        for process in processes:
            process.kill()


def _found(process: Started) -> dict:
    status, out, err = process.ended()
    assert status == 0, (out[-500:], err[-3000:])
    return json.loads(out.strip().splitlines()[-1]) | {"errors": err}


def _process(case: str, folder: Path) -> None:
    print(json.dumps(globals()[case](Training(folder))), flush=True)
    os._exit(0)  # gloo may wait


class Training:
    """A small training with a cut after step 2 of 6, whose global batch has 8 rows for any number of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))

    def __call__(
        self, kind=None, config="50%params", resume=None, rows=40, callbacks=(), callback=None, **changed
    ) -> dict:
        from transformers import Trainer, TrainingArguments

        from sensibert import SensibertError, TrimCallback
        from sensibert.models.masks import masks_of
        from sensibert.models.modules import weights_digest
        from sensibert.models.structure import structure_of
        from tests.helpers import tiny_model
        from tests.training.test_trainer import Collator, Rows

        usual = {"max_steps": 6, "per_device_train_batch_size": 8 // self.count, "learning_rate": 1e-3, "seed": 0}
        usual |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        usual |= {"ddp_backend": "gloo", "ddp_timeout": 300} if self.count > 1 else {}
        args = TrainingArguments(str(self.folder / "run"), **(usual | changed))
        callback = callback or TrimCallback(config)
        self.model = tiny_model()
        self.trainer = (kind or Trainer)(
            self.model, args, train_dataset=Rows(rows), data_collator=Collator(0), callbacks=[*callbacks, callback]
        )
        try:
            self.trainer.train(resume_from_checkpoint=resume)
        except SensibertError as error:
            return {"step": self.trainer.state.global_step, "error": str(error)}
        masks = masks_of(self.model)
        kept = structure_of(self.model) if masks is None else masks.keep
        return {
            "step": self.trainer.state.global_step,
            "wrapper": type(self.trainer.model_wrapped).__name__,
            "digest": weights_digest(self.model),
            "kept": {name: tensor.tolist() for name, tensor in kept.items()},
            "warnings": callback.warnings,
        }


def several(training: Training) -> dict:
    """Trainings of several kinds, one after the other, in the same processes."""
    from sensibert import TrimConfig, TrimTrainer

    half = 4 // training.count
    # Where a model ignores num_items_in_batch, Trainer multiplies the loss by the number of processes; AdamW does not
    # notice, and SGD would.
    sgd = {"optim": "sgd", "learning_rate": 0.1, "average_tokens_across_devices": False}
    found = {"adamw": training(), "sgd": training(**sgd)}
    training.trainer.save_model(str(training.folder / "small"))
    found["uneven"] = training(rows=30)  # 4 batches an epoch, the last of 6 rows
    found["accumulated"] = training(per_device_train_batch_size=half, gradient_accumulation_steps=2)
    found["checkpointing"] = training(gradient_checkpointing=True)
    found["blocks"] = training(TrimTrainer, TrimConfig(grid="block8"))
    found["bf16"] = training(TrimTrainer, bf16=True)
    if training.count == 1:
        return found | {"saved": training(TrimTrainer, save_strategy="steps", save_steps=4)}
    return found | _resumed(training) | _refused(training)


def _resumed(training: Training) -> dict:
    """A training with checkpoints, and others that resume from those before and after the cut."""
    from sensibert import TrimTrainer

    found = {"saved": training(TrimTrainer, save_strategy="steps", save_steps=1)}
    for step in (1, 4):
        found[f"from {step}"] = training(TrimTrainer, resume=str(training.folder / f"run/checkpoint-{step}"))
    one = str(training.folder.parent / "alone/run/checkpoint-4")
    found["from one"] = training(TrimTrainer, resume=one)
    found["more rows"] = training(TrimTrainer, resume=one, per_device_train_batch_size=8)
    return found


def _refused(training: Training) -> dict:
    """The last process changes a weight before the cut; the analysis fails in the first process."""
    import torch
    from transformers import TrainerCallback

    from sensibert import SensibertError, TrimCallback

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2 and training.rank == training.count - 1:
                with torch.no_grad():
                    model.classifier.bias.add_(1)

    def choose(model, batches, budget):
        raise SensibertError("no plan today")

    failing = TrimCallback("50%params", choose=choose)
    return {"other weights": training(callbacks=[Change()]), "no plan": training(callback=failing)}


def sentences(training: Training) -> dict:
    """Trainings in the trainers of sentence-transformers, without dropout."""
    from torch import nn

    from sensibert import SensibertError, TrimConfig
    from sensibert.models.modules import weights_digest
    from sensibert.models.structure import structure_of
    from tests.sentence_models import sentence_model
    from tests.test_sentence_trainers import KINDS, trainer

    def train(name: str, model, columns, loss, **more) -> dict:
        changed = {"per_device_train_batch_size": 8 // training.count}
        changed |= {"ddp_backend": "gloo", "ddp_timeout": 300} if training.count > 1 else {}
        running = trainer(model, columns, loss, training.folder / name, TrimConfig("50%params"), **(changed | more))
        try:
            running.train()
        except SensibertError as error:
            return {"step": running.state.global_step, "error": str(error)}
        kept = structure_of(model.transformers_model)
        return {
            "step": running.state.global_step,
            "wrapper": type(running.model_wrapped).__name__,
            "digest": weights_digest(model),
            "kept": {name: tensor.tolist() for name, tensor in kept.items()},
        }

    several = ("pairs", "cached", "splade", "classes", "texts", "lists", "reranker")
    kinds = ("scores", *(several if training.count > 1 else ("reranker",)))
    # Once processes are connected, transformers writes folders in the first one alone.
    models = {kind: sentence_model(KINDS[kind][0], training.folder / f"{kind}-{training.rank}") for kind in kinds}
    found: dict[str, dict] = {}
    for kind, model in models.items():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        name, columns, loss = KINDS[kind]
        more = {"ddp_find_unused_parameters": False} if name == "CrossEncoder" else {}
        if kind == "reranker" and training.count > 1:
            found["unused"] = train("unused", model, columns, loss)
        found[kind] = train(kind, model, columns, loss, **more)
    return found


def commands(training: Training) -> dict:
    """Commands one after the other, in a folder with models, data, and in begun.partial a checkpoint of one process."""
    from unittest import mock

    from sensibert import TrimCallback, run_output, run_training
    from sensibert.deploy import bench
    from sensibert.models.modules import weights_digest
    from tests import runs
    from tests.helpers import FEW_LATENCIES

    os.chdir(training.folder)
    digests: list[str] = []

    def finetune(model, *args, **kwargs):
        trainer = trained(model, *args, **kwargs)
        digests.append(weights_digest(model))
        return trainer

    def command(*more: object, model: str = "model", train: str = "train.csv") -> dict:
        given = ("finetune", "--model", model, "--train-file", train, *RUN, *more)
        done = runs.command(*given, shown=True)
        return {"code": done.code, "out": done.out, "err": done.err, "digest": digests.pop() if digests else None}

    step_end = TrimCallback.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 4 and training.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trained = run_training.finetune
    drawn = mock.patch.object(run_output, "write_report", lambda *args: [])
    timed = mock.patch.multiple(bench, **FEW_LATENCIES)
    exits = mock.patch.object(os, "_exit", sys.exit)
    with drawn, timed, exits, mock.patch.object(run_training, "finetune", finetune):
        found = {"wrong": command("--label-column", "nowhere", "--output", "wrong")}
        more = ("--teacher", "snapshot", "--eval-steps", 5, "--best", "--json")
        found["done"] = command("--validation-file", "dev.csv", *more, "--output", "both")
        with mock.patch.object(TrimCallback, "on_step_end", interrupted):
            found["stopped"] = command("--output", "stopped")
        found["rows"] = command("--resume", "--batch-size", 8, "--output", "begun")
        found["resumed"] = command("--resume", "--output", "begun")
        embedding = ("--task", "embedding", "--validation-file", "scored.csv", "--output", "embedding")
        found["embedding"] = command(*embedding, model="encoder", train="train.txt")
    return found


# Trainings on packed batches.
TOKENS = {"kind": "tokens", "head": "TokenClassification"}
PACKED: dict[str, dict] = {
    "classes": {"save_strategy": "steps", "save_steps": 2},
    "tokens": TOKENS,
    "accumulated": TOKENS | {"gradient_accumulation_steps": 2},
    "taught": {"kind": "labels", "taught": True},
    "blocks": {"trim": {"grid": "block8"}},
    "bf16": {"bf16": True},
}


def packed(training: Training) -> dict:
    """Trainings on packed batches, and resumes from the checkpoints of one process."""
    found = {name: pack(training, name, **changed) for name, changed in PACKED.items()}
    for step in (2, 4) if training.count > 1 else ():
        checkpoint = training.folder.parent / f"alone/classes/checkpoint-{step}"
        found[f"from {step}"] = pack(training, f"from {step}", checkpoint=checkpoint)
    return found


def pack(
    training: Training, name: str, kind="classes", head="SequenceClassification", taught=False, callbacks=(),
    checkpoint=None, **changed,
) -> dict:  # fmt: skip
    """Train 9 steps of 8 rows, with a cut after step 3; step 6 has one row. Weights go to NAME.pt."""
    import torch

    from sensibert import TrimCallback, TrimConfig
    from sensibert.models.modules import weights_digest
    from sensibert.training.fast_loop import FastTrainer
    from tests.helpers import tiny_model
    from tests.training.test_fast_loop import rows, train

    model, teacher = tiny_model(seed=training.rank, head=head), tiny_model(seed=5, head=head)  # the first one's counts
    if not changed.get("bf16"):
        model, teacher = model.double(), teacher.double()
    batches = training.count * changed.get("gradient_accumulation_steps", 1)
    usual = {"per_device_train_batch_size": 8 // batches, "logging_steps": 1, "max_steps": 9}
    usual |= {"ddp_backend": "gloo", "ddp_timeout": 300} if training.count > 1 else {}
    usual |= {"teacher": lambda: teacher} if taught else {}
    callback = TrimCallback(TrimConfig("50%params", samples=16, **changed.pop("trim", {"width_multiple": 4})))
    data = rows(41, kind)
    if kind == "tokens":  # most rows have one label; all tokens of the others have one
        many = torch.rand(41, generator=torch.Generator().manual_seed(3)) < 0.4
        for row in (~many).nonzero().flatten().tolist():
            data.per_token["labels"][data.ends[row] + 1 : data.ends[row + 1]] = -100
    trainer = train(
        training.folder / name, model, data, "auto", [*callbacks, callback], checkpoint, **(usual | changed)
    )
    if training.rank == 0:
        torch.save(model.state_dict(), training.folder / f"{name}.pt")
    state = trainer.state
    return {
        "packed": isinstance(trainer, FastTrainer),
        "step": state.global_step,
        "digest": weights_digest(model),
        "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in state.log_history if "grad_norm" in entry],
        "tokens": state.num_input_tokens_seen,
        "wrapped": trainer.model_wrapped is not trainer.model,
        "to wrap": not hasattr(model, "_is_accelerate_prepared"),  # by another Trainer, which would not wrap it then
        "flops per token": state.total_flos / trainer.padded_tokens,
    }


def dying_packed(training: Training) -> dict:
    """The last process is killed after a step; the others wait for its gradients."""
    from transformers import TrainerCallback

    from sensibert import SensibertError

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1 and training.rank == training.count - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        return pack(training, "dying", callbacks=[Die()])
    except SensibertError as error:
        return {"error": str(error)}


RUN = ("--max-steps", 10, "--batch-size", 16, "--learning-rate", 1e-3)


def failing(training: Training) -> None:
    """A command whose last process cannot read its data. Exits."""
    from unittest import mock

    from sensibert import SensibertError, cli, recipe

    def unreadable(*_: object) -> None:
        raise SensibertError("train.csv: cannot be read here")

    sys.argv = ["sensibert", "finetune", "--model", "model", "--train-file", "train.csv", "--output", "failing"]
    os.chdir(training.folder)
    with mock.patch.object(recipe, "load_data", unreadable if training.rank == 1 else recipe.load_data):
        cli.main()


def one(training: Training) -> dict:
    return training()


def resumed(training: Training, **changed) -> dict:
    """A resume from the checkpoint that another number of processes wrote."""
    from sensibert import TrimTrainer

    return training(TrimTrainer, resume=str(training.folder / "run/checkpoint-4"), **changed)


def dying(training: Training, sent: int = signal.SIGKILL, **changed) -> dict:
    """The last process is killed before the cut; the others wait for it there."""
    from transformers import TrainerCallback

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and training.rank == training.count - 1:
                os.kill(os.getpid(), sent)

    return training(callbacks=[Die()], **changed)


def stopping(training: Training) -> dict:
    """The last process stops, without an end."""
    return dying(training, signal.SIGSTOP, ddp_timeout=3)
