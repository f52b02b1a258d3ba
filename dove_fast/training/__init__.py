"""Training DOVE and Q-DOVE."""

from dove_fast.training.config import TrainConfig
from dove_fast.training.distributed import mean_over_ranks, process_group
from dove_fast.training.forward import TrainingForward, training_forward
from dove_fast.training.trainer import TrainProgress, TrainReport, train

__all__ = [
    "TrainConfig",
    "TrainProgress",
    "TrainReport",
    "TrainingForward",
    "mean_over_ranks",
    "process_group",
    "train",
    "training_forward",
]
