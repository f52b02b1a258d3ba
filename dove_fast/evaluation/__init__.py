"""What tokens are worth: measures of images, lengths and reconstructions, and the evaluation of a whole model."""

from dove_fast.evaluation.complexity import laplacian_variance, rank_correlation
from dove_fast.evaluation.evaluate import EvaluateOptions, Outcome, evaluate
from dove_fast.evaluation.grounding import GroundingMeter
from dove_fast.evaluation.measures import psnr, ssim
from dove_fast.evaluation.quality import QualityMeter
from dove_fast.evaluation.results import Evaluation, read_evaluation, write_evaluation

__all__ = [
    "EvaluateOptions",
    "Evaluation",
    "GroundingMeter",
    "Outcome",
    "QualityMeter",
    "evaluate",
    "laplacian_variance",
    "psnr",
    "rank_correlation",
    "read_evaluation",
    "ssim",
    "write_evaluation",
]
