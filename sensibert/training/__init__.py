"""The training loop."""

from .finetune import finetune
from .predict import predict
from .trainer import TrimTrainer

__all__ = ["TrimTrainer", "finetune", "predict"]
