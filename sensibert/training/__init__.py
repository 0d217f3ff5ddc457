"""The training loop around the trim."""

from .trainer import TrimTrainer, finetune, predict

__all__ = ["TrimTrainer", "finetune", "predict"]
