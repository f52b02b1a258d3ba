"""What tokens are worth: measures of images, lengths and reconstructions."""

from dove_fast.evaluation.complexity import laplacian_variance, rank_correlation

__all__ = ["laplacian_variance", "rank_correlation"]
