"""The scores that a training logged."""

from __future__ import annotations

from transformers import TrainerState

PREFIX = "eval_"  # of Trainer


def evaluations_of(state: TrainerState) -> dict[int, dict[str, float]]:
    """Step -> scores, from before the training was resumed too."""
    found: dict[int, dict[str, float]] = {}
    for log in state.log_history:
        scores = {name.removeprefix(PREFIX): value for name, value in log.items() if name.startswith(PREFIX)}
        if scores:
            found[int(log["step"])] = scores
    return found
