"""Training DOVE and Q-DOVE."""

from dove_fast.training.distributed import mean_over_ranks
from dove_fast.training.forward import TrainingForward, training_forward

__all__ = ["TrainingForward", "mean_over_ranks", "training_forward"]
