"""dove_fast: the DOVE and Q-DOVE visual tokenizers, variable-length image tokens without wasted compute."""

from dove_fast import ops
from dove_fast.config import DOVEConfig
from dove_fast.errors import BackendError, CheckpointError, DoveError, StoreError
from dove_fast.memory import keep_freed_memory
from dove_fast.models.dove import DOVE, TokenizeStats
from dove_fast.native import build_info
from dove_fast.ops.registry import available_backends
from dove_fast.ragged import RaggedTokens
from dove_fast.store import TokenStore

__version__ = "0.1.0"

__all__ = [
    "DOVE",
    "BackendError",
    "CheckpointError",
    "DOVEConfig",
    "DoveError",
    "RaggedTokens",
    "StoreError",
    "TokenStore",
    "TokenizeStats",
    "__version__",
    "available_backends",
    "build_info",
    "keep_freed_memory",
    "ops",
]
