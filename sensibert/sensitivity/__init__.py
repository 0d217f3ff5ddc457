"""Model and batches -> Sensitivity."""

from .analyze import analyze
from .kfac_obs import FisherFactors, collect_factors
from .ranking import rank_tensors
from .sampled_loss import sampled_loss

__all__ = ["FisherFactors", "analyze", "collect_factors", "rank_tensors", "sampled_loss"]
