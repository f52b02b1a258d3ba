"""dove_fast: the DOVE and Q-DOVE visual tokenizers, variable-length image tokens without wasted compute."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Each name's module, imported when the name is first asked for: the decoding processes of an offline job need no torch,
# and start in a fraction of the time that importing it takes.
_MODULES = {
    "DOVE": "dove_fast.models.dove",
    "BackendError": "dove_fast.errors",
    "CheckpointError": "dove_fast.errors",
    "DOVEConfig": "dove_fast.config",
    "DoveError": "dove_fast.errors",
    "RaggedTokens": "dove_fast.ragged",
    "StoreError": "dove_fast.errors",
    "TokenStore": "dove_fast.store",
    "TokenizeStats": "dove_fast.models.dove",
    "available_backends": "dove_fast.ops.registry",
    "build_info": "dove_fast.native",
    "keep_freed_memory": "dove_fast.memory",
}


# Not for type checkers, to which it would mean that any name is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what a public name stands for."""
        if name == "ops":
            return import_module("dove_fast.ops")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
