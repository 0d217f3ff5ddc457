"""Programs that train in several processes over gloo, for test_distributed.py."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from socket import socket

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(case: str, folder: Path, count: int) -> list[subprocess.Popen]:
    """Start the processes of a case, each with the environment variables that torchrun sets."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count), "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-m", "tests.training.distributed", case, str(folder)]
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    if count == 1:
        ranks = [os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=folder, env=rank, **pipes) for rank in ranks]


def run(case: str, folder: Path, count: int, ending: int | None = None) -> list[dict]:
    """What every process of a case found, in the order of the processes. ending: only of the first ones, so many."""
    folder.mkdir(exist_ok=True)
    processes = start(case, folder, count)
    try:
        return [_found(process) for process in processes[:ending]]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _found(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out[-500:], err[-3000:])
    return json.loads(out.strip().splitlines()[-1]) | {"errors": err}


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
        usual |= {"ddp_backend": "gloo", "ddp_timeout": 60} if self.count > 1 else {}
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
    return found if training.count == 1 else found | _resumed(training) | _refused(training)


def _resumed(training: Training) -> dict:
    """A training with checkpoints, and others that resume from those before and after the cut."""
    from sensibert import TrimTrainer

    found = {"saved": training(TrimTrainer, save_strategy="steps", save_steps=1)}
    for step in (1, 4):
        found[f"from {step}"] = training(TrimTrainer, resume=str(training.folder / f"run/checkpoint-{step}"))
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


def one(training: Training) -> dict:
    return training()


def resumed(training: Training) -> dict:
    """A resume from the checkpoint that another number of processes wrote."""
    from sensibert import TrimTrainer

    return training(TrimTrainer, resume=str(training.folder / "run/checkpoint-4"))


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


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    found = globals()[case](Training(folder))
    print(json.dumps(found), flush=True)
    os._exit(0)  # gloo may wait


if __name__ == "__main__":
    main()
