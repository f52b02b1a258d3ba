"""The token store: safetensors shards beside Parquet records, written unit by unit, read memory-mapped."""

from dove_fast.store.reader import TokenRecord, TokenStore

__all__ = ["TokenRecord", "TokenStore"]
