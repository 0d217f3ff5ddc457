"""The training loop."""

from .trainer import TrimTrainer, finetune, predict

__all__ = ["TrimTrainer", "finetune", "predict"]
