"""Model and batches -> Sensitivity."""

from .analyze import analyze
from .gradients import STATISTICS
from .kfac_obs import FisherFactors, collect_factors
from .ranking import rank_tensors
from .sampled_loss import sampled_loss

__all__ = ["FisherFactors", "STATISTICS", "analyze", "collect_factors", "rank_tensors", "sampled_loss"]
